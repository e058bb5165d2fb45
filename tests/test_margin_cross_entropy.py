"""Values and gradients of the fused losses against the float64 reference."""

import math

import pytest
import torch
from loss_inputs import loss_and_gradients, ours, planned_inputs, problem, relative_error, saved_classes, truth
from torch.nn import functional as F

import fused_margin as fm
from fused_margin import reference
from fused_margin._ops.backends.portable import plan_chunks
from fused_margin._ops.inputs import CHUNK_BYTES

MARGINS = {
    "normface": {},
    "arcface": {"m2": 0.5},
    "cosface": {"m3": 0.35},
    "sphereface": {"m1": 4.0},
    "sphereface_annealed": {"m1": 4.0, "annealing": 5.0},
    "real_m1": {"m1": 1.35},
    "combined": {"m1": 0.9, "m2": 0.4, "m3": 0.15},
    "linear": {"m2": 0.5, "beyond_pi": "linear"},
    "none": {"m1": 2.0, "m2": 0.5, "beyond_pi": "none"},
    "easy": {"m2": 0.5, "m3": 0.1, "easy": True},
    "straight_through": {"m2": 0.5, "gradient": "straight_through"},
}
# (N, C, D): odd sizes on purpose
SHAPES = [(252, 507, 123), (1, 4099, 64), (33, 1, 8), (17, 2, 16), (16, 16, 3), (5, 1031, 512)]
SAVE, RECOMPUTE = 256, 1e-6  # workspace_mb: all chunks saved, or one chunk of the smallest size at a time


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_shapes(shape, dtype, workspace_mb):
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(*shape))
    expected = truth(x, w, y, {"m2": 0.5})
    measured = ours(x, w, y, {"m2": 0.5}, workspace_mb=workspace_mb)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for m, e in zip(measured, expected, strict=True):
        assert relative_error(m, e) < tolerance
        assert m.dtype == dtype


@pytest.mark.parametrize("scale", [64.0, 10.0, 500.0, None, "per sample"], ids=str)
@pytest.mark.parametrize("name", MARGINS)
def test_margins_and_scales(name, scale):
    x, w, y = problem(40, 300, 24)
    if scale == "per sample":
        scale = torch.rand(40, dtype=torch.float64) * 60 + 1
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        expected = truth(x.to(dtype), w.to(dtype), y, MARGINS[name], scale)
        for m, e in zip(ours(x.to(dtype), w.to(dtype), y, MARGINS[name], scale), expected, strict=True):
            assert relative_error(m, e) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_least_as_accurate_as_torch(dtype):
    """The error is at most that of plain torch in the same dtype, with the same rounded inputs, plus one rounding."""
    x, w, y = (t.to(dtype) if t.is_floating_point() else t for t in problem(64, 2000, 96))
    expected = truth(x, w, y, {"m2": 0.5})
    plain = loss_and_gradients(reference.margin_cross_entropy, x, w, y, {"m2": 0.5})
    for m, p, e in zip(ours(x, w, y, {"m2": 0.5}), plain, expected, strict=True):
        assert relative_error(m, e) <= relative_error(p, e) + torch.finfo(dtype).eps


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_options_match_torch_cross_entropy(reduction, label_smoothing, weighted):
    x, w, y = problem(50, 200, 32)
    y[::7] = -5
    options = {"reduction": reduction, "ignore_index": -5, "label_smoothing": label_smoothing}
    if weighted:
        options["class_weight"] = torch.rand(200, dtype=torch.float64)
    upstream = torch.randn(50, dtype=torch.float64) if reduction == "none" else None  # unequal on purpose
    for scale in (20.0, None):
        expected = truth(x, w, y, {"m2": 0.3}, scale, upstream=upstream, **options)
        for workspace_mb in (SAVE, RECOMPUTE):
            measured = ours(x, w, y, {"m2": 0.3}, scale, upstream=upstream, workspace_mb=workspace_mb, **options)
            for m, e in zip(measured, expected, strict=True):
                assert relative_error(m, e) < 1e-11


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
def test_exclusive_term_in_the_same_call(workspace_mb):
    x, w, y = problem(20, 500, 16)
    options = {"exclusive_weight": 3.0, "label_smoothing": 0.1}
    expected = truth(x, w, y, {"m2": 0.5}, **options)
    for m, e in zip(ours(x, w, y, {"m2": 0.5}, workspace_mb=workspace_mb, **options), expected, strict=True):
        assert relative_error(m, e) < 1e-11


def test_ignore_index_that_is_a_class():
    x, w, y = problem(30, 12, 8)
    options = {"ignore_index": 3, "label_smoothing": 0.2}
    for m, e in zip(ours(x, w, y, {"m2": 0.5}, **options), truth(x, w, y, {"m2": 0.5}, **options), strict=True):
        assert relative_error(m, e) < 1e-11


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", [[], [-100, -100, -100]], ids=["empty", "all ignored"])
def test_no_valid_label_matches_torch_cross_entropy(labels, reduction):
    labels = torch.tensor(labels, dtype=torch.int64)
    x, w, _ = problem(len(labels), 20, 8)
    expected = F.cross_entropy(torch.zeros(len(labels), 20), labels, reduction=reduction)
    loss, dx, dw = ours(x, w, labels, reduction=reduction)
    torch.testing.assert_close(loss.float(), expected, equal_nan=True)
    assert dx.shape == x.shape and not dx.nan_to_num().any()
    assert dw.shape == w.shape and not dw.nan_to_num().any()


def test_per_sample_margins_and_scale_are_differentiable():
    x, w, y = problem(25, 60, 12)
    values = {
        "m1": torch.rand(25, dtype=torch.float64) + 1,
        "m2": torch.rand(25, dtype=torch.float64),
        "m3": torch.rand(25, dtype=torch.float64) * 0.3,
        "annealing": torch.rand(25, dtype=torch.float64) * 5,
    }
    scale = torch.rand(25, dtype=torch.float64) * 30 + 1
    for kwargs in ({}, {"label_smoothing": 0.2}):
        gradients = []
        for function, wrap in (
            (fm.functional.margin_cross_entropy, lambda m: fm.Margin(**m)),
            (reference.margin_cross_entropy, dict),
        ):
            leaves = {k: v.clone().requires_grad_() for k, v in {**values, "scale": scale}.items()}
            margin = wrap({k: leaves[k] for k in values})
            function(x, w, y, margin, leaves["scale"], **kwargs).backward()
            gradients.append([leaves[k].grad for k in leaves])
        for m, e in zip(*gradients, strict=True):
            assert relative_error(m, e) < 1e-10


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded embeddings", "reversed columns"])
def test_strided_inputs(layout):
    x, w, y = problem(24, 90, 20)
    expected = truth(x, w, y, {"m2": 0.5}, exclusive_weight=0.5)
    if layout == "transposed":  # a (D, C) parameter, as in pytorch-metric-learning
        x2, w2 = x.clone().requires_grad_(), w.t().contiguous().requires_grad_()
        loss = fm.functional.margin_cross_entropy(x2, w2.t(), y, fm.Margin(m2=0.5), exclusive_weight=0.5)
        loss.backward()
        measured = loss.detach(), x2.grad, w2.grad.t()
    elif layout == "sliced":
        big_x, big_w = x.repeat_interleave(2, 1).requires_grad_(), w.repeat_interleave(3, 0).requires_grad_()
        loss = fm.functional.margin_cross_entropy(
            big_x[:, ::2], big_w[::3], y.repeat_interleave(2)[::2], fm.Margin(m2=0.5), exclusive_weight=0.5
        )
        loss.backward()
        measured = loss.detach(), big_x.grad[:, ::2], big_w.grad[::3]
    elif layout == "expanded embeddings":
        row = x[:1].clone().requires_grad_()
        expected = truth(x[:1].expand(24, -1), w, y, {"m2": 0.5})
        loss = fm.functional.margin_cross_entropy(row.expand(24, -1), w, y, fm.Margin(m2=0.5))
        loss.backward()
        assert relative_error(row.grad, expected[1].sum(0, keepdim=True)) < 1e-11
        return
    else:
        measured = ours(x.flip(1), w.flip(1), y, {"m2": 0.5}, exclusive_weight=0.5)
        measured = measured[0], measured[1].flip(1), measured[2].flip(1)
    for m, e in zip(measured, expected, strict=True):
        assert relative_error(m, e) < 1e-11


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_labels_of_any_integer_dtype(dtype):
    x, w, y = problem(10, 100, 8)
    assert torch.equal(ours(x, w, y.to(dtype))[0], ours(x, w, y)[0])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_and_half_precision(half):
    """Half inputs are computed in float32; gradients have the input's dtype."""
    x, w, y = problem(30, 400, 48)
    for x_dtype, w_dtype in ((half, half), (half, torch.float32), (torch.float32, half)):
        loss, dx, dw = ours(x.to(x_dtype), w.to(w_dtype), y, {"m2": 0.5})
        expected = truth(x.to(x_dtype), w.to(w_dtype), y, {"m2": 0.5})
        assert loss.dtype == torch.float32 and dx.dtype == x_dtype and dw.dtype == w_dtype
        assert relative_error(loss, expected[0]) < 1e-6
        assert relative_error(dx, expected[1]) < torch.finfo(x_dtype).eps + 1e-5
        assert relative_error(dw, expected[2]) < torch.finfo(w_dtype).eps + 1e-5


def test_gradients_only_where_required():
    x, w, y = problem(10, 50, 8)
    _, dx, dw = ours(x, w, y, {"m2": 0.5}, None)
    x2 = x.clone().requires_grad_()
    fm.functional.margin_cross_entropy(x2, w, y, fm.Margin(m2=0.5), None).backward()
    assert torch.equal(x2.grad, dx)
    w2 = w.clone().requires_grad_()
    fm.functional.margin_cross_entropy(x, w2, y, fm.Margin(m2=0.5), None).backward()
    assert torch.equal(w2.grad, dw)


class TestExtremes:
    """Inputs for which the textbook formulas give NaN, infinity or 0."""

    def test_scales_up_to_500(self):
        for scale in (70.0, 71.0, 100.0, 500.0):
            x, w, y = problem(30, 40, 3)  # few dimensions: cosines all over [-1, 1]
            for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
                expected = truth(x.to(dtype), w.to(dtype), y, {"m2": 0.5}, scale)
                for m, e in zip(ours(x.to(dtype), w.to(dtype), y, {"m2": 0.5}, scale), expected, strict=True):
                    assert relative_error(m, e) < tolerance

    def test_every_negative_opposite(self):
        """Sums in which every term would underflow if the shift were not computed for each row."""
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float32)
        w = torch.tensor([[1.0, 0.0], [-1.0, 1e-3], [-1.0, -2e-3]], dtype=torch.float32)
        for scale in (64.0, 500.0):
            nlse, _ = fm.functional.cosine_logsumexp(x, w, torch.tensor([0]), scale)
            expected, _ = reference.cosine_logsumexp(x.double(), w.double(), torch.tensor([0]), scale)
            torch.testing.assert_close(nlse.double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("cosine", [1.0, -1.0])
    @pytest.mark.parametrize("name", MARGINS)
    def test_cosine_of_plus_or_minus_one(self, name, cosine):
        """Results are finite and equal the limit of the float64 reference as the angle approaches 0 or pi."""
        margin, scale = MARGINS[name], 4.0
        w = torch.eye(3, 4, dtype=torch.float64)
        exact = cosine * w[:1] * 2.0
        near = exact + torch.tensor([[0.0, 0.0, 0.0, 1e-4]], dtype=torch.float64)
        y = torch.tensor([0])
        expected = truth(near, w, y, margin, scale)
        for dtype in (torch.float64, torch.float32):
            loss, dx, dw = ours(exact.to(dtype), w.to(dtype), y, margin, scale)
            assert dx.isfinite().all() and dw.isfinite().all()
            torch.testing.assert_close(loss.double(), expected[0], rtol=1e-3, atol=1e-3)
            # at the pole the direction away from the target is undefined, so its gradient is 0;
            # all other components must equal the limit
            torch.testing.assert_close(dx.double()[:, :3], expected[1][:, :3], rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(dw.double()[:, :3], expected[2][:, :3], rtol=1e-3, atol=1e-3)
        target = torch.tensor(cosine, dtype=torch.float64)
        if margin.get("m2", 0.0) == 0.0 and float(margin.get("m1", 1.0)).is_integer() and "easy" not in margin:
            slope = self.slope(target, margin)
            nearby = torch.tensor(cosine * (1 - 1e-9), dtype=torch.float64)
            torch.testing.assert_close(slope, self.slope(nearby, margin), rtol=1e-5, atol=0)

    @staticmethod
    def slope(cosine, margin):
        """dpsi/dcos as computed by the fused kernel, from a two-class problem with one embedding at that angle."""
        from fused_margin._ops import margin_rows
        from fused_margin.margins import BEYOND_PI

        one = torch.ones(1, dtype=torch.float64)
        settings = fm.Margin(**margin)
        values = [1.0, float(settings.m1), float(settings.m2), float(settings.m3), float(settings.annealing)]
        none = (None,) * 5
        _, _, derivatives = margin_rows.margin_rows(
            one * 50, cosine.reshape(1), None, torch.tensor([0]), None, None, *none, values,
            BEYOND_PI.index(settings.beyond_pi), settings.easy, settings.gradient == "straight_through", 1e-8, None, 2, -100,
        )  # fmt: skip
        return -derivatives[margin_rows.DERIVATIVES.index("target_cosine"), 0]

    def test_gradient_is_zero_in_one_dimension(self):
        x, w, y = problem(16, 16, 1)
        for dtype, tolerance in ((torch.float32, 1e-2), (torch.float64, 1e-6)):
            _, dx, dw = ours(x.to(dtype), w.to(dtype), y, {"m2": 0.5})
            assert dx.abs().max() < tolerance and dw.abs().max() < tolerance

    def test_zero_rows(self):
        for scale in (64.0, None, 300.0):
            x, w, y = problem(12, 30, 8)
            x[3] = 0
            w[5] = 0
            w[y[0]] = 0
            for workspace_mb in (SAVE, RECOMPUTE):
                for dtype in (torch.float32, torch.float64):
                    x2, w2 = x.to(dtype), w.to(dtype)
                    loss, dx, dw = ours(x2, w2, y, {"m2": 0.5}, scale, exclusive_weight=0.3, workspace_mb=workspace_mb)
                    assert loss.isfinite() and dx.isfinite().all() and dw.isfinite().all()
                    assert not dx[3].any() and not dw[5].any() and not dw[y[0]].any()
                    expected = reference.margin_cross_entropy(x, w, y, {"m2": 0.5}, scale, exclusive_weight=0.3)
                    assert relative_error(loss, expected) < 1e-5

    def test_tiny_and_huge_rows(self):
        """Scaling a row only scales its gradient."""
        x, w, y = problem(12, 30, 8)
        x, w = x.float(), w.float()
        base = ours(x, w, y, {"m2": 0.5})
        for factor in (1e-9, 1e15):
            loss, dx, dw = ours(x * factor, w * factor, y, {"m2": 0.5})
            torch.testing.assert_close(loss, base[0])
            torch.testing.assert_close(dx * factor, base[1], rtol=1e-4, atol=1e-7)
            torch.testing.assert_close(dw * factor, base[2], rtol=1e-4, atol=1e-7)

    def test_duplicate_embeddings_and_classes(self):
        w = torch.ones(6, 4, dtype=torch.float32)
        loss, dx, dw = ours(torch.ones(3, 4), w, torch.tensor([0, 1, 1]), {"m2": 0.5}, exclusive_weight=1.0)
        expected = math.log1p(5 * math.exp(64 - 64 * math.cos(0.5))) + 1.0
        assert abs(loss.item() - expected) < 1e-3
        assert dx.isfinite().all() and dw.isfinite().all()


def test_workspace_decides_which_chunks_are_saved(monkeypatch):
    w = torch.empty(10_000, 64)
    full = plan_chunks(planned_inputs(256, w, workspace_bytes=256 << 20), save_for_backward=True)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 1 << 20)
    some = plan_chunks(planned_inputs(256, w, workspace_bytes=4 << 20), save_for_backward=True)
    none = plan_chunks(planned_inputs(256, w, workspace_bytes=1), save_for_backward=True)
    assert saved_classes(full) == 10_000 and 0 < saved_classes(some) < 10_000 and saved_classes(none) == 0
    scratch = 256 * 4 * (some.chunk + saved_classes(some))
    assert scratch <= 4 << 20
    assert none.chunk == 64


def test_partly_saved_equals_all_saved(monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 50_000)
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(64, 3000, 16))
    plan = plan_chunks(planned_inputs(64, w, workspace_bytes=200_000), save_for_backward=True)
    assert 0 < plan.saved < plan.chunks
    for m, e in zip(ours(x, w, y, workspace_mb=200_000 / 2**20), ours(x, w, y), strict=True):
        assert relative_error(m, e) < 1e-6


def test_cosine_logsumexp():
    x, w, y = problem(31, 257, 19)
    for scale in (64.0, 200.0, torch.rand(31, dtype=torch.float64) * 50):
        upstream = torch.randn(31, dtype=torch.float64), torch.randn(31, dtype=torch.float64)
        results = []
        for function in (fm.functional.cosine_logsumexp, reference.cosine_logsumexp):
            x2, w2 = x.clone().requires_grad_(), w.clone().requires_grad_()
            output = function(x2, w2, y, scale)
            torch.autograd.backward(output, upstream)
            results.append((*(o.detach() for o in output), x2.grad, w2.grad))
        for m, e in zip(*results, strict=True):
            assert relative_error(m, e) < 1e-11


def test_custom_margin_matches_built_in():
    """The documented recipe: softplus(negative_logsumexp - z), where z is any function of the target cosine."""
    x, w, y = problem(20, 100, 16)
    x2, w2 = x.clone().requires_grad_(), w.clone().requires_grad_()
    nlse, cosine = fm.functional.cosine_logsumexp(x2, w2, y, 30.0)
    F.softplus(nlse - 30.0 * (cosine - 0.35)).mean().backward()
    _, dx, dw = ours(x, w, y, {"m3": 0.35}, 30.0)
    torch.testing.assert_close(x2.grad, dx)
    torch.testing.assert_close(w2.grad, dw)


def test_one_class_has_no_negatives():
    x, w, y = problem(4, 1, 8)
    nlse, _ = fm.functional.cosine_logsumexp(x, w, y)
    assert (nlse == -math.inf).all()
    loss, dx, dw = ours(x, w, y, {"m2": 0.5})
    assert loss == 0 and not dx.any() and not dw.any()
