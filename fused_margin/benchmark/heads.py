"""Heads: a loss, its class weights and their optimizer, and the three phases of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_margin as fm

from .contestants import Contestant, Loss
from .losses import OBJECTIVES, WORKSPACE_MB, LossName, Objective, has_peer
from .problems import BLOCK, SCALE, Inputs, Shape, make_inputs
from .timing import moments

IN_BACKWARD = "ours, step in backward"
STORED = "ours, gradient stored"
COMPILED = "torch.compile lean {} + SGD(fused=True)"
EAGER = "eager lean {} + SGD(fused=True)"
PML = "pytorch-metric-learning {} + SGD(fused=True)"
ALONE = "ours, forward + backward alone"  # not a contestant: it makes no step
DEFAULT_MODE, TUNED_MODE = "default", "max-autotune-no-cudagraphs"  # of torch.compile

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


@dataclass(frozen=True)
class Comparison:
    """What is compared."""

    loss: LossName = "arcface"
    dtype: str = "float32"
    modes: tuple[str, ...] = (DEFAULT_MODE, TUNED_MODE)  # of torch.compile; none: without it
    peers: bool = True

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.loss]

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def tolerance(self) -> float:
        """Largest relative error of a loss: logits up to the scale are rounded in half precision."""
        return 1e-5 if self.torch_dtype.itemsize >= 4 else 2e-2


class Phases(NamedTuple):
    """Seconds of the three phases of one step, timed within the same step."""

    forward: float
    backward: float
    optimizer: float  # step and zero_grad

    @property
    def whole(self) -> float:
        return sum(self)


class Head:
    """A loss of embeddings and labels, its class weights, and their optimizer. Calling it makes one training step."""

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        parameter: nn.Parameter,
        optimizer: torch.optim.Optimizer | None,
        inputs: Inputs,
        handle: fm.optim.StepInBackward | None = None,
    ):
        """
        Args:
            optimizer: None for forward and backward alone.
            handle: of a step in the backward.
        """
        self.loss, self.parameter, self.optimizer, self.handle = loss, parameter, optimizer, handle
        self.embeddings, self.labels = inputs.embeddings, inputs.labels
        self.last_loss = math.nan

    def forward(self, turn: int) -> Tensor:
        batch = turn % len(self.embeddings)
        return self.loss(self.embeddings[batch], self.labels[batch])

    def update(self) -> None:
        """The optimizer's step; then gradients become None, the default of zero_grad."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.parameter.grad = None
        for each in self.embeddings:
            each.grad = None

    def phases(self, turn: int, device: str) -> Phases:
        """Make one step and time its phases: by wall clock on a CPU, from event to event on a GPU."""
        moment, seconds = moments(device)
        moment()
        loss = self.forward(turn)
        moment()
        loss.backward()
        moment()
        self.update()
        moment()
        phases = Phases(*seconds())
        self.last_loss = float(loss.detach())
        return phases

    def __call__(self, turn: int) -> None:
        self.forward(turn).backward()
        self.update()

    def close(self) -> None:
        if self.handle is not None:
            self.handle.remove()


BuildHead = Callable[[Inputs], Head]


def time_phases(head: Head, turn: int, device: str) -> Phases:
    return head.phases(turn, device)


def unit_inputs(shape: Shape, device: str, batches: int = 4, dtype: torch.dtype = torch.float32) -> Inputs:
    """The inputs of the comparison, with class weights of length 1, as after a projection."""
    inputs = make_inputs(shape, device, batches)
    for rows in inputs.weight.detach().split(BLOCK):
        rows.copy_(F.normalize(rows))
    if dtype == torch.float32:
        return inputs

    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).requires_grad_()

    return Inputs([convert(each) for each in inputs.embeddings], inputs.labels, convert(inputs.weight))


def our_head(
    loss_fn: fm.MarginLoss, inputs: Inputs, *, in_backward: bool, lr: float = LR, optimizer: bool = True
) -> Head:
    """The head of a loss of this library, whose class weights have their values."""
    if not optimizer:
        return Head(loss_fn, loss_fn.weight, None, inputs)
    sgd = fm.optim.ProjectedSGD(loss_fn.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    handle = fm.optim.step_in_backward(loss_fn, sgd) if in_backward else None
    return Head(loss_fn, loss_fn.weight, sgd, inputs, handle)


def _ours(objective: Objective, *, in_backward: bool, optimizer: bool = True) -> BuildHead:
    def build(inputs: Inputs) -> Head:
        weight = inputs.weight.detach()
        num_classes, embedding_size = weight.shape
        loss_fn = objective.loss_class(
            num_classes, embedding_size, scale=SCALE, workspace_mb=WORKSPACE_MB, device=weight.device,
            dtype=weight.dtype, **objective.arguments,
        )  # fmt: skip
        loss_fn.weight.detach().copy_(weight)
        return our_head(loss_fn, inputs, in_backward=in_backward, optimizer=optimizer)

    return build


def alone(comparison: Comparison, inputs: Inputs) -> Head:
    return _ours(comparison.objective, in_backward=False, optimizer=False)(inputs)


def fused_sgd(parameter: nn.Parameter) -> torch.optim.SGD:
    return torch.optim.SGD([parameter], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


def _peer(loss: Loss, mode: str | None = None) -> BuildHead:
    """mode: of torch.compile; None for eager."""

    def build(inputs: Inputs) -> Head:
        run = loss
        if mode is not None:
            # A function compiled for many shapes reaches the recompilation limit and runs uncompiled.
            torch.compiler.reset()
            run = torch.compile(loss, mode=mode, dynamic=False)
        weight = nn.Parameter(inputs.weight.detach().clone())
        return Head(lambda embeddings, labels: run(embeddings, weight, labels), weight, fused_sgd(weight), inputs)

    return build


def _pml(objective: Objective) -> BuildHead:
    """The class weights are a parameter (D, C) of the loss."""

    def build(inputs: Inputs) -> Head:
        head = objective.make_peer(*inputs.weight.shape)
        parameter = nn.Parameter(inputs.weight.detach().t().contiguous())
        head.register_parameter("W", parameter)
        return Head(head, parameter, fused_sgd(parameter), inputs)

    return build


def contestants(comparison: Comparison) -> list[Contestant[Head]]:
    objective = comparison.objective
    workspace = f"workspace_mb={WORKSPACE_MB}"
    variants: dict[str, dict[str, BuildHead]] = {
        IN_BACKWARD: {workspace: _ours(objective, in_backward=True)},
        STORED: {workspace: _ours(objective, in_backward=False)},
    }
    if comparison.peers:
        form, eager = next(iter(objective.forms.items()))
        variants |= {
            COMPILED.format(objective.title): {
                f"{form}, {mode}": _peer(loss, mode)
                for form, loss in objective.forms.items()
                for mode in comparison.modes
            },
            EAGER.format(objective.title): {form: _peer(eager)},
        }
        if has_peer():
            variants[PML.format(objective.peer[0])] = {"defaults": _pml(objective)}
    return [
        Contestant(name, comparison.loss, builds, IN_BACKWARD, loss_tolerance=comparison.tolerance)
        for name, builds in variants.items()
        if builds
    ]
