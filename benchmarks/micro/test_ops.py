"""Single operations, by pytest-benchmark: `pytest benchmarks/micro`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import fused_margin as fm
from fused_margin.benchmark.problems import SCALE, Shape, make_inputs
from fused_margin.benchmark.timing import synchronize

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPE = Shape(64, 256, 4_096)

pytestmark = pytest.mark.parametrize("device", DEVICES)


def measure(benchmark: BenchmarkFixture, device: str, operation: Callable[[], object]) -> None:
    def run() -> None:
        operation()
        synchronize(device)

    run()
    benchmark(run)


def test_exponent_sum(benchmark: BenchmarkFixture, device: str) -> None:
    """Forward only: cosines, exponentials and their sum over classes."""
    inputs = make_inputs(SHAPE, device, batches=1)
    embeddings, weight = inputs.embeddings[0].detach(), inputs.weight.detach()
    measure(
        benchmark,
        device,
        lambda: fm.functional.cosine_logsumexp(embeddings, weight, inputs.labels[0], SCALE),
    )


def test_nearest_class(benchmark: BenchmarkFixture, device: str) -> None:
    weight = make_inputs(SHAPE, device, batches=1).weight.detach()
    measure(benchmark, device, lambda: fm.functional.nearest_class(weight))


def test_project(benchmark: BenchmarkFixture, device: str) -> None:
    weight = make_inputs(SHAPE, device, batches=1).weight.detach()
    measure(benchmark, device, lambda: fm.optim.project_(weight))
