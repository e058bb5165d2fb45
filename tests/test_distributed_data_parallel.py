"""DistributedDataParallel around a module whose loss divides the classes: refused, unless it leaves the class weights alone."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fused_margin as fm
from fused_margin.compat.insightface import ArcFace, PartialFC_V2

C, D = 12, 6
LOSSES = {
    "margin": lambda group: fm.ArcFaceLoss(C, D, scale=8.0, process_group=group),
    "softmax": lambda group: fm.SoftmaxLoss(C, D, bias=False, process_group=group),
    "insightface": lambda group: PartialFC_V2(ArcFace(8.0), D, C, process_group=group),
}


class Model(nn.Module):
    def __init__(self, loss_fn):
        super().__init__()
        self.backbone, self.loss_fn = nn.Linear(D, D), loss_fn

    def forward(self, x, y):
        return self.loss_fn(self.backbone(x), y)


def wrap(group, name, ignore):
    """A model, DistributedDataParallel of it, and a batch; class weights and samples differ between ranks."""
    torch.manual_seed(group.rank())
    model = Model(LOSSES[name](group))
    if ignore:
        model._ddp_params_and_buffers_to_ignore = ["loss_fn.weight"]
    return model, DistributedDataParallel(model, process_group=group), torch.randn(4, D), torch.randint(C, (4,))


def refused(group, name):
    _, wrapped, x, y = wrap(group, name, ignore=False)
    try:
        wrapped(x, y)
    except ValueError as error:
        return str(error)
    return "no error"


def ignored(group, name, in_backward):
    """Largest differences of class weights after a step within DistributedDataParallel and outside of it."""
    model, wrapped, x, y = wrap(group, name, ignore=True)
    alone = copy.deepcopy(model.loss_fn)
    for loss_fn, loss_of in ((model.loss_fn, wrapped), (alone, lambda x, y: alone(model.backbone(x).detach(), y))):
        optimizer = fm.optim.ProjectedSGD(loss_fn.parameters(), lr=0.1)
        if in_backward:
            fm.optim.step_in_backward(loss_fn, optimizer)
        loss_of(x, y).backward()
        optimizer.step()
    gc.collect()  # DistributedDataParallel must not be the last to hold the group
    return (model.loss_fn.weight - alone.weight).abs().max().item()


def averaged_over_another_group(group):
    """Each rank has all classes in a group of its own, so that DistributedDataParallel may average their gradients."""
    rank = group.rank()
    own = torch.distributed.new_group([rank], use_local_synchronization=True)
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(Model(LOSSES["margin"](own)), process_group=group)
    wrapped(torch.randn(4, D), torch.randint(C, (4,))).backward()
    return wrapped.module.loss_fn.weight.grad


@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_inside_are_refused(ranks, name):
    for message in ranks.run(refused, [(name,)] * 2):
        assert message.startswith("weight: expected class weights outside of DistributedDataParallel")


def center_loss_inside(group):
    """DistributedDataParallel would copy the centers of the first rank to all ranks."""
    wrapped = DistributedDataParallel(Model(fm.CenterLoss(C, D, process_group=group)), process_group=group)
    with pytest.raises(ValueError, match="centers: expected class weights outside of DistributedDataParallel"):
        wrapped(torch.randn(4, D), torch.randint(C, (4,)))


def test_centers_inside_are_refused(ranks):
    ranks.run(center_loss_inside, [()] * 2)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_ignored_class_weights_train(ranks, name, in_backward):
    assert max(ranks.run(ignored, [(name, in_backward)] * 2)) < 1e-6


def test_groups_of_ranks_may_average(ranks):
    first, second = ranks.run(averaged_over_another_group, [(), ()])
    assert torch.equal(first, second) and first.abs().sum() > 0
