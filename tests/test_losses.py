"""The loss modules: the conventions of nn.Module, and the margin of each paper."""

import copy
import warnings

import numpy as np
import pytest
import torch
from loss_inputs import leaf, problem, relative_error

import fused_margin as fm
from fused_margin import reference

MODULES = {
    "arcface": (fm.ArcFaceLoss, {"m2": 0.5}, 64.0),
    "cosface": (fm.CosFaceLoss, {"m3": 0.35}, 64.0),
    "normface": (fm.NormFaceLoss, {}, 64.0),
    "combined": (fm.CombinedMarginLoss, {"m1": 1.0, "m2": 0.3, "m3": 0.2}, 64.0),
    "sphereface": (fm.SphereFaceLoss, {"m1": 4.0, "annealing": 1000.0}, None),
    "modified softmax": (fm.ModifiedSoftmaxLoss, {}, None),
}


@pytest.mark.parametrize("name", MODULES)
def test_defaults_match_the_papers(name):
    module, margin, scale = MODULES[name]
    x, _, y = problem(12, 30, 8, spread=1.0)
    loss_fn = module(30, 8, exclusive_weight=0.5, dtype=torch.float64)
    a = leaf(x)
    loss = loss_fn(a, y)
    loss.backward()
    b, w = leaf(x), leaf(loss_fn.weight)
    expected = reference.margin_cross_entropy(b, w, y, margin, scale, exclusive_weight=0.5)
    expected.backward()
    assert relative_error(loss, expected) < 1e-12
    assert relative_error(a.grad, b.grad) < 1e-10
    assert relative_error(loss_fn.weight.grad, w.grad) < 1e-10


@pytest.mark.parametrize("name", MODULES)
def test_module_conventions(name):
    module = MODULES[name][0]
    loss_fn = module(30, 8, class_weight=torch.rand(30))
    assert list(dict(loss_fn.named_parameters())) == ["weight"]
    assert loss_fn.weight.shape == (30, 8) and abs(loss_fn.weight.std() - 0.01) < 0.003
    clone = copy.deepcopy(loss_fn)
    other = module(30, 8, class_weight=torch.ones(30))
    other.load_state_dict(loss_fn.state_dict())
    x, _, y = problem(6, 30, 8)
    expected = loss_fn(x.float(), y)
    assert torch.equal(clone(x.float(), y), expected) and torch.equal(other(x.float(), y), expected)
    assert "num_classes=30" in repr(loss_fn)
    assert module(30, 8, dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert module(30, 8, device="meta").weight.is_meta


def test_combined_presets():
    """The margins in the ArcFace paper's table."""
    assert fm.CombinedMarginLoss(30, 8, **fm.margins.CM1).margin_function == fm.Margin(1.0, 0.3, 0.2)
    assert fm.CombinedMarginLoss(30, 8, **fm.margins.CM2).margin_function == fm.Margin(0.9, 0.4, 0.15)


def test_small_scale_warning():
    """The bound for 1,001 classes and probability 0.9 is 1000 / 1001 * log(9000) = 9.096."""
    with pytest.warns(UserWarning, match=r"scale 9 is below 9\.10") as caught:
        fm.ArcFaceLoss(1001, 8, scale=9)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.ArcFaceLoss(1001, 8, scale=9.1)
        fm.ArcFaceLoss(1, 8, scale=0.1)
        fm.SphereFaceLoss(1001, 8)


def test_scale_as_tensor():
    x, _, y = problem(6, 30, 8)
    fixed = fm.ArcFaceLoss(30, 8, scale=torch.tensor(20.0), dtype=torch.float64)
    learned = fm.ArcFaceLoss(30, 8, scale=torch.nn.Parameter(torch.tensor(20.0)), dtype=torch.float64)
    assert fixed.state_dict()["scale"] == 20 and list(dict(learned.named_parameters())) == ["weight", "scale"]
    fixed.load_state_dict(learned.state_dict())
    assert torch.equal(fixed(x, y), learned(x, y))
    learned(x, y).backward()
    assert learned.scale.grad.abs() > 0
    with pytest.raises(ValueError, match="scale: expected a number or a 0-d tensor"):
        fm.ArcFaceLoss(30, 8, scale=torch.ones(6))


def test_numpy_numbers():
    x, _, y = problem(6, 30, 8)
    loss_fn = fm.ArcFaceLoss(
        np.int64(30), np.int32(8), margin=np.float32(0.5), scale=np.float32(64), dtype=torch.float64
    )
    assert torch.equal(loss_fn(x, y), fm.functional.margin_cross_entropy(x, loss_fn.weight, y, fm.Margin(m2=0.5)))
    with pytest.raises(ValueError, match="margin: expected a number"):
        fm.ArcFaceLoss(30, 8, margin=float("nan"))


def test_logits_are_scaled_cosines_without_margin():
    x, _, _ = problem(5, 30, 8)
    for module, scale in ((fm.ArcFaceLoss, 64.0), (fm.SphereFaceLoss, None)):
        loss_fn = module(30, 8, dtype=torch.float64)
        cosine = reference.normalize(x) @ reference.normalize(loss_fn.weight).t()
        expected = cosine * (x.norm(dim=1, keepdim=True) if scale is None else scale)
        torch.testing.assert_close(loss_fn.logits(x), expected)
        assert loss_fn.logits(x.bfloat16()).shape == (5, 30)


def test_sphereface_annealing():
    """lambda = max(5, 1000 / (1 + 0.12 iteration)); evaluation does not count; the state dict has the iteration."""
    x, _, y = problem(6, 30, 8)
    loss_fn = fm.SphereFaceLoss(30, 8, dtype=torch.float64)
    for iteration in range(3):
        expected = reference.margin_cross_entropy(
            x, loss_fn.weight, y, {"m1": 4.0, "annealing": 1000 / (1 + 0.12 * iteration)}, None
        )
        loss_fn.eval()
        torch.testing.assert_close(loss_fn(x, y), expected)
        loss_fn.train()
        torch.testing.assert_close(loss_fn(x, y), expected)
    assert loss_fn.state_dict()["iteration"] == 3
    loss_fn.iteration.fill_(1_000_000)
    expected = reference.margin_cross_entropy(x, loss_fn.weight, y, {"m1": 4.0, "annealing": 5.0}, None)
    torch.testing.assert_close(loss_fn(x, y), expected)
    assert "iteration" not in fm.SphereFaceLoss(30, 8, annealing=False).state_dict()


def test_training_separates_classes():
    """A few steps with projected weights reduce the loss and the exclusive term."""
    generator = torch.Generator().manual_seed(7)
    centers = torch.randn(40, 16, generator=generator)
    loss_fn = fm.ArcFaceLoss(40, 16, scale=16.0, exclusive_weight=0.1)
    optimizer = fm.optim.ProjectedSGD(loss_fn.parameters(), lr=0.5)
    losses, labels = [], torch.arange(40).repeat(4)
    for _ in range(60):
        optimizer.zero_grad()
        noise = torch.randn(160, 16, generator=generator)
        loss = loss_fn(centers[labels] + 0.3 * noise, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert loss_fn.logits(centers).argmax(1).eq(torch.arange(40)).all()
