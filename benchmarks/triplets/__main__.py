"""Triplet loss beside pytorch-metric-learning on a CPU: time and peak memory of a step. `python -m benchmarks.triplets`.

Both have the loss of all triplets, or of the semi-hard ones, of P identities with K images each, and their gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from torch import Tensor

import fused_margin as fm
from fused_margin.benchmark.memory import high_water, mark

from ..common.studies import write_study

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Config:
    """Measure a forward and backward of triplet loss."""

    samples: tuple[int, ...] = (256, 512, 1024)
    """N."""
    size: int = 128
    """D."""
    images: int = 4
    """K, images of an identity."""
    steps: int = 3
    """Timed steps; the fastest counts."""
    output: Path | None = None
    """JSON file to write."""


def contestants(mining: str) -> dict[str, Loss]:
    distance = LpDistance(normalize_embeddings=True, p=2, power=2)
    miner = TripletMarginMiner(0.2, type_of_triplets=mining, distance=distance)
    peer = TripletMarginLoss(0.2, distance=distance)
    return {
        "fused_margin": fm.TripletLoss(0.2, mining=mining),
        "pytorch-metric-learning": lambda embeddings, labels: peer(embeddings, labels, miner(embeddings, labels)),
    }


def measure(loss_fn: Loss, embeddings: Tensor, labels: Tensor, steps: int) -> dict[str, float]:
    """Loss, fastest seconds of a step, and peak memory above that before the step."""

    def step() -> float:
        embeddings.grad = None
        loss = loss_fn(embeddings, labels)
        loss.backward()
        return loss.item()

    resident = mark("cpu")
    loss = step()
    peak = high_water("cpu") - resident
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return {"loss": loss, "seconds": min(seconds), "peak extra bytes": peak}


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.triplets")
    torch.manual_seed(0)
    results = []
    for mining in ("all", "semihard"):
        for loss_fn in contestants(mining).values():  # start threads and load code before the first mark
            measure(loss_fn, torch.randn(16, config.size, requires_grad=True), torch.arange(16) // config.images, 1)
        for samples in config.samples:
            embeddings = torch.randn(samples, config.size, requires_grad=True)
            labels = torch.arange(samples) // config.images
            for name, loss_fn in contestants(mining).items():
                measured = measure(loss_fn, embeddings, labels, config.steps)
                print(
                    f"{mining}, N = {samples}, {name}: loss {measured['loss']:.6f}, {1000 * measured['seconds']:.1f} ms, "
                    f"{measured['peak extra bytes'] / 2**20:,.0f} MiB",
                    flush=True,
                )
                results.append({"mining": mining, "samples": samples, "name": name, **measured})
    write_study("benchmarks.triplets", config, {"results": results})


if __name__ == "__main__":
    main()
