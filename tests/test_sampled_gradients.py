"""Gradients of sampled classes: dense or sparse, under optimizers and DistributedDataParallel."""

import pytest
import torch
from loss_inputs import problem
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm


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
    """Gradients are dense by default and equal the sparse ones; the step equals that of a dense parameter."""
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
    torch.manual_seed(1 + len(y))  # each rank samples its own classes
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
