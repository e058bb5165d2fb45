"""Runs each tensor-core kernel once, for ncu, or lists the kernels of a step.

python -m benchmarks.gpu.profile kernels|steps FAMILY...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import fused_margin as fm
from fused_margin.benchmark.problems import MARGIN, Shape, make_inputs

from ..common.steps import LossStep
from ..kernels import half, names, steps

KERNELS = (
    (steps.ExponentSum, names.STEP),
    (steps.Probabilities, names.STEP),
    (steps.Nearest, names.CLASSES),
)
STEPS, ROWS = 3, 16  # number of profiled steps, and rows of the table


def run_kernels(families: Sequence[str], device: str = "cuda") -> None:
    for kind, shape in KERNELS:
        operands = steps.Operands(make_inputs(shape, device, batches=2))
        for family in families:
            kind(family, operands)(0)
    if device == "cuda":
        torch.cuda.synchronize()


def table_of_step(backend: str, device: str = "cuda", shape: Shape = names.STEP) -> str:
    """The kernels of a step, the slowest first."""
    step = LossStep(half.our_loss(backend, fm.Margin(m2=MARGIN)), make_inputs(shape, device))
    step(0)
    with torch.profiler.profile() as profile:
        for turn in range(STEPS):
            step(turn)
        if device == "cuda":
            torch.cuda.synchronize()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
    return f"{backend}, {STEPS} steps, {shape.label}\n{table}"


def main(arguments: Sequence[str]) -> None:
    mode, *families = arguments
    if mode == "kernels":
        run_kernels(families)
    else:
        for backend in families:
            print(table_of_step(backend))


if __name__ == "__main__":
    main(sys.argv[1:])
