"""State that a forward in training mode moves: its precision under casts, and under activation checkpointing."""

import copy
import pickle
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin.running_state import recomputing

LOSSES = ["SphereFaceLoss", "LSoftmaxLoss", "AdaFaceLoss", "CurricularFaceLoss"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def labels():
    return torch.arange(16) * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_casts_leave_the_dtype_of_the_state(name, dtype):
    loss_fn = getattr(fm, name)(50, 32)
    loss_fn(torch.randn(16, 32), labels())
    before = {key: value.clone() for key, value in loss_fn.named_buffers()}
    loss_fn.to(dtype)
    assert loss_fn.weight.dtype == dtype and before
    for key, value in loss_fn.named_buffers():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    loss_fn(torch.randn(16, 32, dtype=dtype), labels()).backward()
    assert loss_fn.weight.grad.dtype == dtype


def test_the_running_mean_of_norms_moves_in_bfloat16():
    loss_fn = fm.AdaFaceLoss(50, 32).bfloat16()
    embeddings = torch.full((16, 32), 4.5, dtype=torch.bfloat16)
    for _ in range(400):
        loss_fn(embeddings, labels())
    norm = 4.5 * 32**0.5
    assert loss_fn.norm_mean.item() == pytest.approx(norm + (20.0 - norm) * 0.99**400, rel=1e-9)


def test_state_moves_between_devices_and_through_state_dicts():
    loss_fn = fm.CurricularFaceLoss(50, 32)
    loss_fn(torch.randn(16, 32), labels())
    assert loss_fn.to("meta").t.dtype == torch.float64
    other = fm.CurricularFaceLoss(50, 32).half()
    other.load_state_dict({"weight": torch.zeros(50, 32), "t": torch.tensor([0.3], dtype=torch.float32)})
    assert other.t.dtype == torch.float64 and other.t.item() == pytest.approx(0.3, abs=1e-7)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensor hooks", "reentrant"])
@pytest.mark.parametrize("name", [*LOSSES, "ElasticFaceLoss", "ArcFaceLoss"])
def test_activation_checkpointing(name, use_reentrant):
    torch.manual_seed(0)
    plain = getattr(fm, name)(50, 32)
    other = copy.deepcopy(plain)
    for step in range(3):
        x = (3 * torch.randn(16, 32)).requires_grad_()
        again = x.detach().clone().requires_grad_()
        torch.manual_seed(step)
        plain(x, labels()).backward()
        torch.manual_seed(step)
        y = labels()
        checkpoint(other, again, y, use_reentrant=use_reentrant).backward()
        torch.testing.assert_close(again.grad, x.grad, rtol=0, atol=0)
    for (key, value), expected in zip(other.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, expected), key


@pytest.mark.parametrize("refresh", ["certified", 2])
def test_activation_checkpointing_of_the_exclusive_term(refresh):
    torch.manual_seed(0)
    plain = fm.ArcFaceLoss(50, 32, exclusive_weight=1.0, exclusive_refresh=refresh)
    other = copy.deepcopy(plain)
    for _ in range(3):
        x, y = torch.randn(16, 32, requires_grad=True), labels()
        for loss_fn in (plain, other):
            loss_fn.zero_grad()
        plain(x, y).backward()
        checkpoint(other, x, y, use_reentrant=False).backward()
        assert torch.equal(plain.weight.grad, other.weight.grad)
        with torch.no_grad():
            for loss_fn in (plain, other):
                loss_fn.weight.sub_(0.1 * plain.weight.grad)
    for (key, value), expected in zip(other.exclusive.named_buffers(), plain.exclusive.buffers(), strict=True):
        assert torch.equal(value[0], expected[0]), key


def test_a_forward_that_is_not_the_last_is_warned_of_once():
    loss_fn = fm.AdaFaceLoss(50, 32)
    batches = [(torch.randn(16, 32, requires_grad=True), labels()) for _ in range(3)]
    losses = [checkpoint(loss_fn, *batch, use_reentrant=False) for batch in batches]
    state = loss_fn.norm_mean.clone()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.stack(losses).sum().backward()
    assert torch.equal(loss_fn.norm_mean, state)
    said = [str(each.message) for each in seen if "activation checkpointing" in str(each.message)]
    assert len(said) == 1 and said[0].startswith("AdaFaceLoss: activation checkpointing runs again a forward")


def test_center_loss_moves_its_centers_once():
    loss_fn, x = fm.CenterLoss(50, 32), torch.randn(16, 32, requires_grad=True)
    expected = copy.deepcopy(loss_fn)
    expected(x, labels())
    checkpoint(loss_fn, x, labels(), use_reentrant=False).backward()
    assert torch.equal(loss_fn.centers, expected.centers)


def test_recomputing_is_known():
    """A private function of torch tells it; this fails where that no longer does."""
    seen = []

    def forward(x):
        seen.append(recomputing())
        return x.sin()

    checkpoint(forward, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True] and not recomputing()


def test_modules_stay_picklable():
    loss_fn = fm.AdaFaceLoss(50, 32)
    loss_fn(torch.randn(16, 32), labels())
    assert torch.equal(pickle.loads(pickle.dumps(loss_fn)).norm_mean, loss_fn.norm_mean)
