"""Single operations beside their naive form, by pytest-benchmark: `pytest benchmarks/micro`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fused_margin as fm
from fused_margin.benchmark.problems import SCALE, Shape, make_inputs
from fused_margin.benchmark.timing import synchronize

from . import naive

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPE = Shape(64, 256, 4_096)
ROUNDS = 10
IMPLEMENTATIONS = ["ours", "naive"]

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("implementation", IMPLEMENTATIONS),
]


def measure(
    benchmark: BenchmarkFixture,
    device: str,
    implementation: str,
    operations: Iterable[Callable[[], tuple[Tensor, ...]]],
) -> None:
    """Compare the results of both operations, ours first, and time one of them."""
    calls = dict(zip(IMPLEMENTATIONS, operations, strict=True))
    ours, theirs = (call() for call in calls.values())
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-4, atol=1e-4)
    benchmark.group = f"{benchmark.name.partition('[')[0]}, {device}"

    def run() -> None:
        calls[implementation]()
        synchronize(device)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)


def test_exponent_sum(benchmark: BenchmarkFixture, implementation: str, device: str) -> None:
    """Forward only: cosines, exponentials and their sum over classes."""
    inputs = make_inputs(SHAPE, device, batches=1)
    arguments = inputs.embeddings[0].detach(), inputs.weight.detach(), inputs.labels[0]
    functions = (lambda: fm.functional.cosine_logsumexp(*arguments, SCALE), lambda: naive.cosine_logsumexp(*arguments))
    measure(benchmark, device, implementation, functions)


def test_nearest_class(benchmark: BenchmarkFixture, implementation: str, device: str) -> None:
    weight = make_inputs(SHAPE, device, batches=1).weight.detach()
    functions = (lambda: fm.functional.nearest_class(weight), lambda: naive.nearest_class(weight))
    measure(benchmark, device, implementation, functions)


def test_project(benchmark: BenchmarkFixture, implementation: str, device: str) -> None:
    weights = [make_inputs(SHAPE, device, batches=1).weight.detach() for _ in IMPLEMENTATIONS]

    def operation(project: Callable[[Tensor], object], weight: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            project(weight)
            return (weight,)

        return run

    operations = map(operation, (fm.optim.project_, naive.project_), weights)
    measure(benchmark, device, implementation, operations)
