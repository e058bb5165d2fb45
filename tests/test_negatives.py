"""Options for negative classes: sub-centers, CurricularFace's hard negatives, InsightFace's filtering."""

import math
from dataclasses import replace

import pytest
import torch
from loss_inputs import leaf, ours, planned_inputs, problem, relative_error, truth

import fused_margin as fm
from fused_margin import _C, reference
from fused_margin._ops.backends import portable
from fused_margin.functional import margin_cross_entropy
from fused_margin.margins import FilteredNegatives, HardNegatives

SAVE, RECOMPUTE = 256, 1e-6


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
@pytest.mark.parametrize("scale", [20.0, 300.0, None], ids=str)
@pytest.mark.parametrize("sub_centers", [1, 2, 3, 7])
def test_sub_centers(sub_centers, scale, workspace_mb):
    x, w, y = problem(31, 84 * 5, 12)
    y = y % (84 * 5 // sub_centers)
    y[4] = -100
    options = {"sub_centers": sub_centers}
    class_weight = torch.rand(84 * 5 // sub_centers, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        given = x.to(dtype), w.to(dtype), y, {"m2": 0.5}, scale
        expected = truth(*given, class_weight=class_weight, **options)
        measured = ours(*given, class_weight=class_weight, workspace_mb=workspace_mb, **options)
        for m, e in zip(measured, expected, strict=True):
            assert relative_error(m, e) < tolerance


def test_equal_sub_centers_give_all_gradient_to_the_first():
    x, w, y = problem(8, 20, 6)
    doubled = w.repeat_interleave(2, dim=0)
    loss, dx, dw = ours(x, doubled, y, {"m2": 0.5}, sub_centers=2)
    expected = ours(x, w, y, {"m2": 0.5})
    for m, e in zip((loss, dx, dw[::2]), expected, strict=True):
        assert relative_error(m, e) < 1e-12
    assert not dw[1::2].any()


def hard(x, w, y, strength=0.3):
    """CurricularFace's threshold, lower than some of the cosines."""
    cosine = reference.normalize(x) @ reference.normalize(w).t()
    threshold = torch.cos(torch.acos(cosine[torch.arange(len(y)), y]) + 0.5)
    assert (cosine > threshold.unsqueeze(1)).double().mean() > 0.1
    return threshold, strength


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
@pytest.mark.parametrize("scale", [4.0, 64.0, 300.0])
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_hard_negatives(strength, scale, workspace_mb):
    x, w, y = problem(29, 307, 6)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        given = x.to(dtype), w.to(dtype), y, {"m2": 0.5}, scale
        negatives = hard(x.to(dtype).double(), w.to(dtype).double(), y, strength)
        negatives = negatives[0] + 1e-9, negatives[1]  # no cosine is within rounding of it
        expected = truth(*given, hard_negatives=negatives)
        measured = ours(*given, hard_negatives=HardNegatives(*negatives), workspace_mb=workspace_mb)
        for m, e in zip(measured, expected, strict=True):
            assert relative_error(m, e) < tolerance


def test_hard_negatives_and_sub_centers_together():
    x, w, y = problem(29, 306, 6)
    y = y % 102
    threshold = torch.rand(29, dtype=torch.float64) - 0.5
    strength = torch.tensor(0.2, dtype=torch.float64)
    expected = truth(x, w, y, {"m2": 0.5}, sub_centers=3, hard_negatives=(threshold, 0.2))
    measured = ours(x, w, y, {"m2": 0.5}, sub_centers=3, hard_negatives=HardNegatives(threshold, strength))
    for m, e in zip(measured, expected, strict=True):
        assert relative_error(m, e) < 1e-11


THRESHOLD = 0.4
FILTER = FilteredNegatives(THRESHOLD)


def filtering(x, w, y, sub_centers=1):
    """FILTER for the oracle. Some classes, targets too, are above it; none is within rounding of it."""
    cosine = (reference.normalize(x) @ reference.normalize(w).t()).unflatten(1, (-1, sub_centers)).amax(dim=2)
    assert 0.1 < (cosine > THRESHOLD).double().mean() < 0.9 and ((cosine - THRESHOLD).abs() > 1e-6).all()
    assert (cosine[torch.arange(len(y)), y] > THRESHOLD).any()
    return torch.full((len(y),), THRESHOLD, dtype=torch.float64), None


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
@pytest.mark.parametrize("scale", [4.0, 64.0, 300.0, None], ids=str)
@pytest.mark.parametrize("sub_centers", [1, 3])
def test_filtered_negatives(sub_centers, scale, workspace_mb):
    x, w, y = problem(29, 306, 6)
    y = y % (306 // sub_centers)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        given = x.to(dtype), w.to(dtype), y, {"m2": 0.5}, scale
        negatives = filtering(given[0].double(), given[1].double(), y, sub_centers)
        expected = truth(*given, sub_centers=sub_centers, hard_negatives=negatives)
        measured = ours(*given, sub_centers=sub_centers, hard_negatives=FILTER, workspace_mb=workspace_mb)
        for m, e in zip(measured, expected, strict=True):
            assert relative_error(m, e) < tolerance


def test_per_sample_scales_and_filtered_negatives():
    """A filtered class does not contribute to the scale's gradient."""
    x, w, y = problem(29, 307, 6)
    a, b = (leaf(torch.linspace(1, 30, 29, dtype=torch.float64)) for _ in range(2))
    margin_cross_entropy(x, w, y, scale=a, hard_negatives=FILTER).backward()
    reference.margin_cross_entropy(x, w, y, scale=b, hard_negatives=filtering(x, w, y)).backward()
    assert relative_error(a.grad, b.grad) < 1e-11


def test_all_other_classes_filtered():
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    w = torch.tensor([[1.0, 0.5], [1.0, 0.2], [1.0, -0.3]], dtype=torch.float64)
    loss, _, dw = ours(x, w, torch.tensor([0]), scale=2.0, hard_negatives=FilteredNegatives(0.9))
    logit = 2.0 / math.sqrt(1.25)  # two other classes with logit 0
    assert loss.item() == pytest.approx(math.log(math.exp(logit) + 2) - logit, rel=1e-12)
    assert dw[0].any() and not dw[1:].any()


def test_threshold_of_one_filters_nothing():
    """Nor does it filter cosines that rounding puts above 1."""
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(29, 307, 6))
    w[:29] = x
    for m, e in zip(ours(x, w, y, hard_negatives=FilteredNegatives(1)), ours(x, w, y), strict=True):
        assert torch.equal(m, e)


def test_filtered_negatives_use_one_exponent():
    inputs = replace(planned_inputs(3, torch.randn(50, 6)), hard_threshold=torch.zeros(3, dtype=torch.float64))
    assert portable.fixed_exponent(inputs) is not None
    hard_inputs = replace(inputs, hard_strength=torch.ones(1, dtype=torch.float64))
    assert portable.fixed_exponent(hard_inputs) is None  # these cosines may become as large as 2


def test_gradcheck():
    x, w, y = problem(4, 12, 3, seed=3)
    threshold = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64)
    inputs = x.requires_grad_(), w.requires_grad_()
    for options in (
        {"sub_centers": 3},
        {"hard_negatives": HardNegatives(threshold, 0.4)},
        {"hard_negatives": FilteredNegatives(0.3)},
    ):
        for workspace_mb in (SAVE, RECOMPUTE):
            assert torch.autograd.gradcheck(
                lambda a, b, w=workspace_mb, o=options: margin_cross_entropy(
                    a, b, y % 4, fm.Margin(m2=0.5), 8.0, workspace_mb=w, **o
                ),
                inputs,
            )


@pytest.mark.parametrize(
    "negatives",
    [HardNegatives(torch.linspace(-0.5, 0.5, 29, dtype=torch.float64), 0.2), FILTER],
    ids=["hard", "filtered"],
)
def test_every_instruction_set(negatives):
    x, w, y = problem(29, 306, 6)
    y = y % 102
    before, results = _C.cpu.capability(), []
    try:
        for capability in _C.cpu.Capability.__members__.values():
            if capability <= _C.cpu.best_capability():
                _C.cpu.use(capability)
                results.append(ours(x.float(), w.float(), y, {"m2": 0.5}, sub_centers=3, hard_negatives=negatives))
    finally:
        _C.cpu.use(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert relative_error(a, b) < 1e-5


def test_nan_makes_the_loss_nan():
    x, w, y = problem(8, 20, 6)
    w[3] = torch.nan
    for options in (
        {"sub_centers": 2},
        {"hard_negatives": HardNegatives(torch.zeros(8, dtype=torch.float64), 0.1)},
        {"hard_negatives": FILTER},
    ):
        assert margin_cross_entropy(x, w, y % 10, **options).isnan()


def test_errors():
    x, w, y = problem(8, 20, 6)
    negatives = HardNegatives(torch.zeros(8, dtype=torch.float64), 0.1)
    for message, options in (
        ("weight: expected 3 rows for every class", {"sub_centers": 3}),
        ("exclusive_weight: expected 0 with sub_centers", {"sub_centers": 2, "exclusive_weight": 1.0}),
        ("label_smoothing: expected 0 with sub_centers", {"sub_centers": 2, "label_smoothing": 0.1}),
        ("label_smoothing: expected 0 with hard_negatives", {"hard_negatives": negatives, "label_smoothing": 0.1}),
        ("label_smoothing: expected 0 with hard_negatives", {"hard_negatives": FILTER, "label_smoothing": 0.1}),
        (r"hard_negatives.threshold: expected .*\(8,\)", {"hard_negatives": HardNegatives(torch.zeros(7), 0.1)}),
        ("labels: expected values", {"sub_centers": 4}),
        (r"class_weight: expected shape \(10,\)", {"sub_centers": 2, "class_weight": torch.ones(20)}),
    ):
        with pytest.raises(ValueError, match=message):
            margin_cross_entropy(x, w, y % 10, **options)
    for message, options in (
        ("scale: expected a number with HardNegatives", {"hard_negatives": negatives, "scale": None}),
        ("hard_negatives: expected .*HardNegatives or FilteredNegatives, got float", {"hard_negatives": 0.3}),
        ("hard_negatives.threshold: expected a tensor", {"hard_negatives": HardNegatives(0.5, 0.1)}),
    ):
        with pytest.raises(TypeError, match=message):
            margin_cross_entropy(x, w, y, **options)


@pytest.mark.parametrize(
    "threshold, error, got",
    [
        (0.0, ValueError, "in .0.0, 1.0., got 0.0"),
        (-0.4, ValueError, "in .0.0, 1.0., got -0.4"),
        (1.5, ValueError, "in .0.0, 1.0., got 1.5"),
        (math.nan, ValueError, "in .0.0, 1.0., got nan"),
        (torch.full((8,), 0.4), TypeError, ", got Tensor"),
        (None, TypeError, ", got NoneType"),
    ],
    ids=str,
)
def test_thresholds_outside_the_range_of_cosines(threshold, error, got):
    x, w, y = problem(8, 20, 6)
    with pytest.raises(error, match=f"hard_negatives.threshold: expected a number.*{got}"):
        margin_cross_entropy(x, w, y, hard_negatives=FilteredNegatives(threshold))


def test_curricularface():
    """Two steps against the formula: t is updated before use, and not in evaluation."""
    x, _, y = problem(40, 30, 6)
    loss_fn = fm.CurricularFaceLoss(30, 6, dtype=torch.float64)
    t = torch.tensor(0.0, dtype=torch.float64)
    for step in range(4):
        loss_fn.train(step % 2 == 0)
        a, b, w = leaf(x + step), leaf(x + step), leaf(loss_fn.weight)
        cosine = (reference.normalize(b) @ reference.normalize(w).t())[torch.arange(40), y].detach()
        if loss_fn.training:
            t = 0.01 * cosine.mean() + 0.99 * t
        # beyond pi the margin continues as in the rest of this package
        threshold = reference.psi(cosine, m2=0.5)
        loss_fn.weight.grad = None
        loss = loss_fn(a, y)
        loss.backward()
        expected = reference.margin_cross_entropy(b, w, y, {"m2": 0.5}, hard_negatives=(threshold, t))
        expected.backward()
        for m, e in ((loss, expected), (a.grad, b.grad), (loss_fn.weight.grad, w.grad), (loss_fn.t, t)):
            assert relative_error(m, e) < 1e-10
    before = loss_fn.train().t.clone()
    with pytest.raises(ValueError):
        loss_fn(x, y + 30)
    loss_fn(x[:1], torch.tensor([-100]))
    assert loss_fn.t == before and loss_fn.state_dict()["t"] == before
    other = fm.CurricularFaceLoss(30, 6, dtype=torch.float64)
    other.load_state_dict(loss_fn.state_dict())
    assert torch.equal(other(x, y), loss_fn(x, y))


def test_sub_center_arcface():
    x, _, y = problem(40, 30, 6)
    loss_fn = fm.SubCenterArcFaceLoss(30, 6, dtype=torch.float64)
    assert loss_fn.weight.shape == (90, 6)
    expected = reference.margin_cross_entropy(x, loss_fn.weight, y, {"m2": 0.5}, sub_centers=3)
    torch.testing.assert_close(loss_fn(x, y), expected)
    cosine = reference.normalize(x) @ reference.normalize(loss_fn.weight).t()
    torch.testing.assert_close(loss_fn.logits(x), 64 * cosine.view(40, 30, 3).amax(dim=2))
    assert "sub_centers=3" in repr(loss_fn)
    with pytest.raises(ValueError, match="exclusive_weight"):
        fm.SubCenterArcFaceLoss(30, 6, exclusive_weight=1.0)
    # the adaptive losses use the nearest sub-center too
    adaptive = fm.CurricularFaceLoss(30, 6, sub_centers=3, dtype=torch.float64)
    adaptive(x, y)
    own = reference.normalize(x) @ reference.normalize(adaptive.weight).t()
    nearest = own.view(40, 30, 3)[torch.arange(40), y].amax(dim=1)
    torch.testing.assert_close(adaptive.t.item(), 0.01 * nearest.mean().item())
