"""Runs each tensor-core kernel once, for ncu, or shows a step kernel by kernel.

python -m benchmarks.gpu.profile kernels|steps FAMILY...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import fused_margin as fm
from benchmarks import half, kernels
from benchmarks.peers import LossStep
from benchmarks.problems import MARGIN, Shape, make_inputs

KERNELS = (
    (kernels.ExponentSum, kernels.STEP),
    (kernels.Probabilities, kernels.STEP),
    (kernels.Nearest, kernels.CLASSES),
)
STEPS, ROWS = 3, 16  # steps that are profiled, rows of their table


def run_kernels(families: Sequence[str], device: str = "cuda") -> None:
    for kind, shape in KERNELS:
        operands = kernels.Operands(make_inputs(shape, device, batches=2))
        for family in families:
            kind(family, operands)(0)
    if device == "cuda":
        torch.cuda.synchronize()


def table_of_step(way: str, device: str = "cuda", shape: Shape = kernels.STEP) -> str:
    """The kernels of a step, the longest first."""
    step = LossStep(half.our_loss(way, fm.Margin(m2=MARGIN)), make_inputs(shape, device))
    step(0)
    with torch.profiler.profile() as profile:
        for turn in range(STEPS):
            step(turn)
        if device == "cuda":
            torch.cuda.synchronize()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=80)
    return f"{way}, {STEPS} steps, {shape.label}\n{table}"


def main(arguments: Sequence[str]) -> None:
    what, *families = arguments
    if what == "kernels":
        run_kernels(families)
    else:
        for way in families:
            print(table_of_step(way))


if __name__ == "__main__":
    main(sys.argv[1:])
