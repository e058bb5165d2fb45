"""The step of a loss, forward and backward, and its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin.benchmark.contestants import Build, Loss
from fused_margin.benchmark.memory import high_water, mark
from fused_margin.benchmark.problems import Answer, Inputs
from fused_margin.benchmark.timing import Step


class LossStep:
    """Forward and backward of a scalar loss. Gradients are set to None first, as optimizers do.

    `loss_scale` multiplies the loss, as a GradScaler does: gradients of half-precision logits would vanish in fp16.
    """

    def __init__(self, loss: Loss, inputs: Inputs, parameter: Tensor | None = None, loss_scale: float = 1.0):
        self.loss = loss
        self.loss_scale = loss_scale
        self.upstream = None if loss_scale == 1.0 else torch.tensor(loss_scale, device=inputs.weight.device)
        self.embeddings = inputs.embeddings
        self.labels = inputs.labels
        self.parameter = inputs.weight if parameter is None else parameter
        self.transposed = parameter is not None  # a peer's own parameter is (D, C)

    def __call__(self, turn: int) -> Tensor:
        batch = turn % len(self.embeddings)
        embeddings, labels = self.embeddings[batch], self.labels[batch]
        embeddings.grad = self.parameter.grad = None
        loss = self.loss(embeddings, self.parameter, labels)
        loss.backward(self.upstream)
        return loss.detach()

    def answer(self, turn: int) -> Answer:
        """Run the step once and return the loss and the gradients."""
        loss = self(turn)
        gradients = self.embeddings[turn % len(self.embeddings)].grad, self.parameter.grad
        if self.upstream is not None:
            gradients = [gradient / self.loss_scale for gradient in gradients]
        embeddings, parameter = gradients
        return Answer(loss, embeddings, parameter.t() if self.transposed else parameter)

    def touch_gradients(self) -> None:
        """Allocate and write every gradient buffer, as earlier steps of a training have done."""
        for leaf in (*self.embeddings, self.parameter):
            leaf.grad = torch.ones_like(leaf)


def loss_step(loss: Loss) -> Build:
    return lambda inputs: LossStep(loss, inputs)


def peak_bytes(step: Step, device: str) -> int:
    """Peak memory of two steps above the memory in use before them.

    The second step shows the memory that a contestant keeps from one step to the next.
    """
    if isinstance(step, LossStep):
        step.touch_gradients()
    before = mark(device)
    for turn in range(2):
        step(turn)
    return max(0, high_water(device) - before)
