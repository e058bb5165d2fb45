"""Measures the contestants: checks, times in turns, and memory in fresh processes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import fused_margin as fm

from ..common.contestants import Contestant
from ..common.memory import high_water, mark
from ..common.problems import Inputs, Shape, relative_error, truth
from ..common.timing import fastest, interleaved, time_once
from ..comparison import peak_memory
from ..comparison.peak_memory import Job, Peak
from . import contestants as heads
from .contestants import Head, fused_sgd, our_head, time_phases, unit_inputs
from .results import FUSED, PROJECTED, THEN_PROJECTED, Problem, Row

SMALL = Shape(32, 16, 200)  # for the check in float64


@dataclass(frozen=True)
class Measurement:
    """How the study measures."""

    device: str
    rounds: int
    warmup: int
    compiled: bool
    say: Callable[[str], object]

    def times(self, problem: Problem) -> None:
        """Check the loss of every contestant, then time all of them in turns."""
        inputs = unit_inputs(problem.shape, self.device)
        exact = float(truth("arcface", inputs.embeddings[0], inputs.weight, inputs.labels[0]).loss)
        steps: dict[str, Head] = {}
        for contestant in heads.contestants(self.compiled):
            self.say(f"{problem.shape.label}: prepare {contestant.name}")
            row = Row(contestant.name)
            problem.rows.append(row)
            step = self._choose(row, contestant, inputs, exact)
            if step is not None:
                steps[row.name] = step
        steps[heads.ALONE] = heads.alone(inputs)
        self.say(f"{problem.shape.label}: time {self.rounds} rounds")
        total = self.warmup + self.rounds
        for done, times in enumerate(interleaved(steps, total, self.device, timer=time_phases)):
            if done >= self.warmup:
                for name, phases in times.items():
                    row = problem.alone if name == heads.ALONE else problem.find(name)
                    row.rounds.append(phases)
        for step in steps.values():
            step.close()

    def _choose(self, row: Row, contestant: Contestant, inputs: Inputs, exact: float) -> Head | None:
        """The fastest variant, or None if a loss is wrong, which the row then says."""
        variants = {name: build(inputs) for name, build in contestant.variants.items()}
        for name, step in variants.items():
            error = abs(step.forward(0).item() / exact - 1)
            row.loss_error = max(error, row.loss_error or 0.0)
            if not error <= contestant.loss_tolerance:  # also for NaN
                row.failure = f"wrong: relative error {error:.1e} of the loss of {name}"
                return None
        if len(variants) > 1:
            row.variants = fastest(variants, self.device)
            row.variant = min(row.variants, key=row.variants.__getitem__)
        else:
            (row.variant,) = variants
        return variants[row.variant]

    def memory(self, problem: Problem) -> None:
        for row in problem.rows:
            if row.failure is None:
                self.say(f"{problem.shape.label}: memory of {row.name}")
                job = Job("head", row.name, row.variant, problem.shape, self.device, torch.get_num_threads())
                peak = peak_memory.measure_apart(peak_of_steps, job)
                row.peak_bytes, row.held_bytes, row.failure = peak.bytes, peak.held, peak.failure

    def optimizers(self, classes: int, dim: int) -> dict[str, list[float]]:
        """Seconds of steps by a gradient that exists."""
        self.say("time the steps of the optimizers alone")
        generator = torch.Generator(self.device).manual_seed(0)
        gradient = torch.randn(classes, dim, generator=generator, device=self.device).mul_(1e-3)

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
        rounds = list(interleaved(steps, self.warmup + self.rounds, self.device, timer=time_once))
        return {name: [times[name] for times in rounds[self.warmup :]] for name in steps}


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


def peak_of_steps(job: Job) -> Peak:
    """The peak of two steps above the memory before them, and the memory that the head releases at its end.

    Two steps come first: they load code, compile, and create the momentum.
    """
    contestant = next(each for each in heads.contestants() if each.name == job.contestant)
    inputs = unit_inputs(job.shape, job.device, batches=1)
    head = contestant.variants[job.variant](inputs)
    inputs.weight = torch.empty(0)  # the head has its own
    head(0), head(0)
    before = mark(job.device)
    head(0), head(0)
    peak = max(0, high_water(job.device) - before)
    after = mark(job.device)
    head.close()
    del head
    gc.collect()
    return Peak(peak, held=after - mark(job.device))
