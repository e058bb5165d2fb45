"""Softmax, L2-softmax and L-softmax against plain formulas on full logits."""

from functools import partial

import pytest
import torch
from loss_inputs import leaf, problem, relative_error
from torch.autograd import gradcheck
from torch.nn import functional as F

import fused_margin as fm
from fused_margin import reference
from fused_margin.functional import exclusive_regularization, linear_cross_entropy

SAVE, RECOMPUTE = 256, 1e-6


def gradients(function, tensors, upstream):
    leaves = [leaf(t) for t in tensors]
    loss = function(*leaves)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), *(t.grad for t in leaves)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
def test_softmax_matches_torch(reduction, label_smoothing, weighted, workspace_mb):
    x, w, y = problem(37, 211, 19)
    y[::7] = -5
    bias = torch.randn(211, dtype=torch.float64)
    options = {"reduction": reduction, "ignore_index": -5, "label_smoothing": label_smoothing}
    class_weight = torch.rand(211, dtype=torch.float64) if weighted else None
    upstream = torch.randn(37, dtype=torch.float64) if reduction == "none" else None
    expected = gradients(
        lambda a, b, c: F.cross_entropy(F.linear(a, b, c), y, weight=class_weight, **options), (x, w, bias), upstream
    )
    measured = gradients(
        lambda a, b, c: linear_cross_entropy(
            a, b, y, c, class_weight=class_weight, workspace_mb=workspace_mb, **options
        ),
        (x, w, bias),
        upstream,
    )
    for m, e in zip(measured, expected, strict=True):
        assert relative_error(m, e) < 1e-12


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 or newer")
def test_softmax_loss_is_linear_cross_entropy():
    x, w, y = problem(20, 90, 8)
    bias = torch.randn(90, dtype=torch.float64)
    expected = F.linear_cross_entropy(x, w, y, linear_bias=bias)
    torch.testing.assert_close(linear_cross_entropy(x, w, y, bias), expected)


@pytest.mark.parametrize("shape", [(252, 507, 123), (1, 4099, 64), (33, 1, 8), (17, 2, 16), (5, 1031, 512)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_least_as_accurate_as_torch(shape, dtype):
    x, w, y = problem(*shape, spread=1.0)
    x, w = x.to(dtype), (w * 0.1).to(dtype)
    bias = torch.randn(shape[1]).to(dtype)
    expected = gradients(
        lambda a, b, c: F.cross_entropy(F.linear(a, b, c), y), (x.double(), w.double(), bias.double()), None
    )
    plain = gradients(lambda a, b, c: F.cross_entropy(F.linear(a, b, c), y), (x, w, bias), None)
    measured = gradients(lambda a, b, c: linear_cross_entropy(a, b, y, c), (x, w, bias), None)
    for m, p, e in zip(measured, plain, expected, strict=True):
        assert relative_error(m, e) <= relative_error(p, e) + 2 * torch.finfo(dtype).eps


def test_logits_far_from_zero():
    """Sums neither overflow nor underflow where logits are in the thousands, all negative, or equal."""
    x, w, y = problem(9, 130, 4, spread=100.0)
    for bias in (torch.full((130,), -5000.0, dtype=torch.float64), torch.linspace(-9e3, 9e3, 130).double()):
        expected = gradients(lambda a, b, c: F.cross_entropy(F.linear(a, b, c), y), (x, w, bias), None)
        measured = gradients(lambda a, b, c: linear_cross_entropy(a, b, y, c), (x.float(), w.float(), bias), None)
        for m, e in zip(measured, expected, strict=True):
            assert m.isfinite().all() and relative_error(m, e) < 1e-4


@pytest.mark.parametrize("workspace_mb", [SAVE, RECOMPUTE], ids=["saved", "recomputed"])
@pytest.mark.parametrize("margin", [{"m1": 1.0}, {"m1": 4.0}, {"m1": 2.5, "annealing": 5.0}], ids=str)
def test_l_softmax_formula(margin, workspace_mb):
    x, w, y = problem(23, 150, 11, spread=1.0)
    bias = torch.randn(150, dtype=torch.float64)
    expected = gradients(lambda a, b, c: reference.linear_cross_entropy(a, b, y, c, margin), (x, w, bias), None)
    measured = gradients(
        lambda a, b, c: linear_cross_entropy(a, b, y, c, fm.Margin(**margin), workspace_mb=workspace_mb),
        (x, w, bias),
        None,
    )
    for m, e in zip(measured, expected, strict=True):
        assert relative_error(m, e) < 1e-11


def test_gradcheck():
    x, w, y = problem(6, 9, 5, spread=1.0)
    inputs = (x.requires_grad_(), w.requires_grad_(), torch.randn(9, dtype=torch.float64, requires_grad=True))
    for options in ({"label_smoothing": 0.2}, {"margin": fm.Margin(m1=3.0)}):
        for workspace_mb in (SAVE, RECOMPUTE):
            loss = partial(linear_cross_entropy, workspace_mb=workspace_mb, **options)
            assert gradcheck(lambda a, b, c, loss=loss: loss(a, b, y, c), inputs)


def test_zero_rows_and_poles():
    """Zero embeddings and class weights, and an embedding along its class weight, give finite gradients."""
    w = torch.eye(5, 4)
    w[4] = 0
    x = torch.stack([torch.zeros(4), 3 * w[0], -2 * w[1], w[2]])
    y = torch.tensor([0, 0, 1, 4])
    for loss in (
        lambda a, b: linear_cross_entropy(a, b, y),
        lambda a, b: linear_cross_entropy(a, b, y, margin=fm.Margin(m1=4.0)),
        lambda a, b: fm.L2SoftmaxLoss(5, 4)(a, y) + b.sum(),
    ):
        for result in gradients(loss, (x, w), None):
            assert result.isfinite().all()


def test_modules():
    x, _, y = problem(12, 30, 8, spread=1.0)
    options = {"dtype": torch.float64}
    softmax = fm.SoftmaxLoss(30, 8, exclusive_weight=0.5, **options)
    plain = F.cross_entropy(F.linear(x, softmax.weight, softmax.bias), y) + 0.5 * exclusive_regularization(
        softmax.weight
    )
    torch.testing.assert_close(softmax(x, y), plain)
    torch.testing.assert_close(softmax.logits(x), F.linear(x, softmax.weight, softmax.bias))
    assert fm.SoftmaxLoss(30, 8, bias=False).bias is None

    fixed, learned = fm.L2SoftmaxLoss(30, 8, alpha=16.0, **options), fm.L2SoftmaxLoss(30, 8, **options)
    assert set(dict(learned.named_parameters())) == {"weight", "bias", "alpha"}
    assert set(dict(fixed.named_parameters())) == {"weight", "bias"}
    torch.testing.assert_close(learned.alpha.item(), torch.tensor(0.9 * 28 / 0.1).log().item())
    for loss_fn, alpha in ((fixed, 16.0), (learned, learned.alpha)):
        plain = F.cross_entropy(F.linear(alpha * F.normalize(x), loss_fn.weight, loss_fn.bias), y)
        torch.testing.assert_close(loss_fn(x, y), plain)
    learned(x, y).backward()
    alpha = leaf(learned.alpha)
    F.cross_entropy(F.linear(alpha * F.normalize(x), learned.weight.detach()), y).backward()
    torch.testing.assert_close(learned.alpha.grad, alpha.grad)

    l_softmax = fm.LSoftmaxLoss(30, 8, **options)
    for strength in (1000.0, 1000 / 1.12):
        plain = reference.linear_cross_entropy(x, l_softmax.weight, y, None, {"m1": 4.0, "annealing": strength})
        torch.testing.assert_close(l_softmax(x, y), plain)
    assert l_softmax.state_dict()["iteration"] == 2


@pytest.mark.parametrize("module", [fm.SoftmaxLoss, fm.L2SoftmaxLoss, fm.LSoftmaxLoss])
def test_module_conventions(module):
    loss_fn, other = module(30, 8, class_weight=torch.rand(30)), module(30, 8, class_weight=torch.ones(30))
    other.load_state_dict(loss_fn.state_dict())
    x, _, y = problem(6, 30, 8)
    assert torch.equal(loss_fn(x.float(), y), other(x.float(), y))
    assert loss_fn(x.bfloat16(), y).dtype == torch.float32
    assert loss_fn.logits(x.bfloat16()).shape == (6, 30)
    assert "num_classes=30" in repr(loss_fn)
    assert module(30, 8, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert module(30, 8, device="meta").weight.is_meta


def test_errors():
    x, w, y = problem(6, 30, 8)
    with pytest.raises(ValueError, match="label_smoothing: expected 0 with a margin"):
        linear_cross_entropy(x, w, y, margin=fm.Margin(m1=2.0), label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing: expected 0"):
        fm.LSoftmaxLoss(30, 8, label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"bias: expected shape \(30,\)"):
        linear_cross_entropy(x, w, y, torch.zeros(29))
    with pytest.raises(ValueError, match="margin: expected a number"):
        fm.LSoftmaxLoss(30, 8, margin=0.5)
    with pytest.raises(ValueError, match="alpha: expected a number"):
        fm.L2SoftmaxLoss(30, 8, alpha=0.0)
    with pytest.raises(ValueError, match="sub_centers: expected 1"):
        fm.SoftmaxLoss(30, 8, sub_centers=2)
    with pytest.raises(ValueError, match="labels"):
        fm.SoftmaxLoss(30, 8)(x.float(), y + 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_are_summed_in_float32(dtype):
    """Many samples of few classes: a sum in half precision stops growing when terms are below its last bit."""
    samples, classes, size = 4096, 4, 16
    x = torch.randn(samples, size).to(dtype)
    w, b = (leaf(torch.randn(*shape).to(dtype)) for shape in ((classes, size), (classes,)))
    y = torch.randint(classes, (samples,))
    fm.functional.linear_cross_entropy(x, w, y, b, reduction="sum").backward()
    exact = [leaf(t.detach().double()) for t in (w, b)]
    F.cross_entropy(x.double() @ exact[0].t() + exact[1], y, reduction="sum").backward()
    assert relative_error(w.grad.double(), exact[0].grad) < 1e-2
    assert relative_error(b.grad.double(), exact[1].grad) < 1e-2

    lengths, expected = (leaf(w.detach().to(t)) for t in (dtype, torch.float64))
    for weight in (lengths, expected):
        fm.functional.linear_cross_entropy(
            x.to(weight.dtype), weight, y, margin=fm.Margin(m1=2.0), reduction="sum"
        ).backward()
    assert relative_error(lengths.grad.double(), expected.grad) < 1e-2


OPTIONS = {"softmax": {}, "label smoothing": {"label_smoothing": 0.1}, "margin": {"margin": fm.Margin(m1=2.0)}}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_a_half_bias_is_rounded_once(dtype, name):
    """Contributions of targets and of other classes nearly cancel: each is about 0.25, their sum below 0.01."""
    samples, classes, size = 65536, 4, 16
    x, w = torch.randn(samples, size).to(dtype), (torch.randn(classes, size) * 0.1).to(dtype)
    y, bias = torch.randint(classes, (samples,)), torch.zeros(classes, dtype=dtype)
    actual, exact = leaf(bias), leaf(bias, torch.float64)
    linear_cross_entropy(x, w, y, actual, **OPTIONS[name]).backward()
    linear_cross_entropy(x.double(), w.double(), y, exact, **OPTIONS[name]).backward()
    assert actual.grad.dtype == dtype
    assert relative_error(actual.grad, exact.grad) < torch.finfo(dtype).eps
