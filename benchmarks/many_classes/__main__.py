"""Nearest classes of many classes on a CPU: time, memory, and a sample of the answers. `python -m benchmarks.many_classes`.

The first step searches random class weights. Then every step rotates one batch of classes by a large angle, and all others
by a small one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn import functional as F

from fused_margin.benchmark.memory import high_water, mark
from fused_margin.losses.exclusive import ExclusiveRegularizer

from ..common.studies import write_study


@dataclass(frozen=True)
class Config:
    """Find the nearest class of every class with certified refresh, in the first and in later steps."""

    classes: int = 200_000
    """C."""
    size: int = 512
    """D."""
    batch: int = 512
    """Classes that one step rotates by the large angle."""
    large_angle: float = 0.05
    """The large angle, radians."""
    small_angle: float = 0.001
    """The small angle, of all other classes, radians."""
    steps: int = 3
    """Steps after the first."""
    samples: int = 200
    """Classes whose answers are checked in float64 at every step."""
    output: Path | None = None
    """JSON file to write."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.many_classes")
    torch.manual_seed(0)
    weight = torch.randn(config.classes, config.size)
    regularizer = ExclusiveRegularizer(refresh="certified")
    regularizer.find(weight[:1000])  # start threads and load code before the first mark
    steps = []
    for number in range(config.steps + 1):
        if number:
            rotate(weight, config)
        resident = mark("cpu")
        before = int(regularizer.swept[0]) if number else 0
        started = time.perf_counter()
        found = regularizer.find(weight)
        step = {
            "seconds": time.perf_counter() - started,
            "rows searched": int(regularizer.swept[0]) - before,
            "peak extra bytes": high_water("cpu") - resident,
            "wrong answers in the sample": wrong(weight, found, config.samples),
        }
        print(f"step {number}: " + ", ".join(f"{name} {value:,.4g}" for name, value in step.items()), flush=True)
        steps.append(step)
    state = sum(buffer.nbytes for buffer in regularizer.buffers())
    print(f"saved between steps: {state:,} bytes; weights: {weight.nbytes:,}; C x C float32: {4 * len(weight) ** 2:,}")
    write_study("benchmarks.many_classes", config, {"state bytes": state, "steps": steps})


def rotate(weight: torch.Tensor, config: Config) -> None:
    """Rotate all rows in place, a random batch of them by the large angle."""
    angle = torch.full((len(weight), 1), config.small_angle)
    angle[torch.randperm(len(weight))[: config.batch]] = config.large_angle
    for rows, angles in zip(weight.split(10_000), angle.split(10_000), strict=True):
        norm = rows.norm(dim=1, keepdim=True)
        rows.add_(F.normalize(torch.randn_like(rows)) * norm * angles.tan())


def wrong(weight: torch.Tensor, found, samples: int) -> int:
    """Number of sampled classes whose nearest class in float64 is another one."""
    rows = torch.randperm(len(weight))[:samples]
    query = F.normalize(weight[rows].double())
    cosine = torch.cat([query @ F.normalize(part.double()).t() for part in weight.split(10_000)], 1)
    cosine[torch.arange(samples), rows] = -2.0
    return int((cosine.argmax(1) != found.index[rows]).sum())


if __name__ == "__main__":
    main()
