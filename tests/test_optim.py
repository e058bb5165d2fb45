"""Projected gradient descent."""

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.optim import ProjectedSGD, project_, step_in_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_project(dtype):
    weight = torch.randn(20, 8).to(dtype)
    weight[3] = 0
    expected = F.normalize(weight.double(), dim=1)
    result = project_(weight)
    assert result is weight
    torch.testing.assert_close(weight.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert not weight[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_projected_in_blocks(dtype, monkeypatch):
    """torch copies a bfloat16 matrix as float64 to find its norms; in one block, that is four times the weights."""
    weight = torch.randn(23, 8).to(dtype)
    whole = project_(weight.clone())
    blocks = []
    norm = torch.linalg.vector_norm
    monkeypatch.setattr("fused_margin.optim.projected_sgd.BLOCK", 80)
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda rows, **options: blocks.append(len(rows)) or norm(rows, **options)
    )
    assert torch.equal(project_(weight), whole)
    assert blocks == [10, 10, 3]


def test_project_in_place_on_strided_parameters_and_tiny_rows():
    base = torch.randn(8, 20) * 1e-25
    parameter = torch.nn.Parameter(base)
    project_(parameter.t())
    torch.testing.assert_close(parameter.t().norm(dim=1), torch.ones(20))


def test_step_is_sgd_then_normalization():
    """W <- normalize(W - lr * (momentum buffer of grad + weight_decay W))."""
    start = torch.randn(10, 4, dtype=torch.float64)
    ours, plain = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    optimizer = ProjectedSGD([ours], lr=0.1, momentum=0.9, weight_decay=0.01)
    sgd = torch.optim.SGD([plain], lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        gradient = torch.randn_like(start)
        ours.grad, plain.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        sgd.step()
        with torch.no_grad():
            plain.copy_(F.normalize(plain, dim=1))
        torch.testing.assert_close(ours, plain)


def test_groups_state_and_parameters_without_gradient():
    backbone, weight, frozen = (torch.nn.Parameter(torch.randn(6, 3)) for _ in range(3))
    bias = torch.nn.Parameter(torch.randn(3))
    optimizer = ProjectedSGD(
        [{"params": [backbone, bias], "project": False, "weight_decay": 5e-4}, {"params": [weight, frozen]}], lr=0.1
    )
    before = frozen.detach().clone()
    (backbone.sum() + weight.square().sum() + bias.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(6))
    assert not torch.allclose(backbone.norm(dim=1), torch.ones(6))
    assert torch.equal(frozen, before)  # without a gradient nothing changes
    again = ProjectedSGD([{"params": [backbone, bias], "project": False}, {"params": [weight, frozen]}], lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    assert [group["project"] for group in again.param_groups] == [False, True]
    assert again.param_groups[0]["lr"] == 0.1
    scheduler = torch.optim.lr_scheduler.StepLR(again, 1, 0.5)
    again.step()
    scheduler.step()
    assert again.param_groups[1]["lr"] == 0.05


def test_loss_that_is_stepped_in_the_backward_can_be_freed():
    loss_fn = fm.ArcFaceLoss(10, 8)
    optimizer = ProjectedSGD([loss_fn.weight], lr=0.1)
    handle = step_in_backward(loss_fn, optimizer)
    loss_fn(torch.randn(4, 8), torch.arange(4)).backward()
    optimizer.step()
    references = [weakref.ref(each) for each in (loss_fn, loss_fn.weight, optimizer, handle)]
    del loss_fn, optimizer, handle
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_seed_of_a_step_in_the_backward():
    loss_fn = fm.ArcFaceLoss(10, 8, dtype=torch.bfloat16)
    optimizer = ProjectedSGD([loss_fn.weight], lr=0.1)
    with pytest.raises(ValueError, match="seed: expected a signed 64-bit integer, got 9223372036854775808"):
        step_in_backward(loss_fn, optimizer, seed=2**63)
    for seed in (-(2**63), 2**63 - 1):
        handle = step_in_backward(loss_fn, optimizer, seed=seed)
        loss_fn(torch.randn(4, 8), torch.arange(4)).backward()
        optimizer.step()
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_sparse_steps_of_any_parameter(dtype, strided):
    """Rows of a sparse gradient are stepped also where the kernel cannot write the parameter itself."""
    start = torch.randn(6, 4).to(dtype)
    parameter = torch.nn.Parameter(start.t().contiguous().t() if strided else start.clone())
    optimizer = ProjectedSGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
    rows, values = torch.tensor([1, 4]), torch.randn(2, 4).to(dtype)
    expected, momentum = start.double(), torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(2):
        parameter.grad = torch.sparse_coo_tensor(rows.unsqueeze(0), values, (6, 4), check_invariants=True)
        optimizer.step()
        momentum[rows] = 0.9 * momentum[rows] + values.double() + 0.01 * expected[rows]
        expected[rows] = F.normalize(expected[rows] - 0.1 * momentum[rows], dim=1)
    limit = 6 * torch.finfo(dtype).eps
    torch.testing.assert_close(parameter.double(), expected, rtol=limit, atol=limit)
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"].double(), momentum, rtol=limit, atol=limit)
