"""Measures the steps of optimizers alone, and the difference between both ways of stepping."""

from __future__ import annotations

import torch
from torch import nn

import fused_margin as fm
from fused_margin.benchmark import heads
from fused_margin.benchmark.heads import fused_sgd, our_head, unit_inputs
from fused_margin.benchmark.measure import Measurement
from fused_margin.benchmark.problems import Inputs, Shape, relative_error
from fused_margin.benchmark.timing import interleaved, time_once

from .results import FUSED, PROJECTED, THEN_PROJECTED

SMALL = Shape(32, 16, 200)  # for the check in float64


def optimizers(measurement: Measurement, classes: int, dim: int) -> dict[str, list[float]]:
    """Seconds of the steps of optimizers by a gradient that exists."""
    measurement.say("time the steps of the optimizers alone")
    generator = torch.Generator(measurement.device).manual_seed(0)
    gradient = torch.randn(classes, dim, generator=generator, device=measurement.device).mul_(1e-3)

    def parameter() -> nn.Parameter:
        weight = nn.Parameter(torch.full_like(gradient, dim**-0.5))
        weight.grad = gradient
        return weight

    projected, fused, then_projected = parameter(), parameter(), parameter()
    ours = fm.optim.ProjectedSGD([projected], heads.LR, heads.MOMENTUM, heads.WEIGHT_DECAY)
    theirs, both = fused_sgd(fused), fused_sgd(then_projected)

    def step_and_project() -> None:
        both.step()
        fm.optim.project_(then_projected)

    steps = {
        PROJECTED: lambda _: ours.step(),
        FUSED: lambda _: theirs.step(),
        THEN_PROJECTED: lambda _: step_and_project(),
    }
    rounds = list(interleaved(steps, measurement.warmup + measurement.rounds, measurement.device, timer=time_once))
    return {name: [times[name] for times in rounds[measurement.warmup :]] for name in steps}


def step_in_backward_difference(device: str, steps: int = 3) -> float:
    """Largest relative difference of weights and momentum between both ways of stepping, in float64 on a small problem."""
    inputs = unit_inputs(SMALL, device)
    tensors = {}
    for in_backward in (False, True):
        loss_fn = fm.ArcFaceLoss(SMALL.classes, SMALL.dim, device=device, dtype=torch.float64)
        loss_fn.weight.detach().copy_(inputs.weight.detach())
        embeddings = [each.detach().double().requires_grad_() for each in inputs.embeddings]
        head = our_head(loss_fn, Inputs(embeddings, inputs.labels, inputs.weight), in_backward=in_backward)
        for turn in range(steps):
            head(turn)
        head.close()
        tensors[in_backward] = head.parameter.detach(), head.optimizer.state[head.parameter]["momentum_buffer"]
    return max(relative_error(mine, exact) for mine, exact in zip(tensors[True], tensors[False], strict=True))
