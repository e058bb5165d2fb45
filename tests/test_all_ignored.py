"""Batches without a valid label: the mean is NaN and gradients are 0, as in torch.nn.functional.cross_entropy."""

import pytest
import torch
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.compat import insightface

N, C, D = 6, 20, 16
IGNORED = torch.full((N,), -100)
LOSSES = [
    "ArcFaceLoss", "CosFaceLoss", "NormFaceLoss", "SphereFaceLoss", "CombinedMarginLoss", "SubCenterArcFaceLoss",
    "ModifiedSoftmaxLoss", "AdaFaceLoss", "MagFaceLoss", "ElasticFaceLoss", "CurricularFaceLoss", "LSoftmaxLoss",
    "SoftmaxLoss", "L2SoftmaxLoss",
]  # fmt: skip
SMOOTHED = ["ArcFaceLoss", "SphereFaceLoss", "MagFaceLoss", "SoftmaxLoss"]


def assert_zero_gradients(loss, *leaves):
    assert loss.isnan()
    loss.backward()
    for leaf in leaves:
        assert leaf.grad is None or not leaf.grad.to_dense().any()  # not NaN either
    assert any(leaf.grad is not None for leaf in leaves)


def embeddings(samples=N):
    return torch.randn(samples, D, requires_grad=True)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("samples", [N, 0], ids=["all ignored", "empty batch"])
def test_every_loss(name, samples):
    loss_fn, x = getattr(fm, name)(C, D), embeddings(samples)
    assert_zero_gradients(loss_fn(x, IGNORED[:samples]), x, *loss_fn.parameters())


@pytest.mark.parametrize("name", SMOOTHED)
def test_label_smoothing(name):
    loss_fn, x = getattr(fm, name)(C, D, label_smoothing=0.1), embeddings()
    assert_zero_gradients(loss_fn(x, IGNORED), x, *loss_fn.parameters())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", SMOOTHED)
def test_class_weights_that_sum_to_zero(name, label_smoothing):
    class_weight = torch.ones(C).index_fill(0, torch.arange(3), 0.0)
    loss_fn, x = getattr(fm, name)(C, D, class_weight=class_weight, label_smoothing=label_smoothing), embeddings()
    labels = torch.arange(N) % 3
    if label_smoothing:  # other classes' weights are in the numerator
        assert not loss_fn(x, labels).isfinite()
    else:
        assert_zero_gradients(loss_fn(x, labels), x, *loss_fn.parameters())


def test_sampled_classes():
    loss_fn, x = fm.ArcFaceLoss(C, D, sample_rate=0.5), embeddings()
    assert_zero_gradients(loss_fn(x, IGNORED), x, loss_fn.weight)


def test_exclusive_term_is_still_computed():
    """Its gradient depends on the class weights alone."""
    loss_fn, x = fm.ArcFaceLoss(C, D, exclusive_weight=2.0), embeddings()
    loss_fn(x, IGNORED).backward()
    alone = loss_fn.weight.detach().clone().requires_grad_()
    (2.0 * fm.functional.exclusive_regularization(alone)).backward()
    torch.testing.assert_close(loss_fn.weight.grad, alone.grad)
    assert not x.grad.any()


def test_insightface_drop_in():
    head, x = insightface.PartialFC_V2(insightface.ArcFace(), D, C), embeddings()
    loss = head(x, IGNORED)
    loss.backward()
    assert not x.grad.any() and not head.weight.grad.to_dense().any()


@pytest.mark.parametrize("margin", [None, fm.Margin(m1=2.0)], ids=["softmax", "L-softmax"])
def test_linear_cross_entropy(margin):
    x, w = embeddings(), torch.randn(C, D, requires_grad=True)
    assert_zero_gradients(fm.functional.linear_cross_entropy(x, w, IGNORED, margin=margin), x, w)


@pytest.mark.parametrize(
    "loss_fn",
    [fm.RingLoss(), fm.RingLoss(2.0), fm.CenterLoss(C, D), fm.SelfGroupingLoss(D)],
    ids=["new", "ring", "center", "groups"],
)
def test_auxiliary_losses(loss_fn):
    x = embeddings()
    assert_zero_gradients(loss_fn(x, IGNORED), x, *loss_fn.parameters())
    assert all(value.isfinite().all() for value in loss_fn.state_dict().values())


def test_gradient_accumulation_keeps_weights_finite():
    torch.manual_seed(0)
    loss_fn = fm.ArcFaceLoss(C, D)
    for step in range(4):
        labels = IGNORED if step == 2 else torch.randint(C, (N,))
        (loss_fn(torch.randn(N, D), labels) / 4).backward()
    torch.optim.SGD(loss_fn.parameters(), 0.1).step()
    assert loss_fn.weight.isfinite().all()


def test_torch_cross_entropy():
    logits = torch.randn(N, C, requires_grad=True)
    assert_zero_gradients(F.cross_entropy(logits, IGNORED), logits)
