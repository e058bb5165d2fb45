"""Forward, and forward and backward, of every public loss beside its naive form: `pytest benchmarks/micro`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fused_margin.benchmark.timing import synchronize

from .cases import CASES, make_calls, require_agreement
from .test_ops import DEVICES, ROUNDS, SHAPE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("implementation", ["ours", "naive"])
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("name", CASES)
def test_loss(benchmark: BenchmarkFixture, name: str, direction: str, implementation: str, device: str) -> None:
    require_agreement(name, SHAPE, device)
    call = make_calls(name, SHAPE, device)[implementation]
    benchmark.group = f"{name}, {direction}, {device}"

    def run() -> None:
        if direction == "forward":
            with torch.no_grad():
                call.forward()
        else:
            call.backward()
        synchronize(device)

    benchmark.pedantic(run, rounds=ROUNDS, warmup_rounds=2)
