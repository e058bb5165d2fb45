"""Ours alone with millions of classes: a few real training steps, their time, and the memory of the process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.benchmark.heads import our_head
from fused_margin.benchmark.losses import WORKSPACE_MB
from fused_margin.benchmark.memory import USABLE, available_bytes, high_water, mark
from fused_margin.benchmark.problems import MARGIN, SCALE, Inputs, Shape
from fused_margin.benchmark.results import held_per_class

from ..comparison.report import Verdict
from ..comparison.targets import mebibytes, memory_bound
from .results import at_most

BLOCK = 1 << 16  # classes initialized at a time
LR = 0.3  # the loss falls within a few steps


@dataclass
class Step:
    """Measurements of one training step."""

    loss: float
    forward: float  # seconds
    backward: float
    optimizer: float
    seconds: float
    warmup: bool


def run(
    shape: Shape, dtype: torch.dtype, device: str, warmup: int, rounds: int, say: Callable[[str], object]
) -> dict[str, Any]:
    """Train on one batch of distinct classes. Returns the content of the file of results."""
    weights = dtype.itemsize * shape.classes * shape.dim
    needed, available = 2 * weights + memory_bound(shape), available_bytes(device)
    if needed > USABLE * available:
        raise SystemExit(f"does not fit: needs about {needed / 1e9:.1f} GB, and {available / 1e9:.1f} GB are available")
    small = Shape(min(shape.rows, 8), shape.dim, 256)
    _head(small, dtype, device)(0)  # loads code and starts threads
    empty = mark(device)
    head = _head(shape, dtype, device)
    peak = high_water(device)
    say(f"initialized {shape.classes:,} classes: weights {weights / 1e9:.2f} GB, peak {(peak - empty) / 1e9:.2f} GB")
    steps: list[Step] = []
    extra = 0
    for number in range(warmup + rounds):
        resident = mark(device)
        phases = head.phases(0, device)
        highest = high_water(device)
        peak = max(peak, highest)
        if number:  # the first step creates the momentum
            extra = max(extra, highest - resident)
        steps.append(Step(head.last_loss, *phases, phases.whole, number < warmup))
        say(
            f"step {number + 1} of {warmup + rounds}{' (warm-up)' if number < warmup else ''}: loss {head.last_loss:.4f}, "
            f"{phases.whole:.2f} s (forward {phases.forward:.2f}, backward {phases.backward:.2f}), "
            f"peak of the process {highest / 1e9:.2f} GB"
        )
    held = mark(device) - empty
    head.close()
    seconds = sorted(step.seconds for step in steps if not step.warmup)
    losses = [step.loss for step in steps]
    return {
        "shape": vars(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "lr": LR,
        "workspace_mb": WORKSPACE_MB,
        "steps": [vars(step) for step in steps],
        "median_seconds": seconds[(len(seconds) - 1) // 2],
        "weight_bytes": weights,
        "momentum_bytes": weights,
        "process_bytes_before": empty,
        "peak_process_bytes": peak,
        "peak_bytes": extra,
        "held_bytes": held,
        "counted_bytes_per_class": held_per_class(shape.dim, dtype.itemsize),
        "measured_bytes_per_class": held / shape.classes,
        "targets": [
            vars(verdict)
            for verdict in (
                at_most(f"{shape.label}: memory above weights and momentum", extra, memory_bound(shape), mebibytes),
                Verdict("loss falls", "last < first", f"{losses[0]:.4f} to {losses[-1]:.4f}", losses[-1] < losses[0]),
            )
        ],
    }


def _head(shape: Shape, dtype: torch.dtype, device: str):
    """A head with random class weights of length 1. No copy of all weights in another dtype exists at any time."""
    generator = torch.Generator(device).manual_seed(0)
    loss_fn = fm.ArcFaceLoss(
        shape.classes, shape.dim, margin=MARGIN, scale=SCALE, workspace_mb=WORKSPACE_MB, device="meta", dtype=dtype
    ).to_empty(device=device)  # fmt: skip
    weight = loss_fn.weight.detach()
    for rows in weight.split(BLOCK):
        rows.copy_(F.normalize(torch.randn(rows.shape, generator=generator, device=device)))
    embeddings = torch.randn(shape.rows, shape.dim, generator=generator, device=device).to(dtype).requires_grad_()
    labels = torch.arange(shape.rows, device=device) * (shape.classes // shape.rows)
    return our_head(loss_fn, Inputs([embeddings], [labels], weight), in_backward=True, lr=LR)
