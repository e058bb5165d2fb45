"""Peak extra memory of one step, measured in a separate process.

"Extra" means above the memory that training holds anyway: inputs, weight and both gradients. The process

1. runs the contestant on a tiny problem, so that its threads and code are loaded (a compiled contestant runs the full
   problem, since its code is specialised to one shape);
2. builds the full problem and writes every gradient buffer once;
3. restarts the system's high-water mark (/proc/self/clear_refs), runs two steps, and reads the mark.

The forward may use the memory of the gradients, which do not exist yet. On a GPU, torch's allocator has the mark.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from fused_margin.benchmark import peak_memory
from fused_margin.benchmark.peak_memory import Peak, measure_apart
from fused_margin.benchmark.problems import Shape, make_inputs

from ..common.steps import peak_bytes
from . import peers


@dataclass(frozen=True)
class Job(peak_memory.Job):
    """One measurement of a contestant of `suite`."""

    suite: str


def static_bytes(shape: Shape) -> int:
    """Inputs, weight and gradients in fp32."""
    return 4 * 2 * shape.dim * (shape.rows + shape.classes)


@cache
def measure(job: Job) -> Peak:
    return measure_apart(_peak, job)


def _peak(job: Job) -> Peak:
    contestant = peers.find(job.suite, job.contestant, job.shape.rows, job.device)
    build = contestant.variants[job.variant]
    if contestant.compiled:
        step = build(make_inputs(job.shape, job.device, batches=1))
        step(0)
    else:
        tiny = Shape(min(job.shape.rows, 8), job.shape.dim, min(job.shape.classes, 256))
        build(make_inputs(tiny, job.device, batches=1))(0)
        step = build(make_inputs(job.shape, job.device, batches=1))
    return Peak(peak_bytes(step, job.device))
