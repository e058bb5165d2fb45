"""Constructor arguments set as attributes between steps: effects, checks and copies."""

import copy
import io
import pickle
import typing
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from loss_inputs import leaf, problem
from mypy import api
from torch import nn

import fused_margin as fm
from fused_margin.compat import insightface
from fused_margin.compat.insightface import PartialFC_V2

# module, argument, and a value that is not the default
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


def with_equal_weights(module, *others):
    """Modules with equal weights and different arguments."""
    modules = [module(30, 8, dtype=torch.float64, **options) for options in others]
    with torch.no_grad():
        for loss_fn in modules[1:]:
            loss_fn.weight.copy_(modules[0].weight)
    return modules


@pytest.mark.parametrize(("module", "name", "value"), CHANGES)
def test_setting_matches_construction(module, name, value):
    """The loss and the repr equal those of a module constructed with the value."""
    x, y = inputs()
    changed, constructed = with_equal_weights(module, {}, {name: value})
    for loss_fn in (changed, constructed):
        loss_fn.eval()  # no random margins
    before = changed(x, y)
    setattr(changed, name, value)
    assert getattr(changed, name) == value
    assert torch.equal(changed(x, y), constructed(x, y)) and not torch.equal(changed(x, y), before)
    assert repr(changed) == repr(constructed)


def test_training_arguments():
    """Arguments that evaluation does not use."""
    x, y = inputs()
    elastic, constructed = with_equal_weights(fm.ElasticFaceLoss, {}, {"std": 0.5, "by_difficulty": True})
    elastic.std, elastic.by_difficulty = 0.5, True
    losses = []
    for loss_fn in (elastic, constructed):
        torch.manual_seed(0)
        losses.append(loss_fn(x, y))
    assert torch.equal(*losses)
    for module, buffer in ((fm.AdaFaceLoss, "norm_mean"), (fm.CurricularFaceLoss, "t")):
        changed, constructed = with_equal_weights(module, {}, {"momentum": 0.5})
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
    (fm.ArcFaceLoss, "scale", torch.tensor(64), TypeError),
    (fm.ArcFaceLoss, "margin", float("-inf"), ValueError),
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


def test_mutually_exclusive_options():
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
def test_boolean_options(value):
    loss_fn = fm.ArcFaceLoss(30, 8, easy=value, sparse=value)
    assert loss_fn.easy is True and loss_fn.sparse is True
    loss_fn.easy = type(value)(0)
    assert loss_fn.easy is False


def test_class_weight_is_converted_as_in_the_constructor():
    """A list becomes a buffer on the device of the loss, and None removes it."""
    x, y = inputs()
    values = torch.linspace(0.5, 2.0, 30).tolist()
    changed, constructed = with_equal_weights(fm.ArcFaceLoss, {}, {"class_weight": values})
    before = changed(x, y)
    changed.class_weight = values
    assert torch.equal(changed.state_dict()["class_weight"], torch.tensor(values))
    assert torch.equal(changed(x, y), constructed(x, y))
    changed.class_weight = None
    assert torch.equal(changed(x, y), before)


def test_state_dict_copy_and_pickle():
    """Keys do not change, and copies have the current values."""
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


def test_margin_function_uses_the_attributes():
    loss_fn = fm.ArcFaceLoss(30, 8, easy=True)
    loss_fn.margin = 0.1
    assert loss_fn.margin_function == fm.Margin(m2=0.1, easy=True)
    loss_fn.margin_function = fm.Margin(m2=0.2, beyond_pi="none")
    assert (loss_fn.margin, loss_fn.beyond_pi, loss_fn.easy) == (0.2, "none", False)
    with pytest.raises(ValueError, match="margin_function: expected m3=0 in ArcFaceLoss, got 0.1"):
        loss_fn.margin_function = fm.Margin(m3=0.1)
    own = fm.MarginLoss(30, 8, {"m3": 0.1}, 64.0)  # as subclasses outside the package call it
    own.margin_function = fm.Margin(m3=0.2)
    assert own.margin_function == fm.Margin(m3=0.2)
    l_softmax = fm.LSoftmaxLoss(30, 8)
    l_softmax.margin_function = fm.Margin(m1=2.0)
    assert l_softmax.margin == 2.0
    for wrong in (fm.Margin(m1=2.0, m2=0.1), fm.Margin(m1=torch.ones(3))):
        with pytest.raises(ValueError, match="margin_function: expected m1 alone"):
            l_softmax.margin_function = wrong
    with pytest.raises(ValueError, match="margin_function: expected m3=0 in ArcFaceLoss"):
        loss_fn.margin_function = fm.Margin(m3=torch.ones(3))
    for module in (loss_fn, l_softmax):
        with pytest.raises(TypeError, match="margin_function: expected a fused_margin.Margin, got float"):
            module.margin_function = 0.5


@pytest.mark.parametrize("learned", [False, True])
def test_number_fills_tensor_scale(learned):
    """A scale in the state dict stays in it, and a learned scale remains a parameter."""
    x, y = inputs()
    scale = nn.Parameter(torch.tensor(20.0)) if learned else torch.tensor(20.0)
    loss_fn, number = with_equal_weights(fm.ArcFaceLoss, {"scale": scale}, {"scale": 30.0})
    parameter = loss_fn.scale
    loss_fn.scale = 30.0
    assert loss_fn.scale is parameter and loss_fn.state_dict()["scale"] == 30.0
    assert list(dict(loss_fn.named_parameters())) == ["weight", "scale"][: 1 + learned]
    torch.testing.assert_close(loss_fn(x, y), number(x, y))
    number.scale = torch.tensor(30.0)  # a number becomes a tensor, as in the constructor
    assert number.state_dict()["scale"] == 30.0
    alpha = fm.L2SoftmaxLoss(30, 8)
    alpha.alpha = 4.0
    assert isinstance(alpha.alpha, nn.Parameter) and alpha.alpha == 4.0


@pytest.mark.parametrize("scale", [torch.tensor(20.0), nn.Parameter(torch.tensor(20.0))], ids=["buffer", "parameter"])
def test_tensor_scale_becomes_a_number_after_none(scale):
    loss_fn = fm.ArcFaceLoss(30, 8, scale=scale)
    loss_fn.scale = None
    loss_fn.scale = 30.0
    assert loss_fn.scale == 30.0 and list(loss_fn.state_dict()) == ["weight"]


def test_alpha_none_is_learned():
    """It starts at its lower bound, as in the constructor."""
    constructed, fixed = fm.L2SoftmaxLoss(300, 8), fm.L2SoftmaxLoss(300, 8, alpha=8.0)
    fixed.alpha = None
    assert isinstance(fixed.alpha, nn.Parameter) and torch.equal(fixed.alpha, constructed.alpha)
    assert repr(fixed) == repr(constructed)
    parameter = fixed.alpha
    fixed.alpha = 9.0
    fixed.alpha = None
    assert fixed.alpha is parameter and torch.equal(parameter, constructed.alpha)


@pytest.mark.parametrize("module", [fm.ArcFaceLoss, fm.SoftmaxLoss])
@pytest.mark.parametrize("refresh", ["certified", 2])
def test_exclusive_term_enabled_later(module, refresh):
    """It equals one enabled from the start, with the same cache; when disabled, no search runs."""
    x, y = inputs()
    changed, constructed = with_equal_weights(
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
    full = loss_fn(x[:4], y[:4])
    loss_fn.workspace_mb = 1e-6
    torch.testing.assert_close(loss_fn(x[:4], y[:4]), full)
    loss_fn.sample_rate = 0.2
    sampled = loss_fn(x[:4], y[:4])
    assert sampled < full  # the sum is over fewer classes
    loss_fn.sparse = True
    loss_fn(x[:4], y[:4]).backward()
    assert loss_fn.weight.grad.is_sparse and loss_fn.weight.grad._nnz() == 6
    loss_fn.sample_rate = 1.0
    torch.testing.assert_close(loss_fn(x[:4], y[:4]), full)


def test_auxiliary_losses():
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
    """The drop-ins check settings too, and a changed sample_rate samples other classes."""
    x, y = inputs()
    fc = PartialFC_V2(insightface.ArcFace(8.0), 8, 30).double()
    full = fc(x[:4], y[:4])
    fc.margin_softmax.margin = 0.1
    assert not torch.equal(fc(x[:4], y[:4]), full)
    with pytest.raises(ValueError, match="margin: expected a number"):
        fc.margin_softmax.margin = float("inf")
    fc.margin_softmax.margin = 0.5
    fc.sample_rate = 0.2
    assert fc.num_sample == 6 and fc(x[:4], y[:4]) < full
    with pytest.raises(ValueError, match="sample_rate: expected a number"):
        fc.sample_rate = 2.0
    fc.sample_rate = 1.0
    assert fc.num_sample == 30 and torch.equal(fc(x[:4], y[:4]), full)


def test_insightface_rejects_settings_without_effect():
    x, y = inputs()
    fc = PartialFC_V2(insightface.ArcFace(8.0), 8, 30).double()
    full = fc(x, y)
    for name in ("num_classes", "rank", "world_size", "class_start", "num_local", "num_sample", "process_group"):
        with pytest.raises(AttributeError, match=f"{name}: cannot be changed"):
            setattr(fc, name, 2)
    with pytest.raises(TypeError, match="margin_softmax: expected CombinedMarginLoss.*got torch.nn.*Identity"):
        fc.margin_softmax = nn.Identity()
    for name in ("fp16", "sparse"):
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got 'no'"):
            setattr(fc, name, "no")
    assert torch.equal(fc(x, y), full)
    fc.margin_softmax = insightface.CosFace(8.0)
    assert not torch.equal(fc(x, y), full)


def test_misspelt_option_is_a_type_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'scael'"):
        fm.ArcFaceLoss(10, 4, scael=3)


@pytest.mark.slow
def test_misspelt_option_is_a_mypy_error(tmp_path, monkeypatch):
    monkeypatch.setenv("MYPYPATH", str(Path(fm.__file__).parents[1]))
    program = tmp_path / "program.py"
    program.write_text("import fused_margin as fm\n\nfm.ArcFaceLoss(10, 4, scale=3)\nfm.ArcFaceLoss(10, 4, scael=3)\n")
    options = ("--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}", "--no-error-summary")
    report, errors, status = api.run([*options, str(program)])
    assert status == 1 and not errors
    assert report.splitlines()[0].startswith(f'{program}:4: error: Unexpected keyword argument "scael"')
    assert ":3:" not in report


class OwnNumber(fm.MarginLoss):
    """A loss with an attribute of its own that is a number of the margin."""

    NUMBERS: ClassVar = {"own": "m2"}

    def __init__(self):
        super().__init__(30, 8, {}, 16.0)
        self.own = 0.5


class OwnScale(fm.ArcFaceLoss):
    def current_scale(self, device):
        return 10.0


def replaced(loss_fn, x, y):
    """The loss with m2 replaced for one call, as torch.func.functional_call does it."""
    parameters = {**dict(loss_fn.named_parameters()), "m2": torch.tensor(0.9)}
    return torch.func.functional_call(loss_fn, parameters, (x, y))


def test_margin_follows_changes_that_are_not_settings():
    x, _, y = problem(12, 30, 8, spread=1.0)
    x = x.float()
    own = OwnNumber()
    first, own.own = own(x, y), 0.1
    assert own(x, y) < first
    constant = fm.MarginLoss(30, 8, {"m2": 0.5}, 16.0)
    first = constant(x, y)
    constant.numbers["m2"] = 0.1
    assert constant(x, y) < first
    learned = fm.CombinedMarginLoss(30, 8)
    learned.m2 = nn.Parameter(torch.tensor(0.3))
    first = learned(x, y)
    assert replaced(learned, x, y) > first and torch.equal(learned(x, y), first)
    scaled, plain = OwnScale(30, 8), fm.ArcFaceLoss(30, 8, scale=10.0)
    plain.load_state_dict(scaled.state_dict())
    assert torch.equal(scaled(x, y), plain(x, y))


@pytest.mark.parametrize("name", [name for name in fm.losses.__all__ if name.endswith("Loss")])
def test_type_hints_can_be_read(name):
    """As argument parsers do."""
    assert typing.get_type_hints(getattr(fm.losses, name).__init__)
