"""Heads: a loss, its class weights and their optimizer, and the three phases of a training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_margin as fm

from ..common.contestants import Build, Contestant, Loss
from ..common.problems import BLOCK, MARGIN, SCALE, Inputs, Shape, make_inputs
from ..common.timing import moments
from ..comparison import peers

IN_BACKWARD = "ours, step in backward"
STORED = "ours, gradient stored"
COMPILED = "torch.compile lean ArcFace + SGD(fused=True)"
EAGER = "eager lean ArcFace + SGD(fused=True)"
PML = "pytorch-metric-learning ArcFaceLoss + SGD(fused=True)"
ALONE = "ours, forward + backward alone"  # not a contestant: it makes no step

LR, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4


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


def time_phases(head: Head, turn: int, device: str) -> Phases:
    return head.phases(turn, device)


def unit_inputs(shape: Shape, device: str, batches: int = 4) -> Inputs:
    """The inputs of the comparison, with class weights of length 1, as after a projection."""
    inputs = make_inputs(shape, device, batches)
    for rows in inputs.weight.detach().split(BLOCK):
        rows.copy_(F.normalize(rows))
    return inputs


def our_head(
    loss_fn: fm.ArcFaceLoss, inputs: Inputs, *, in_backward: bool, lr: float = LR, optimizer: bool = True
) -> Head:
    """The head of a loss of this library, whose class weights have their values."""
    if not optimizer:
        return Head(loss_fn, loss_fn.weight, None, inputs)
    sgd = fm.optim.ProjectedSGD(loss_fn.parameters(), lr=lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    handle = fm.optim.step_in_backward(loss_fn, sgd) if in_backward else None
    return Head(loss_fn, loss_fn.weight, sgd, inputs, handle)


def _ours(in_backward: bool, optimizer: bool = True) -> Build:
    def build(inputs: Inputs) -> Head:
        weight = inputs.weight.detach()
        loss_fn = fm.ArcFaceLoss(
            *weight.shape, margin=MARGIN, scale=SCALE, workspace_mb=peers.WORKSPACE_MB, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        loss_fn.weight.detach().copy_(weight)
        return our_head(loss_fn, inputs, in_backward=in_backward, optimizer=optimizer)

    return build


alone = _ours(in_backward=False, optimizer=False)


def fused_sgd(parameter: nn.Parameter) -> torch.optim.SGD:
    return torch.optim.SGD([parameter], lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)


def _peer(loss: Loss, mode: str | None = None) -> Build:
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


def _pml(inputs: Inputs) -> Head:
    """The margin is in degrees; the class weights are a parameter (D, C) of the loss."""
    classes, dim = inputs.weight.shape
    head = peers.ArcFaceLoss(classes, dim, margin=math.degrees(MARGIN), scale=SCALE)
    head.W = nn.Parameter(inputs.weight.detach().t().contiguous())
    return Head(head, head.W, fused_sgd(head.W), inputs)


def contestants(compiled: bool = True) -> list[Contestant]:
    compilations = {
        f"{form}, {mode}": _peer(loss, mode)
        for form, loss in (("select", peers.selecting_arcface), ("write", peers.lean_arcface))
        for mode in ("default", "max-autotune-no-cudagraphs")
    }
    workspace = f"workspace_mb={peers.WORKSPACE_MB}"
    found = [
        Contestant(IN_BACKWARD, "arcface", {workspace: _ours(in_backward=True)}, IN_BACKWARD),
        Contestant(STORED, "arcface", {workspace: _ours(in_backward=False)}, IN_BACKWARD),
        Contestant(COMPILED, "arcface", compilations, IN_BACKWARD, compiled=True),
        Contestant(EAGER, "arcface", {"in place": _peer(peers.lean_arcface)}, IN_BACKWARD),
    ]
    if peers.ArcFaceLoss is not None:
        found.append(Contestant(PML, "arcface", {"defaults": _pml}, IN_BACKWARD))
    return [each for each in found if compiled or not each.compiled]
