"""How large logits and class weights may be: right as float32 is, and NaN beyond, never a wrong number."""

import pytest
import torch
from torch.nn import functional as F

import fused_margin as fm

N, C, D = 16, 50, 8
KEPT = [256, 1e-6]


def error(measured, expected):
    return ((measured.double() - expected).norm() / expected.norm()).item()


def gradients_and_loss(loss, *leaves):
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def leaves(embedding_size, weight_size, dtype=torch.float32):
    torch.manual_seed(0)
    x, w = torch.randn(N, D) * embedding_size, torch.randn(C, D) * weight_size
    return [t.to(dtype).requires_grad_() for t in (x, w)], torch.randint(C, (N,))


@pytest.mark.parametrize("workspace_mb", KEPT, ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", [1e3, 1e6, 1e7, 1e9, 1e10])
def test_large_logits(size, workspace_mb):
    (x, w), y = leaves(size, 1.0)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    expected = gradients_and_loss(F.cross_entropy(exact[0] @ exact[1].t(), y), *exact)
    loss = fm.functional.linear_cross_entropy(x, w, y, workspace_mb=workspace_mb)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured, right) < 1e-6
    cosine = F.normalize(exact[0]) @ F.normalize(exact[1]).t()
    expected = gradients_and_loss(F.cross_entropy(exact[0].norm(dim=1, keepdim=True) * cosine, y), *exact)
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(), None, workspace_mb=workspace_mb)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured, right) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_beyond_the_range_are_no_number(dtype):
    (x, w), y = leaves(1e15, 1.0, dtype)
    for loss in (
        fm.functional.linear_cross_entropy(x, w, y),
        fm.functional.margin_cross_entropy(x, w, y, fm.Margin(), None),
    ):
        found = gradients_and_loss(loss, x, w)
        assert found[0].isnan()


@pytest.mark.parametrize("workspace_mb", KEPT, ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e10, 1e19, 1e24, 1e30])
def test_lengths_of_class_weights(size, workspace_mb):
    """torch.nn.functional.normalize stops at 1e19, where the square of a float32 is infinite."""
    (x, w), y = leaves(1.0, size)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    unit = F.normalize(exact[1], eps=1e-300)
    nearest = (unit @ unit.t()).fill_diagonal_(-2.0).amax(1).mean()
    expected = gradients_and_loss(F.cross_entropy(64 * F.normalize(exact[0]) @ unit.t(), y) + nearest, *exact)
    loss = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(), exclusive_weight=1.0, workspace_mb=workspace_mb)
    for measured, right in zip(gradients_and_loss(loss, x, w), expected, strict=True):
        assert error(measured.double() * size, right * size) < 2e-6
