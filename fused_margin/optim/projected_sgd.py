"""Projected gradient descent for class weights: every step ends with a projection of each row onto the unit sphere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.row_update import DTYPES, RowUpdate, Rule
from fused_margin._ops.weight_steps import step_rows

BLOCK = 2**24  # elements that are projected at a time, because torch copies them as float64


@torch.no_grad()
def project_(weight: Tensor) -> Tensor:
    """Divides every row of the class weights by its L2 norm, in place. Zero rows stay zero.

    Args:
        weight: (C, D).

    Returns:
        ``weight``.

    Raises:
        ValueError, TypeError: for a wrong shape or dtype.

    Examples:
        >>> import torch
        >>> from fused_margin.optim import project_
        >>> project_(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[0.6000, 0.8000],
                [0.0000, 0.0000]])
    """
    _checks.class_weights(weight, at_least=0)  # a rank may have no classes
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for rows in weight.split(max(1, BLOCK // weight.shape[1])):
        norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)  # no underflow of squares
        rows.mul_(norm.masked_fill_(norm == 0, 1.0).reciprocal_().to(dtype))
    return weight


def start_momentum(optimizer: torch.optim.SGD, parameter: Tensor) -> None:
    """Creates the momentum buffer of a parameter, filled with zeros.

    A checkpoint of ``torch.distributed.checkpoint`` can then be loaded before the first step.

    Args:
        optimizer: an SGD optimizer of the parameter.
        parameter: the parameter. Its momentum stays if it has one.

    Examples:
        >>> import torch
        >>> from fused_margin.optim import ProjectedSGD, start_momentum
        >>> weight = torch.nn.Parameter(torch.eye(2))
        >>> optimizer = ProjectedSGD([weight], lr=0.1)
        >>> start_momentum(optimizer, weight)
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([[0., 0.],
                [0., 0.]])
    """
    state = optimizer.state[parameter]
    if state.get("momentum_buffer") is None:
        state["momentum_buffer"] = torch.zeros_like(parameter)


class ProjectedSGD(torch.optim.SGD):
    """SGD with a projection of the class weights onto the unit sphere.

    ``W <- normalize(W - lr * update)`` (RegularFace, CVPR 2019, sec. 3.4), for the (C, D) class weights of a margin
    loss. Parameters of a group with ``project=False`` take a plain SGD step, so that one optimizer can serve the
    backbone and the class weights. With a sparse gradient (of a loss with ``sample_rate < 1`` and ``sparse=True``), the
    step changes only the gradient's rows and their momentum.

    Args:
        params: parameters or groups, as in ``torch.optim.SGD``.
        lr, momentum, weight_decay: as in ``torch.optim.SGD``.

    Raises:
        ValueError: for a parameter to project that is not a matrix.

    Examples:
        >>> import torch, fused_margin
        >>> backbone = torch.nn.Linear(8, 4)
        >>> loss_fn = fused_margin.ArcFaceLoss(num_classes=10, embedding_size=4)
        >>> backbone_group = {"params": backbone.parameters(), "project": False}
        >>> optimizer = fused_margin.optim.ProjectedSGD([{"params": loss_fn.parameters()}, backbone_group], lr=0.1)
        >>> loss_fn(backbone(torch.randn(3, 8)), torch.tensor([0, 3, 7])).backward()
        >>> optimizer.step()
        >>> torch.allclose(loss_fn.weight.norm(dim=1), torch.ones(10))
        True
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if self.param_groups[-1].setdefault("project", True):
            for p in self.param_groups[-1]["params"]:
                _checks.class_weights(p, name="params", at_least=0)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("project", True)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step.

        Args:
            closure: as in ``torch.optim.SGD``.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = self._take_gradients()
        super().step()
        for group in self.param_groups:
            for p in group["params"] if group["project"] else ():
                if p.grad is not None:
                    project_(p)
        for p, gradient, group in taken:
            p.grad = gradient
            self._step_rows(p, gradient, group)
        return loss

    def _take_gradients(self) -> list[tuple[Tensor, Tensor, dict]]:
        """Removes the gradients that `_step_rows` steps by, so that torch's step leaves out their parameters."""
        taken = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.is_sparse and not _is_plain(group):
                    raise ValueError("optimizer: sparse gradients need nesterov=False, maximize=False and dampening=0")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and (p.grad.is_sparse or (group["project"] and _has_kernel(p, group))):
                    taken.append((p, p.grad, group))
                    p.grad = None
        return taken

    @torch.no_grad()
    def _step_rows(self, p: Tensor, gradient: Tensor, group: dict) -> None:
        """Makes an SGD step of all rows, or of the rows of a sparse gradient."""
        rows = None
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            rows, gradient = gradient.indices()[0], gradient.values()
        momentum = None
        if group["momentum"]:
            start_momentum(self, p)
            momentum = self.state[p]["momentum_buffer"]
        update = RowUpdate(
            momentum, None, Rule.SGD, float(group["lr"]), beta1=float(group["momentum"]),
            weight_decay=float(group["weight_decay"]), project=group["project"],
        )  # fmt: skip
        if rows is None or _has_kernel(p, group):
            step_rows(p, gradient, rows, *update)
            return
        dtype = torch.promote_types(p.dtype, torch.float32)
        moved, moved_momentum = (None if t is None else t[rows].to(dtype) for t in (p, momentum))
        assert moved is not None
        step_rows(moved, gradient, None, *update._replace(momentum=moved_momentum))
        p[rows] = moved.to(p.dtype)
        if momentum is not None and moved_momentum is not None:
            momentum[rows] = moved_momentum.to(p.dtype)


def _is_plain(group: dict) -> bool:
    return not (group["nesterov"] or group["maximize"] or group["dampening"])


def _has_kernel(p: Tensor, group: dict) -> bool:
    """Whether the kernel can make the step of a parameter to project, and the projection."""
    return _is_plain(group) and p.dtype in DTYPES and p.is_contiguous()
