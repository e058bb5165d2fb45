"""Projected gradient for class weights: after every step each row is put back on the unit sphere."""

import torch
from torch import Tensor

from fused_margin import checks


@torch.no_grad()
def project_(weight: Tensor) -> Tensor:
    """Divides every row of weight (C, D) by its L2 norm, in place, and returns it. Zero rows stay zero."""
    checks.class_weights(weight)
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True, dtype=torch.float64)  # squares of 1e-25 count too
    return weight.mul_(
        norm.masked_fill_(norm == 0, 1.0).reciprocal_().to(torch.promote_types(weight.dtype, torch.float32))
    )


class ProjectedSGD(torch.optim.SGD):
    """SGD whose every step ends on the unit sphere: ``W <- normalize(W - lr * update)`` (RegularFace, CVPR 2019, sec. 3.4).

    For the (C, D) class weights of a margin loss. Parameters of a group with ``project=False`` take a plain
    SGD step, so that one optimizer can serve backbone and class weights.

    Args:
        params: parameters or groups, as in ``torch.optim.SGD``.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.

    Raises:
        ValueError: for a parameter to project that is not a matrix.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if self.param_groups[-1].setdefault("project", True):
            for p in self.param_groups[-1]["params"]:
                checks.class_weights(p, name="params")

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("project", True)

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            if group["project"]:
                for p in group["params"]:
                    if p.grad is not None:
                        project_(p)
        return loss
