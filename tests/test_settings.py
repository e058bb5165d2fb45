"""Constructor arguments set as attributes between steps: effect, checks, copies, and torch.compile."""

import copy
import io
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from loss_inputs import leaf, problem
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
from fused_margin.compat import insightface
from fused_margin.compat.insightface import PartialFC_V2

# module, argument, value, which is not the default
CHANGES = [
    (fm.ArcFaceLoss, "margin", 0.1),
    (fm.ArcFaceLoss, "margin", np.float32(0.1)),
    (fm.SubCenterArcFaceLoss, "margin", 0.1),
    (fm.CosFaceLoss, "margin", 0.1),
    (fm.CombinedMarginLoss, "m1", 0.9),
    (fm.CombinedMarginLoss, "m2", 0.1),
    (fm.CombinedMarginLoss, "m3", 0.1),
    (fm.SphereFaceLoss, "margin", 1.5),
    (fm.SphereFaceLoss, "annealing", False),
    (fm.SphereFaceLoss, "scale", 16.0),
    (fm.LSoftmaxLoss, "margin", 1.5),
    (fm.LSoftmaxLoss, "annealing", False),
    (fm.AdaFaceLoss, "margin", 0.1),
    (fm.AdaFaceLoss, "concentration", 0.1),
    (fm.MagFaceLoss, "margins", (0.1, 0.2)),
    (fm.MagFaceLoss, "norms", (1.0, 20.0)),
    (fm.MagFaceLoss, "norm_weight", 1.0),
    (fm.ElasticFaceLoss, "margin", 0.1),
    (fm.ElasticFaceLoss, "kind", "cos"),
    (fm.CurricularFaceLoss, "margin", 0.1),
    (fm.ArcFaceLoss, "scale", 16.0),
    (fm.ArcFaceLoss, "scale", None),
    (fm.ArcFaceLoss, "easy", True),
    (partial(fm.ArcFaceLoss, margin=3.0), "beyond_pi", "linear"),
    (fm.ArcFaceLoss, "label_smoothing", 0.2),
    (fm.ArcFaceLoss, "exclusive_weight", 0.5),
    (fm.ArcFaceLoss, "reduction", "sum"),
    (fm.ArcFaceLoss, "ignore_index", 3),
    (fm.SoftmaxLoss, "exclusive_weight", 0.5),
    (fm.SoftmaxLoss, "label_smoothing", 0.2),
]


def inputs():
    x, _, y = problem(40, 30, 8, spread=1.0)
    y[5] = 3
    return x, y


def twins(module, *others):
    """The same weights with other arguments."""
    made = [module(30, 8, dtype=torch.float64, **options) for options in others]
    with torch.no_grad():
        for loss_fn in made[1:]:
            loss_fn.weight.copy_(made[0].weight)
    return made


@pytest.mark.parametrize(("module", "name", "value"), CHANGES)
def test_setting_is_constructing(module, name, value):
    """The loss and the printed form equal those of a module constructed with the value."""
    x, y = inputs()
    changed, constructed = twins(module, {}, {name: value})
    for loss_fn in (changed, constructed):
        loss_fn.eval()  # draws nothing
    before = changed(x, y)
    setattr(changed, name, value)
    assert getattr(changed, name) == value
    assert torch.equal(changed(x, y), constructed(x, y)) and not torch.equal(changed(x, y), before)
    assert repr(changed) == repr(constructed)


def test_training_arguments():
    """Those that evaluation does not read."""
    x, y = inputs()
    elastic, constructed = twins(fm.ElasticFaceLoss, {}, {"std": 0.5, "by_difficulty": True})
    elastic.std, elastic.by_difficulty = 0.5, True
    losses = []
    for loss_fn in (elastic, constructed):
        torch.manual_seed(0)
        losses.append(loss_fn(x, y))
    assert torch.equal(*losses)
    for module, buffer in ((fm.AdaFaceLoss, "norm_mean"), (fm.CurricularFaceLoss, "t")):
        changed, constructed = twins(module, {}, {"momentum": 0.5})
        changed.momentum = 0.5
        assert torch.equal(changed(x, y), constructed(x, y))
        assert torch.equal(getattr(changed, buffer), getattr(constructed, buffer))
    for loss_fn in (fm.ArcFaceLoss(30, 8, dtype=torch.float64), fm.SphereFaceLoss(30, 8, dtype=torch.float64)):
        loss_fn.gradient = "straight_through"
        exact, through = (leaf(x) for _ in range(2))
        loss_fn(through, y).backward()
        loss_fn.gradient = "exact"
        loss_fn(exact, y).backward()
        assert not torch.equal(exact.grad, through.grad)


INVALID = [
    (fm.CurricularFaceLoss, "label_smoothing", 0.1, ValueError),
    (fm.CurricularFaceLoss, "scale", None, TypeError),
    (fm.ArcFaceLoss, "margin", float("nan"), ValueError),
    (fm.ArcFaceLoss, "margin", "0.1", TypeError),
    (fm.CombinedMarginLoss, "m1", -1.0, ValueError),
    (fm.SphereFaceLoss, "margin", 0.5, ValueError),
    (fm.LSoftmaxLoss, "margin", 0.5, ValueError),
    (fm.LSoftmaxLoss, "label_smoothing", 0.1, ValueError),
    (fm.AdaFaceLoss, "margin", -0.1, ValueError),
    (fm.AdaFaceLoss, "momentum", 2.0, ValueError),
    (fm.MagFaceLoss, "margins", (0.8, 0.4), ValueError),
    (fm.MagFaceLoss, "margins", 0.4, TypeError),
    (fm.ElasticFaceLoss, "kind", "sine", ValueError),
    (fm.L2SoftmaxLoss, "alpha", 0.0, ValueError),
    (fm.ArcFaceLoss, "scale", -1.0, ValueError),
    (fm.ArcFaceLoss, "scale", torch.ones(3), ValueError),
    (fm.ArcFaceLoss, "beyond_pi", "wrap", ValueError),
    (fm.ArcFaceLoss, "gradient", "wrong", ValueError),
    (fm.ArcFaceLoss, "label_smoothing", 1.5, ValueError),
    (fm.ArcFaceLoss, "reduction", "avg", ValueError),
    (fm.ArcFaceLoss, "ignore_index", 0.5, TypeError),
    (fm.ArcFaceLoss, "workspace_mb", 0, ValueError),
    (fm.ArcFaceLoss, "sample_rate", 0.0, ValueError),
    (fm.ArcFaceLoss, "exclusive_weight", -1.0, ValueError),
    (fm.ArcFaceLoss, "exclusive_refresh", "never", ValueError),
    (fm.SubCenterArcFaceLoss, "exclusive_weight", 0.1, ValueError),
    (fm.SubCenterArcFaceLoss, "label_smoothing", 0.1, ValueError),
    (partial(fm.ArcFaceLoss, sample_rate=0.5), "label_smoothing", 0.1, ValueError),
    (partial(fm.SoftmaxLoss, sample_rate=0.5), "label_smoothing", 0.1, ValueError),
    (partial(fm.ArcFaceLoss, label_smoothing=0.1), "sample_rate", 0.5, ValueError),
    (fm.ArcFaceLoss, "class_weight", torch.ones(29), ValueError),
    (fm.ArcFaceLoss, "class_weight", torch.ones(30, dtype=torch.int64), TypeError),
    (fm.SoftmaxLoss, "class_weight", [1.0] * 31, ValueError),
    *((fm.ArcFaceLoss, "easy", value, TypeError) for value in ("no", 2, 1.0, None)),
    (fm.SphereFaceLoss, "annealing", "no", TypeError),
    (fm.ElasticFaceLoss, "by_difficulty", "no", TypeError),
    (fm.SoftmaxLoss, "sparse", "no", TypeError),
]


@pytest.mark.parametrize(("module", "name", "value", "error"), INVALID)
def test_invalid_values_change_nothing(module, name, value, error):
    x, y = inputs()
    loss_fn = module(30, 8, dtype=torch.float64).eval()
    before, text = loss_fn(x, y), repr(loss_fn)
    with pytest.raises(error, match=name):
        setattr(loss_fn, name, value)
    with pytest.raises(error, match=name):
        module(30, 8, **{name: value})
    assert torch.equal(loss_fn(x, y), before) and repr(loss_fn) == text


def test_options_that_exclude_each_other():
    loss_fn = fm.ArcFaceLoss(30, 8, exclusive_weight=0.5)
    with pytest.raises(ValueError, match="exclusive_weight: expected 0 with reduction='none'"):
        loss_fn.reduction = "none"
    assert loss_fn.reduction == "mean"
    for name in ("num_classes", "embedding_size", "sub_centers", "process_group", "device", "dtype"):
        before = getattr(loss_fn, name)
        with pytest.raises(AttributeError, match=f"{name}: cannot be changed"):
            setattr(loss_fn, name, 4)
        assert getattr(loss_fn, name) == before


@pytest.mark.parametrize("value", [True, 1, np.bool_(True), np.int64(1)], ids=repr)
def test_switches(value):
    loss_fn = fm.ArcFaceLoss(30, 8, easy=value, sparse=value)
    assert loss_fn.easy is True and loss_fn.sparse is True
    loss_fn.easy = type(value)(0)
    assert loss_fn.easy is False


def test_class_weight_is_taken_as_in_the_constructor():
    """A list becomes a buffer on the device of the loss, and None leaves it out."""
    x, y = inputs()
    values = torch.linspace(0.5, 2.0, 30).tolist()
    changed, constructed = twins(fm.ArcFaceLoss, {}, {"class_weight": values})
    before = changed(x, y)
    changed.class_weight = values
    assert torch.equal(changed.state_dict()["class_weight"], torch.tensor(values))
    assert torch.equal(changed(x, y), constructed(x, y))
    changed.class_weight = None
    assert torch.equal(changed(x, y), before)


def test_state_dict_copy_and_pickle():
    """Keys stay as they are, and copies have the current values."""
    x, y = inputs()
    loss_fn = fm.ArcFaceLoss(30, 8, dtype=torch.float64)
    keys = loss_fn.state_dict().keys()
    loss_fn.margin, loss_fn.scale, loss_fn.easy = 0.1, 20.0, True
    assert loss_fn.state_dict().keys() == keys
    file = io.BytesIO()
    torch.save(loss_fn, file)
    file.seek(0)
    copies = copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn)), torch.load(file, weights_only=False)
    for other in copies:
        assert torch.equal(other(x, y), loss_fn(x, y)) and repr(other) == repr(loss_fn)
        other.margin = 0.3
        assert loss_fn.margin == 0.1 and not torch.equal(other(x, y), loss_fn(x, y))


def test_margin_function_is_the_attributes():
    loss_fn = fm.ArcFaceLoss(30, 8, easy=True)
    loss_fn.margin = 0.1
    assert loss_fn.margin_function == fm.Margin(m2=0.1, easy=True)
    loss_fn.margin_function = fm.Margin(m2=0.2, beyond_pi="none")
    assert (loss_fn.margin, loss_fn.beyond_pi, loss_fn.easy) == (0.2, "none", False)
    with pytest.raises(ValueError, match="margin_function: expected m3=0 in ArcFaceLoss, got 0.1"):
        loss_fn.margin_function = fm.Margin(m3=0.1)
    own = fm.MarginLoss(30, 8, {"m3": 0.1}, 64.0)  # as a subclass outside the package calls it
    own.margin_function = fm.Margin(m3=0.2)
    assert own.margin_function == fm.Margin(m3=0.2)
    l_softmax = fm.LSoftmaxLoss(30, 8)
    l_softmax.margin_function = fm.Margin(m1=2.0)
    assert l_softmax.margin == 2.0
    with pytest.raises(ValueError, match="margin_function: expected m1 alone"):
        l_softmax.margin_function = fm.Margin(m1=2.0, m2=0.1)


@pytest.mark.parametrize("learned", [False, True])
def test_number_fills_a_tensor(learned):
    """A scale in the state dict stays there, a learned one is learned further."""
    x, y = inputs()
    scale = nn.Parameter(torch.tensor(20.0)) if learned else torch.tensor(20.0)
    loss_fn, number = twins(fm.ArcFaceLoss, {"scale": scale}, {"scale": 30.0})
    kept = loss_fn.scale
    loss_fn.scale = 30.0
    assert loss_fn.scale is kept and loss_fn.state_dict()["scale"] == 30.0
    assert list(dict(loss_fn.named_parameters())) == ["weight", "scale"][: 1 + learned]
    torch.testing.assert_close(loss_fn(x, y), number(x, y))
    number.scale = torch.tensor(30.0)  # from a number to a tensor, as in the constructor
    assert number.state_dict()["scale"] == 30.0
    alpha = fm.L2SoftmaxLoss(30, 8)
    alpha.alpha = 4.0
    assert isinstance(alpha.alpha, nn.Parameter) and alpha.alpha == 4.0


def test_alpha_none_is_learned():
    """From its lower bound on, as in the constructor."""
    constructed, fixed = fm.L2SoftmaxLoss(300, 8), fm.L2SoftmaxLoss(300, 8, alpha=8.0)
    fixed.alpha = None
    assert isinstance(fixed.alpha, nn.Parameter) and torch.equal(fixed.alpha, constructed.alpha)
    assert repr(fixed) == repr(constructed)
    kept = fixed.alpha
    fixed.alpha = 9.0
    fixed.alpha = None
    assert fixed.alpha is kept and torch.equal(kept, constructed.alpha)


@pytest.mark.parametrize("module", [fm.ArcFaceLoss, fm.SoftmaxLoss])
@pytest.mark.parametrize("refresh", ["certified", 2])
def test_exclusive_term_switched_on_later(module, refresh):
    """As one that is there from the start, with what it keeps; switched off, nothing is looked for."""
    x, y = inputs()
    changed, constructed = twins(
        module, {"exclusive_refresh": refresh}, {"exclusive_refresh": refresh, "exclusive_weight": 0.5}
    )
    assert changed.exclusive is None
    changed.exclusive_weight = 0.5
    assert changed.state_dict().keys() == constructed.state_dict().keys()
    assert torch.equal(changed(x, y), constructed(x, y))
    changed.workspace_mb = 1.0
    assert changed.exclusive.workspace_mb == 1.0
    changed.exclusive_refresh = "every_step"
    assert changed.exclusive is None and torch.equal(changed(x, y), constructed(x, y))
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    regularizer.refresh = 3
    assert set(dict(regularizer.named_buffers(remove_duplicate=False))) <= {"index", "age"}
    torch.testing.assert_close(
        regularizer(constructed.weight), fm.functional.exclusive_regularization(constructed.weight)
    )


def test_workspace_and_sample_rate():
    x, y = inputs()
    loss_fn = fm.ArcFaceLoss(30, 8, dtype=torch.float64)
    whole = loss_fn(x[:4], y[:4])
    loss_fn.workspace_mb = 1e-6
    torch.testing.assert_close(loss_fn(x[:4], y[:4]), whole)
    loss_fn.sample_rate = 0.2
    sampled = loss_fn(x[:4], y[:4])
    assert sampled < whole  # a sum over fewer classes
    loss_fn.sparse = True
    loss_fn(x[:4], y[:4]).backward()
    assert loss_fn.weight.grad.is_sparse and loss_fn.weight.grad._nnz() == 6
    loss_fn.sample_rate = 1.0
    torch.testing.assert_close(loss_fn(x[:4], y[:4]), whole)


def test_companions():
    x, y = inputs()
    center = fm.CenterLoss(30, 8)
    center.alpha, center.reduction = 0.0, "sum"
    torch.testing.assert_close(center(x, y), x.square().sum() / 2)
    assert not center.centers.any()
    with pytest.raises(ValueError, match="alpha: expected a number"):
        center.alpha = 2.0
    with pytest.raises(ValueError, match="workspace_mb"):
        fm.UniformLoss().workspace_mb = 0
    assert center.alpha == 0.0


def test_insightface():
    """The drop-ins check what they are told too, and a changed sample_rate draws other classes."""
    x, y = inputs()
    fc = PartialFC_V2(insightface.ArcFace(8.0), 8, 30).double()
    whole = fc(x[:4], y[:4])
    fc.margin_softmax.margin = 0.1
    assert not torch.equal(fc(x[:4], y[:4]), whole)
    with pytest.raises(ValueError, match="margin: expected a number"):
        fc.margin_softmax.margin = float("inf")
    fc.margin_softmax.margin = 0.5
    fc.sample_rate = 0.2
    assert fc.num_sample == 6 and fc(x[:4], y[:4]) < whole
    with pytest.raises(ValueError, match="sample_rate: expected a number"):
        fc.sample_rate = 2.0
    fc.sample_rate = 1.0
    assert fc.num_sample == 30 and torch.equal(fc(x[:4], y[:4]), whole)


def test_insightface_refuses_what_has_no_effect():
    x, y = inputs()
    fc = PartialFC_V2(insightface.ArcFace(8.0), 8, 30).double()
    whole = fc(x, y)
    for name in ("num_classes", "rank", "world_size", "class_start", "num_local", "num_sample", "process_group"):
        with pytest.raises(AttributeError, match=f"{name}: cannot be changed"):
            setattr(fc, name, 2)
    with pytest.raises(TypeError, match="margin_softmax: expected CombinedMarginLoss.*got torch.nn.*Identity"):
        fc.margin_softmax = nn.Identity()
    for name in ("fp16", "sparse"):
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'no'"):
            setattr(fc, name, "no")
    assert torch.equal(fc(x, y), whole)
    fc.margin_softmax = insightface.CosFace(8.0)
    assert not torch.equal(fc(x, y), whole)


DEGREES = {
    "arcface": lambda m: fm.ArcFaceLoss(30, 8, margin=m),
    "sub-center": lambda m: fm.SubCenterArcFaceLoss(30, 8, margin=m),
    "combined": lambda m: fm.CombinedMarginLoss(30, 8, m2=m),
    "adaface": lambda m: fm.AdaFaceLoss(30, 8, margin=m),
    "magface": lambda m: fm.MagFaceLoss(30, 8, margins=(0.1, m)),
    "elasticface": lambda m: fm.ElasticFaceLoss(30, 8, margin=m),
    "curricularface": lambda m: fm.CurricularFaceLoss(30, 8, margin=m),
    "insightface": lambda m: insightface.ArcFace(margin=m),
    "insightface combined": lambda m: insightface.CombinedMarginLoss(64.0, 1.0, m, 0.0),
}


@pytest.mark.parametrize("name", DEGREES)
def test_degrees_warn(name):
    """In the constructor and when set, with the line that did it; not for radians."""
    with pytest.warns(UserWarning, match=r"28.6 is an angle above pi.*28\.6 degrees are 0\.4992 radians") as caught:
        DEGREES[name](28.6)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn = DEGREES[name](3.0)
    attribute = next(a for a in ("margin", "m2", "margins") if hasattr(loss_fn, a))
    with pytest.warns(UserWarning, match="28.6 is an angle above pi") as caught:
        setattr(loss_fn, attribute, (0.1, 28.6) if attribute == "margins" else 28.6)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_degrees_in_a_margin_warn():
    with pytest.warns(UserWarning, match="m2 28.6 is an angle above pi") as caught:
        margin = fm.Margin(m2=28.6)
    assert len(caught) == 1 and caught[0].filename == __file__
    x, y = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.functional.margin_cross_entropy(x, torch.randn(30, 8, dtype=torch.float64), y, margin)
        fm.Margin(m2=3.1, m3=4.0)


def test_degrees_in_a_margin_function_warn():
    """With the line that set it, which torch.nn.Module calls."""
    loss_fn = fm.ArcFaceLoss(30, 8)
    with pytest.warns(UserWarning):
        margin = fm.Margin(m2=28.6)
    with pytest.warns(UserWarning, match="margin 28.6 is an angle above pi") as caught:
        loss_fn.margin_function = margin
    assert len(caught) == 1 and caught[0].filename == __file__


def test_numbers_that_are_no_angles_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.SphereFaceLoss(30, 8, margin=4)
        fm.CosFaceLoss(30, 8, margin=3.5)
        fm.ElasticFaceLoss(30, 8, margin=3.5, kind="cos")


def test_small_scale_warns_when_set():
    loss_fn = fm.ArcFaceLoss(1001, 8)
    with pytest.warns(UserWarning, match=r"scale 9 is below 9\.10") as caught:
        loss_fn.scale = 9
    assert caught[0].filename == __file__


def insightface_loss(classes, size):
    return PartialFC_V2(insightface.ArcFace(8.0, 0.3), size, classes)


def insightface_combined(classes, size):
    return PartialFC_V2(insightface.CombinedMarginLoss(8.0, 1.0, 0.0, 0.1, 0.5), size, classes)


VARIABLES = {
    "arcface": (fm.ArcFaceLoss, "margin", 0.2),
    "cosface": (fm.CosFaceLoss, "margin", 0.2),
    "sub-center": (fm.SubCenterArcFaceLoss, "margin", 0.2),
    "m1": (fm.CombinedMarginLoss, "m1", 0.8),
    "sphereface": (fm.SphereFaceLoss, "margin", 1.2),
    "l-softmax": (fm.LSoftmaxLoss, "margin", 1.2),
    "adaface": (fm.AdaFaceLoss, "margin", 0.2),
    "concentration": (fm.AdaFaceLoss, "concentration", 0.2),
    "momentum": (fm.AdaFaceLoss, "momentum", 0.2),
    "magface": (fm.MagFaceLoss, "margins", 0.2),
    "norm weight": (fm.MagFaceLoss, "norm_weight", 2.0),
    "elasticface": (fm.ElasticFaceLoss, "margin", 0.2),
    "curricularface": (fm.CurricularFaceLoss, "margin", 0.2),
    "scale": (fm.ArcFaceLoss, "scale", 20.0),
    "scale, curricularface": (fm.CurricularFaceLoss, "scale", 20.0),
    "exclusive weight": (fm.ArcFaceLoss, "exclusive_weight", 0.2),
    "label smoothing": (fm.ArcFaceLoss, "label_smoothing", 0.1),
    "label smoothing, softmax": (fm.SoftmaxLoss, "label_smoothing", 0.1),
    "alpha": (lambda *sizes: fm.L2SoftmaxLoss(*sizes, alpha=8.0), "alpha", 9.0),
    "insightface, margin": (insightface_loss, "margin_softmax.margin", 0.2),
    "insightface, m1": (insightface_combined, "margin_softmax.m1", 0.8),
    "insightface, m3": (insightface_combined, "margin_softmax.m3", 0.2),
    "insightface, s": (insightface_loss, "margin_softmax.s", 20.0),
    "insightface, filter": (insightface_combined, "margin_softmax.interclass_filtering_threshold", 0.2),
}


BACKENDS = pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])


# Numbers that reach the same code as those of others: of "arcface", "adaface", "scale", or "m1" and "cosface".
ALIKE = ("sub-center", "concentration", "scale, curricularface", "insightface, m1", "insightface, m3")


@BACKENDS
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in VARIABLES])
def test_compiled_once_for_all_values(name, backend):
    """Twelve values, more than torch.compile compiles for, and two graphs: the first value's and that of all others."""
    module, attribute, value = VARIABLES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    x, _, y = problem(12, 30, 8, spread=1.0)
    eager = module(30, 8).eval() if module is fm.ElasticFaceLoss else module(30, 8)
    changed = copy.deepcopy(eager)
    compiled = torch.compile(changed, backend=counter, fullgraph=True)
    for step in range(12):
        now = value * (1 + 0.01 * step)
        results = []
        for function, loss_fn in ((eager, eager), (compiled, changed)):
            owner, _, name = attribute.rpartition(".")
            setattr(loss_fn.get_submodule(owner), name, (now, 2 * now) if name == "margins" else now)
            loss_fn.weight.grad, a = None, leaf(x.float())
            loss = function(a, y)
            loss.backward()
            results.append((loss.detach(), a.grad, loss_fn.weight.grad))
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 2


ZEROS = {
    "arcface": (fm.ArcFaceLoss, ("margin",), 2),
    "cosface": (fm.CosFaceLoss, ("margin",), 2),
    "combined": (fm.CombinedMarginLoss, ("m2", "m3"), 2),
    "adaface": (fm.AdaFaceLoss, ("margin", "momentum"), 2),
    "norm weight": (fm.MagFaceLoss, ("norm_weight",), 2),
    "curricularface": (fm.CurricularFaceLoss, ("margin", "momentum"), 2),
    # without label smoothing, or the exclusive term, another graph is computed
    "label smoothing": (fm.SoftmaxLoss, ("label_smoothing",), 3),
    "exclusive weight": (fm.ArcFaceLoss, ("exclusive_weight",), 3),
    "all": (fm.ArcFaceLoss, ("margin", "label_smoothing", "exclusive_weight"), 3),
}


@BACKENDS
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "cosface")) for name in ZEROS],
)
def test_compiled_schedules_through_zero(name, backend):
    """The second value is 0, as is a later one: torch.compile makes constants of numbers that are compared with 0."""
    module, attributes, graphs = ZEROS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    x, _, y = problem(12, 30, 8, spread=1.0)
    eager = module(30, 8)
    changed = copy.deepcopy(eager)
    compiled = torch.compile(changed, backend=counter, fullgraph=True)
    for value in (0.2, 0.0, *(0.01 * k for k in range(1, 9)), 0.0, 0.3):
        for loss_fn in (eager, changed):
            for attribute in attributes:
                setattr(loss_fn, attribute, value)
        torch.testing.assert_close(compiled(x.float(), y), eager(x.float(), y))
    assert counter.frame_count == graphs


@pytest.mark.parametrize("name", ["arcface", pytest.param("scale", marks=pytest.mark.slow)])
def test_inductor_compiles_once_too(name):
    module, attribute, value = VARIABLES[name]
    torch._dynamo.reset()
    x, _, y = problem(12, 30, 8, spread=1.0)
    loss_fn = module(30, 8)
    compiled = torch.compile(loss_fn, fullgraph=True)  # the ninth compilation would raise
    for step in range(10):
        setattr(loss_fn, attribute, value * (1 + 0.01 * step))
        torch.testing.assert_close(compiled(x.float(), y), loss_fn(x.float(), y))


def clip(parameters):
    nn.utils.clip_grad_norm_(parameters, 1e-3)
    torch.optim.SGD(parameters, 0.1).step()


USES = {
    "clip_grad_norm_": clip,
    "SGD with weight decay": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4).step(),
    "AdamW": lambda p: torch.optim.AdamW(p).step(),
    "ProjectedSGD": lambda p: fm.optim.ProjectedSGD(p, 0.1).step(),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("module", [fm.ArcFaceLoss, fm.SubCenterArcFaceLoss, fm.SoftmaxLoss])
def test_gradients_of_sampled_classes(module, use):
    """Dense unless asked for otherwise, with the sparse gradient's values; the step is the one of a dense parameter."""
    x, _, y = problem(6, 50, 8)
    loss_fn = module(
        50, 8, sample_rate=0.2, dtype=torch.float64, **({"bias": False} if module is fm.SoftmaxLoss else {})
    )
    gradients = []
    for sparse in (True, False):
        loss_fn.sparse, loss_fn.weight.grad = sparse, None
        torch.manual_seed(0)
        loss_fn(x, y).backward()
        gradients.append(loss_fn.weight.grad)
    assert gradients[0].is_sparse and gradients[1].layout == torch.strided
    assert torch.equal(gradients[0].to_dense(), gradients[1])
    plain = nn.Parameter(loss_fn.weight.detach().clone())
    plain.grad = gradients[1].clone()
    USES[use]([loss_fn.weight])
    USES[use]([plain])
    assert torch.equal(loss_fn.weight, plain)


def data_parallel(group, x, y, wrapped):
    """The gradient of one rank, and the weights after a step."""
    torch.manual_seed(0)
    loss_fn = fm.ArcFaceLoss(50, 8, sample_rate=0.2, dtype=torch.float64)
    called = DistributedDataParallel(loss_fn, process_group=group) if wrapped else loss_fn
    torch.manual_seed(1 + len(y))  # each rank draws its own classes
    called(x, y).backward()
    gradient = loss_fn.weight.grad.clone()
    torch.optim.SGD(loss_fn.parameters(), 0.1, weight_decay=5e-4).step()
    return gradient, loss_fn.weight.detach()


def test_data_parallel_with_sampled_classes(ranks):
    """DistributedDataParallel averages the ranks' dense gradients."""
    x, _, y = problem(10, 50, 8)
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    alone = ranks.run(data_parallel, [(*part, False) for part in parts])
    averaged = ranks.run(data_parallel, [(*part, True) for part in parts])
    for gradient, weight in averaged:
        torch.testing.assert_close(gradient, (alone[0][0] + alone[1][0]) / 2)
        assert torch.equal(weight, averaged[0][1])
