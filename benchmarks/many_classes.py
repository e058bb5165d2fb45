"""Nearest classes of very many, on a CPU: time, memory, and samples of the answers: `python -m benchmarks.many_classes`.

A first sweep of random class weights, then steps in which a batch of classes turns far and all others a little.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch.nn import functional as F

from fused_margin.losses.exclusive import ExclusiveRegularizer

from .memory import high_water, mark
from .results import hardware, versions


@dataclass(frozen=True)
class Config:
    """Find the nearest class of each of very many, at once and from step to step."""

    classes: int = 200_000
    """C."""
    size: int = 512
    """D."""
    batch: int = 512
    """Classes that turn far in a step."""
    far: float = 0.05
    """By how much those turn, radians."""
    little: float = 0.001
    """By how much all others do, radians."""
    steps: int = 3
    """After the first sweep."""
    samples: int = 200
    """Classes whose answers are compared with all cosines in float64, at every step."""
    output: Path | None = None
    """File for the result."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.many_classes")
    torch.manual_seed(0)
    weight = torch.randn(config.classes, config.size)
    regularizer = ExclusiveRegularizer(refresh="certified")
    regularizer.find(weight[:1000])  # threads and code are there
    steps = []
    for number in range(config.steps + 1):
        if number:
            turn(weight, config)
        resident = mark("cpu")
        before = int(regularizer.swept[0]) if number else 0
        started = time.perf_counter()
        found = regularizer.find(weight)
        step = {
            "seconds": time.perf_counter() - started,
            "rows swept": int(regularizer.swept[0]) - before,
            "peak above what was there, bytes": high_water("cpu") - resident,
            "wrong of the samples": wrong(weight, found, config.samples),
        }
        print(f"step {number}: " + ", ".join(f"{name} {value:,.4g}" for name, value in step.items()), flush=True)
        steps.append(step)
    kept = sum(buffer.nbytes for buffer in regularizer.buffers())
    print(
        f"kept from step to step: {kept:,} bytes; weights: {weight.nbytes:,}; C x C float32: {4 * len(weight) ** 2:,}"
    )
    if config.output is not None:
        settings = {name: value for name, value in vars(config).items() if name != "output"}
        report = {"problem": settings, "hardware": hardware("cpu"), "versions": versions(), "kept bytes": kept}
        config.output.write_text(json.dumps(report | {"steps": steps}, indent=1) + "\n", encoding="utf-8")


def turn(weight: torch.Tensor, config: Config) -> None:
    """Turns all rows in place, the batch far."""
    angle = torch.full((len(weight), 1), config.little)
    angle[torch.randperm(len(weight))[: config.batch]] = config.far
    for rows, angles in zip(weight.split(10_000), angle.split(10_000), strict=True):
        norm = rows.norm(dim=1, keepdim=True)
        rows.add_(F.normalize(torch.randn_like(rows)) * norm * angles.tan())


def wrong(weight: torch.Tensor, found, samples: int) -> int:
    """Of some classes, how many have another nearest class in float64."""
    rows = torch.randperm(len(weight))[:samples]
    query = F.normalize(weight[rows].double())
    cosine = torch.cat([query @ F.normalize(part.double()).t() for part in weight.split(10_000)], 1)
    cosine[torch.arange(samples), rows] = -2.0
    return int((cosine.argmax(1) != found.index[rows]).sum())


if __name__ == "__main__":
    main()
