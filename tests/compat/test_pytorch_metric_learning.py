"""The drop-in classes against pytorch-metric-learning itself, in float64, option by option."""

import copy
import inspect
import pickle

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from pml_pairs import CLASSES, LOSSES, MARGIN_LOSSES, SAMPLES, SIZE, assert_same, batch, outcome, pair
from pytorch_metric_learning import losses, miners, reducers, regularizers
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils.common_functions import TorchInitWrapper
from torch import nn

import fused_margin as fm
from fused_margin.compat import pytorch_metric_learning as compat

SAVE, RECOMPUTE = 256, 1e-6

CASES = [
    *((name, {}) for name in LOSSES),
    *(("ArcFaceLoss", {"margin": margin, "scale": 20}) for margin in (0, 57.3, 100.0, 190.0)),
    *(("CosFaceLoss", {"margin": margin, "scale": 30.5}) for margin in (0.0, 0.1, 1.5)),
    *(("SphereFaceLoss", {"margin": margin, "scale": 0.5}) for margin in (1, 2, 3.9, 5)),
    *(("LargeMarginSoftmaxLoss", {"margin": margin, "scale": 0.25}) for margin in (1, 2, 3.9, 5)),
    ("NormalizedSoftmaxLoss", {"temperature": 0.3}),
    ("NormalizedSoftmaxLoss", {"distance": CosineSimilarity()}),
    ("NormalizedSoftmaxLoss", {"distance": DotProductSimilarity(normalize_embeddings=False)}),
    *(("SubCenterArcFaceLoss", {"sub_centers": k, "margin": 40, "scale": 16}) for k in (1, 2, 5)),
]


@pytest.fixture
def only_fused(monkeypatch):
    """Fail if a distance computes an (N, C) or (C, C) matrix."""

    def fail(*_):
        raise AssertionError("computed by pytorch-metric-learning")

    monkeypatch.setattr(DotProductSimilarity, "compute_mat", fail)


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_values_and_gradients(name, options, workspace_mb):
    ours, theirs = pair(name, **options)
    ours.workspace_mb = workspace_mb
    x, y = batch()
    columns = theirs.W.detach()[:, y * getattr(theirs, "sub_centers", 1)].t()
    x[3:9] = -2 * columns[3:9] + 0.2 * x[3:9]  # angles near pi
    x[9:12] = columns[9:12] + 0.1 * x[9:12]
    assert_same(ours, theirs, x, y)


@pytest.mark.parametrize("name", LOSSES)
def test_only_kernels_are_used(name, only_fused):
    ours, theirs = pair(name)
    ours(*batch())
    with pytest.raises(AssertionError, match="computed by pytorch-metric-learning"):
        theirs(*batch())


@pytest.mark.parametrize("name", compat.__all__)
def test_is_a_subclass_of_the_replaced_class(name):
    ours, theirs = getattr(compat, name), getattr(regularizers if name.endswith("Regularizer") else losses, name)
    assert issubclass(ours, theirs) and ours.__name__ == name
    for method in ("__init__", "forward", "get_logits", "get_outliers"):
        if hasattr(theirs, method):
            assert inspect.signature(getattr(ours, method)) == inspect.signature(getattr(theirs, method))
    for base in theirs.__mro__[1:]:  # the same class hierarchy as theirs
        if base.__name__ in compat.__all__:
            assert issubclass(ours, getattr(compat, base.__name__))


@pytest.mark.parametrize("name", LOSSES)
def test_construction(name):
    """The same seed or init function gives the same parameter; attributes are equal."""
    both = []
    for module in (compat, losses):
        torch.manual_seed(5)
        both.append(getattr(module, name)(num_classes=CLASSES, embedding_size=SIZE))
    ours, theirs = both
    centers = CLASSES * getattr(theirs, "sub_centers", 1)
    assert torch.equal(ours.W, theirs.W) and ours.W.shape == (SIZE, centers)
    assert [key for key, _ in ours.named_parameters()] == ["W"]
    for attribute in ("margin", "scale", "num_classes", "temperature", "weight_reg_weight"):
        assert getattr(ours, attribute, None) == getattr(theirs, attribute, None)
    ours, theirs = pair(name, weight_init_func=lambda: TorchInitWrapper(nn.init.constant_, val=0.5))
    assert (ours.W == 0.5).all() and (theirs.W == 0.5).all()


@pytest.mark.parametrize("name", LOSSES)
def test_state_dicts_in_both_directions(name):
    ours, theirs = pair(name)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])
    with torch.no_grad():
        theirs.W.mul_(2).add_(1)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    expected = ours(*batch())
    for clone in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(clone(*batch()), expected)


REDUCERS = {
    "mean": reducers.MeanReducer,
    "sum": reducers.SumReducer,
    "class weighted": lambda: reducers.ClassWeightedReducer(torch.linspace(0, 2, CLASSES)),
    "threshold": lambda: reducers.ThresholdReducer(low=6.0, high=75.0),
    "average of non-zero": reducers.AvgNonZeroReducer,
    "per anchor": lambda: reducers.PerAnchorReducer(reducers.SumReducer()),
    "multiple": lambda: reducers.MultipleReducers({"loss": reducers.SumReducer()}),
}


@pytest.mark.parametrize("reducer", REDUCERS)
@pytest.mark.parametrize("name", ["ArcFaceLoss", "NormalizedSoftmaxLoss"])
def test_reducers(name, reducer):
    ours, theirs = pair(name, reducer=REDUCERS[reducer]())
    assert_same(ours, theirs, *batch())


def test_reducers_without_reduction():
    ours, theirs = pair("ArcFaceLoss", reducer=lambda: reducers.DoNothingReducer())
    measured, expected = ours(*batch())["loss"], theirs(*batch())["loss"]
    torch.testing.assert_close(measured["losses"], expected["losses"])
    assert torch.equal(measured["indices"], expected["indices"])
    assert measured["reduction_type"] == expected["reduction_type"] == "element"
    for loss_fn in pair("ArcFaceLoss", reducer=lambda: reducers.DivisorReducer()):  # theirs has no divisor either
        with pytest.raises(KeyError, match="divisor"):
            loss_fn(*batch())


@pytest.mark.parametrize("name", LOSSES)
def test_miner_weights(name):
    ours, theirs = pair(name)
    x, y = batch()
    y = y % 9
    pairs, triplets = miners.MultiSimilarityMiner()(x, y), miners.TripletMarginMiner(margin=0.1)(x, y)
    nothing = tuple(torch.zeros(0, dtype=torch.int64) for _ in range(3))
    plain = ours(x, y)
    for indices_tuple in (pairs, triplets):
        assert len(indices_tuple[0]) > 0 and ours(x, y, indices_tuple) != plain
        assert_same(ours, theirs, x, y, indices_tuple)
    assert ours(x, y, nothing) == plain


REGULARIZERS = {
    "regular face": lambda: {"weight_regularizer": regularizers.RegularFaceRegularizer()},
    "center invariant": lambda: {"weight_regularizer": regularizers.CenterInvariantRegularizer()},
    "weights and embeddings": lambda: {
        "weight_regularizer": regularizers.LpRegularizer(p=1),
        "weight_reg_weight": 0.3,
        "embedding_regularizer": regularizers.LpRegularizer(power=2),
        "embedding_reg_weight": 0.2,
    },
    "with reducers": lambda: {
        "embedding_regularizer": regularizers.ZeroMeanRegularizer(),
        "reducer": reducers.MultipleReducers(
            {"loss": reducers.SumReducer(), "embedding_reg_loss": reducers.MeanReducer()}
        ),
    },
}


@pytest.mark.parametrize("kind", REGULARIZERS)
@pytest.mark.parametrize("name", LOSSES)
def test_regularizers(name, kind):
    ours, theirs = pair(name, **REGULARIZERS[kind]())
    assert ours.sub_loss_names() == theirs.sub_loss_names()
    assert_same(ours, theirs, *batch())


@pytest.mark.parametrize("reducer", REDUCERS)
def test_regular_face(reducer, only_fused):
    """Ours with our loss against theirs with theirs, and against the plain formula."""
    x, y = batch()
    weight = torch.randn(SIZE, CLASSES, dtype=torch.float64).t()  # strided, as the losses pass it
    a = leaf(weight)
    compat.RegularFaceRegularizer(reducer=REDUCERS[reducer]())(a).backward()
    b = leaf(weight)
    per_class = fm.reference.nearest_class(b)[0]
    loss_info = {"losses": per_class, "indices": torch.arange(CLASSES), "reduction_type": "element"}
    REDUCERS[reducer]()({"loss": loss_info}, b, torch.arange(CLASSES)).backward()
    assert relative_error(a.grad, b.grad) < 1e-10

    options = {"weight_regularizer": compat.RegularFaceRegularizer(), "weight_reg_weight": 0.1}
    loss_fn = compat.ArcFaceLoss(CLASSES, SIZE, **options).double()
    plain = compat.ArcFaceLoss(CLASSES, SIZE).double()
    plain.load_state_dict(loss_fn.state_dict())
    expected = plain(x, y) + 0.1 * fm.functional.exclusive_regularization(plain.W.t())
    torch.testing.assert_close(loss_fn(x, y), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"distance": DotProductSimilarity()}, {"distance": DotProductSimilarity(normalize_embeddings=False)}]
    + [{"distance": CosineSimilarity(power=3)}],
    ids=str,
)
def test_regular_face_matches_theirs(options):
    _, weight, _ = problem(1, CLASSES, SIZE)
    a, b = leaf(weight), leaf(weight)
    ours, theirs = compat.RegularFaceRegularizer(**options)(a), regularizers.RegularFaceRegularizer(**options)(b)
    ours.backward()
    theirs.backward()
    assert relative_error(ours, theirs) < 1e-12 and relative_error(a.grad, b.grad) < 1e-10
    with pytest.raises(AssertionError):
        compat.RegularFaceRegularizer(distance=LpDistance())
    with pytest.raises(ValueError, match="at least 2 classes"):
        compat.RegularFaceRegularizer()(weight[:1])


def recorded(module):
    names = [*getattr(module, "_record_these", ()), *getattr(module, "_record_these_stats", ())]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("name", LOSSES)
def test_recorded_statistics(name):
    options = {"collect_stats": True, "reducer": lambda: reducers.ThresholdReducer(5.0, 1e3, collect_stats=True)}
    distance = CosineSimilarity if name in MARGIN_LOSSES else DotProductSimilarity
    ours, theirs = pair(name, distance=lambda: distance(collect_stats=True), **options)
    x, y = batch()
    for samples in (x, 3 * x[:20]):  # statistics of the last batch
        ours(samples, y[: len(samples)])
        theirs(samples, y[: len(samples)])
        for a, b in ((ours, theirs), (ours.distance, theirs.distance), (ours.reducer, theirs.reducer)):
            assert recorded(a) == pytest.approx(recorded(b), rel=1e-12)
    assert ours.distance.initial_avg_query_norm > 0 and ours.reducer.num_past_filter > 0
    if name in MARGIN_LOSSES:
        assert 0 < ours.avg_angle < 180
    regularizer = compat.RegularFaceRegularizer(distance=CosineSimilarity(collect_stats=True))
    regularizer(2 * nn.functional.normalize(x))
    assert regularizer.distance.initial_avg_ref_norm == pytest.approx(2)
    assert regularizer.distance.final_avg_ref_norm == pytest.approx(1)


@pytest.mark.parametrize("name", LOSSES)
def test_logits(name):
    ours, theirs = pair(name)
    x, _ = batch()
    torch.testing.assert_close(ours.get_logits(x), theirs.get_logits(x))
    assert ours.float().get_logits(x.half()).dtype == torch.float32


def test_outliers(monkeypatch):
    monkeypatch.setattr(compat, "ROWS", 10)
    ours, theirs = pair("SubCenterArcFaceLoss")
    x, y = batch()
    y = y % 7
    y[4] = -1  # skipped
    for threshold in (40, 75, 90):
        measured, expected = (fn.get_outliers(x, y, threshold, False) for fn in (ours, theirs))
        assert torch.equal(measured[0], expected[0])
        assert torch.equal(measured[1][:, :7], expected[1][:, :7])
        assert not measured[1][:, 7:].any()  # theirs is uninitialized memory
    assert ours.get_outliers(x, y, 0)[0].numel() == SAMPLES - 1
    none, centers = ours.float().get_outliers(x.half(), y, 180)
    assert none.dtype == torch.int64 and len(none) == 0 and centers.dtype == torch.float16


@pytest.mark.parametrize("name", LOSSES)
def test_weights_keep_their_dtype(name):
    """Weights keep their dtype for embeddings of any dtype, unlike theirs. Half inputs are computed in float32."""
    x, y = batch()
    for embeddings_dtype, weight_dtype in (
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        ours, theirs = pair(name, dtype=weight_dtype)
        theirs = theirs.double()
        samples = x.to(embeddings_dtype)
        measured, expected = outcome(ours, samples, y), outcome(theirs, samples.double(), y)
        assert ours.W.dtype == weight_dtype and measured[1].dtype == embeddings_dtype
        wide = torch.float64 in (embeddings_dtype, weight_dtype)
        assert measured[0].dtype == (torch.float64 if wide else torch.float32)
        for m, e in zip(measured, expected, strict=True):
            assert relative_error(m, e) < 2 * torch.finfo(m.dtype).eps + 2e-5
    ours, theirs = pair(name, dtype=torch.float32)
    theirs(x, y)
    assert theirs.W.dtype == torch.float64


def test_autocast():
    ours, theirs = pair("ArcFaceLoss", dtype=torch.float32, weight_regularizer=lambda: compat.RegularFaceRegularizer())
    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = ours(x.float(), y)
    assert measured.item() == pytest.approx(theirs(x.float(), y).item(), rel=0.02)


@pytest.mark.parametrize("name", LOSSES)
def test_errors(name):
    x, y = batch()
    for loss_fn in pair(name):
        with pytest.raises(ValueError, match="labels are required"):
            loss_fn(x)
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            loss_fn(x, y, ref_emb=x.clone(), ref_labels=y)
        with pytest.raises(ValueError, match="must equal number of labels"):
            loss_fn(x[1:], y)
        with pytest.raises(ValueError, match="1D tensor"):
            loss_fn(x, y.unsqueeze(1))
        with pytest.raises(ValueError):
            loss_fn(x.unsqueeze(2), y)
        with pytest.raises((ValueError, IndexError)):
            loss_fn(x, y + CLASSES)
    if name in MARGIN_LOSSES:
        with pytest.raises(AssertionError, match=f"{name} requires the distance metric to be CosineSimilarity"):
            getattr(compat, name)(num_classes=CLASSES, embedding_size=SIZE, distance=LpDistance())
