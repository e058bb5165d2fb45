"""The drop-ins in use: fallbacks to pytorch-metric-learning, fixed edge cases, wrappers, trainers, devices."""

import math
import os
import subprocess
import sys

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from pml_pairs import CLASSES, LOSSES, MARGIN_LOSSES, SAMPLES, SIZE, assert_same, batch, outcome, pair
from pytorch_metric_learning import losses, miners, regularizers, trainers
from pytorch_metric_learning.distances import CosineSimilarity, DotProductSimilarity, LpDistance
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from torch import nn

import fused_margin as fm
from fused_margin.compat import pytorch_metric_learning as compat


class Squared(CosineSimilarity):
    def compute_mat(self, query_emb, ref_emb):
        return super().compute_mat(query_emb, ref_emb) ** 2


@pytest.mark.parametrize(
    ("name", "distance"),
    [
        *((name, distance) for name in MARGIN_LOSSES for distance in (Squared(), CosineSimilarity(p=1))),
        ("NormalizedSoftmaxLoss", LpDistance()),
        ("NormalizedSoftmaxLoss", Squared()),
        ("NormalizedSoftmaxLoss", DotProductSimilarity(power=2)),
    ],
)
def test_other_distances_use_their_implementation(name, distance):
    ours, theirs = pair(name, distance=distance, weight_regularizer=regularizers.LpRegularizer())
    x, y = batch()
    for indices_tuple in (None, miners.MultiSimilarityMiner()(x, y % 9)):
        assert_same(ours, theirs, x, y, indices_tuple, tolerance=1e-12)
    ours.float()(x.bfloat16(), y).backward()
    assert ours.W.dtype == torch.float32 and ours.W.grad.isfinite().all()


def test_overridden_methods_are_used():
    """A margin, scale or logits method of a subclass is called."""

    def margin(self, cosine):
        return cosine - 0.1 * cosine.abs()

    def scale(self, logits, *_):
        return logits * 3

    for name, step, function in (
        ("ArcFaceLoss", "modify_cosine_of_target_classes", margin),
        ("SubCenterArcFaceLoss", "scale_logits", scale),
        ("NormalizedSoftmaxLoss", "get_logits", lambda self, x: x @ self.W),
    ):
        ours, theirs = pair(name)
        for loss_fn in (ours, theirs):
            loss_fn.__class__ = type(name, (type(loss_fn),), {step: function})
        assert_same(ours, theirs, *batch(), tolerance=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_another_cross_entropy(name, monkeypatch):
    weight = torch.linspace(0.1, 2, CLASSES, dtype=torch.float64)
    x, y = batch()
    for cross_entropy in (
        nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        nn.MultiMarginLoss(reduction="none"),
        nn.CrossEntropyLoss(reduction="none", weight=weight),
    ):
        ours, theirs = pair(name)
        ours.cross_entropy = theirs.cross_entropy = cross_entropy
        assert_same(ours, theirs, x, y)
    monkeypatch.setattr(DotProductSimilarity, "compute_mat", None)
    ours(x, y)  # class weights, which the kernels support


def test_dynamic_margin_and_scale():
    """The attributes are read at every call; the margin may be per sample, and the scale learned."""
    x, y = batch()
    margins = torch.linspace(0.1, 0.6, SAMPLES, dtype=torch.float64)
    for name, margin, scale in (("ArcFaceLoss", math.radians(10), 5), ("CosFaceLoss", margins, 7.0)):
        ours, theirs = pair(name)
        for loss_fn in (ours, theirs):
            loss_fn.margin, loss_fn.scale = margin, nn.Parameter(torch.tensor(scale, dtype=torch.float64))
        assert_same(ours, theirs, x, y)
        torch.testing.assert_close(ours.scale.grad, theirs.scale.grad)


@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_gradients_at_the_poles_are_finite(name):
    """Embeddings parallel and opposite to their class; theirs gives NaN for ArcFace."""
    ours, theirs = pair(name, dtype=torch.float32)
    centers = torch.eye(SIZE).repeat(1, ours.W.shape[1] // SIZE + 1)[:, : ours.W.shape[1]]
    for loss_fn in (ours, theirs):
        loss_fn.load_state_dict({"W": centers})
    y = torch.arange(4)
    x = centers.t()[y * ours.sub_centers] * torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])
    for result in outcome(ours, x, y):
        assert result.isfinite().all()
    if "ArcFace" in name:
        assert outcome(theirs, x, y)[1].isnan().any()


@pytest.mark.parametrize("name", LOSSES)
def test_zero_class_row_has_no_gradient(name):
    """Theirs has a gradient of 1e9 or more, except for losses that do not normalize."""
    ours, theirs = pair(name, dtype=torch.float32)
    x, y = batch()
    with torch.no_grad():
        for loss_fn in (ours, theirs):
            loss_fn.W[:, y[0] * getattr(loss_fn, "sub_centers", 1)] = 0
    zero = ours.W.norm(dim=0) == 0
    measured, expected = outcome(ours, x.float(), y)[2][:, zero], outcome(theirs, x.float(), y)[2][:, zero]
    if name == "LargeMarginSoftmaxLoss":
        assert measured.isfinite().all()
    else:
        assert not measured.any() and not expected.abs().max() < 1e6
    regularizer, weight = compat.RegularFaceRegularizer(), leaf(ours.W.t())
    regularizer(weight).backward()
    assert not weight.grad[zero].any() and weight.grad.abs().max() < 1


NATIVE = {
    "ArcFaceLoss": lambda **kw: fm.ArcFaceLoss(margin=math.radians(28.6), beyond_pi="linear", **kw),
    "CosFaceLoss": fm.CosFaceLoss,
    "LargeMarginSoftmaxLoss": lambda **kw: fm.LSoftmaxLoss(annealing=False, **kw),
    "NormalizedSoftmaxLoss": lambda **kw: fm.NormFaceLoss(scale=1 / 0.05, **kw),
    "SphereFaceLoss": lambda **kw: fm.SphereFaceLoss(annealing=False, **kw),
    "SubCenterArcFaceLoss": lambda **kw: fm.SubCenterArcFaceLoss(margin=math.radians(28.6), beyond_pi="linear", **kw),
}


@pytest.mark.parametrize("name", LOSSES)
def test_native_equivalents(name):
    """The table of docs/migrate/pytorch-metric-learning.md."""
    _, theirs = pair(name)
    native = NATIVE[name](num_classes=CLASSES, embedding_size=SIZE, dtype=torch.float64)
    native.load_state_dict({"weight": theirs.state_dict()["W"].t()})
    torch.testing.assert_close(native(*batch()), theirs(*batch()))


def test_wrappers():
    ours, theirs = pair("CosFaceLoss")
    x, y = batch()
    with pytest.warns(UserWarning, match="non-distributed"):
        torch.testing.assert_close(DistributedLossWrapper(ours)(x, y), theirs(x, y))
    triplet, miner = losses.TripletMarginLoss(), miners.MultiSimilarityMiner()
    combined = [
        losses.MultipleLosses([fn, triplet], miners=[miner, None], weights=[1, 0.5])(x, y % 9) for fn in (ours, theirs)
    ]
    torch.testing.assert_close(*combined)
    for wrapper in (lambda fn: losses.CrossBatchMemory(fn, SIZE), losses.SelfSupervisedLoss):
        for loss_fn in (ours, theirs):
            with pytest.raises(Exception, match="not supported for CosFaceLoss"):
                wrapper(loss_fn)


def test_trainer():
    """Their trainer gives the same weights with our loss as with theirs."""
    x, _, y = problem(24, CLASSES, 10, spread=1.0)
    dataset = torch.utils.data.TensorDataset(x.float(), y)
    results = []
    for loss_fn in pair("ArcFaceLoss", dtype=torch.float32):
        torch.manual_seed(3)
        trunk = nn.Linear(10, SIZE)
        optimizers = {
            "trunk_optimizer": torch.optim.SGD(trunk.parameters(), lr=0.1),
            "metric_loss_optimizer": torch.optim.SGD(loss_fn.parameters(), lr=0.1),
        }
        trainers.MetricLossOnly(
            models={"trunk": trunk},
            optimizers=optimizers,
            batch_size=8,
            loss_funcs={"metric_loss": loss_fn},
            dataset=dataset,
            data_device=torch.device("cpu"),
            dataloader_num_workers=0,
        ).train(num_epochs=2)
        results.append((trunk.weight.detach(), loss_fn.W.detach()))
    for measured, expected in zip(*results, strict=True):
        torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-4)


def test_import_without_pytorch_metric_learning():
    """The package does not need pytorch-metric-learning; the error of the module that does says how to install it."""
    code = """if True:
        import sys, fused_margin
        assert "pytorch_metric_learning" not in sys.modules
        sys.modules["pytorch_metric_learning"] = None
        import fused_margin.compat.pytorch_metric_learning
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: fused_margin.compat.pytorch_metric_learning needs" in result.stderr
    assert "pip install pytorch-metric-learning" in result.stderr


@pytest.mark.cuda
@pytest.mark.skipif(not fm.build_info()["cuda"]["available"], reason="needs a CUDA device and a CUDA build")
@pytest.mark.parametrize("name", LOSSES)
def test_weights_follow_the_embeddings_to_their_device(name):
    ours, theirs = pair(name, weight_regularizer=lambda: compat.RegularFaceRegularizer())
    x, y = batch()
    parameter, labels = ours.W, y  # created on the CPU
    for measured, expected in zip(outcome(ours, x.cuda(), labels), outcome(theirs, x, y), strict=True):
        assert measured.is_cuda and relative_error(measured.cpu(), expected) < 1e-10
    assert ours.W is parameter and parameter.is_cuda


THEIR_TESTS = os.environ.get("PYTORCH_METRIC_LEARNING_REPOSITORY")
REPLACE = """
import sys, unittest, torch
from pytorch_metric_learning import losses, regularizers
from fused_margin.compat import pytorch_metric_learning as compat
torch.set_default_dtype(getattr(torch, sys.argv[1]))  # theirs expect W to take over the embeddings' dtype
for name in compat.__all__:
    setattr(regularizers if name.endswith("Regularizer") else losses, name, getattr(compat, name))
unittest.main(None, argv=["", *sys.argv[2:]])
"""


@pytest.mark.skipif(not THEIR_TESTS, reason="PYTORCH_METRIC_LEARNING_REPOSITORY: a checkout of pytorch-metric-learning")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "test",
    [
        "losses.test_arcface_loss",
        "losses.test_cosface_loss",
        "losses.test_large_margin_softmax_loss",
        "losses.test_normalized_softmax_loss",
        # without its test of get_outliers, which also fails for theirs: its centers are not normalized
        "losses.test_subcenter_arcface_loss.TestSubCenterArcFaceLoss.test_subcenter_arcface_loss",
        "regularizers.test_center_invariant_regularizer",
        "regularizers.test_regular_face_regularizer",
    ],
)
def test_their_own_tests(test, dtype):
    environment = {**os.environ, "TEST_DEVICE": "cpu", "TEST_DTYPES": dtype}
    command = [sys.executable, "-c", REPLACE, dtype, f"tests.{test}"]
    result = subprocess.run(command, cwd=THEIR_TESTS, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
