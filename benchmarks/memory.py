"""Peak extra memory of one step, in a process of its own.

Extra means above what training holds anyway: the inputs, the weight and the two gradients. Each
measurement has a fresh process, forked from a server that has imported everything and computed
nothing. The process first runs the contestant on a tiny problem, so that its threads and its code
exist (a compiled contestant runs the full problem, for its code is made for one shape). It then
builds the full problem, writes every gradient buffer once, notes the memory in use, lets the
system's high-water mark start anew (/proc/self/clear_refs), runs two steps, and reads the mark.
During a forward pass there are no gradients yet, so what it takes may lie where they will be.
The second step shows what a contestant keeps from one step to the next. malloc is told to return
large blocks to the system at once, so resident memory is live memory, not a free list.
On a GPU the same is done with torch's allocator and its own mark.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import sys
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from . import peers
from .problems import Shape, make_inputs

# Large blocks go back to the system at once, a compiler leaves no processes behind, and modules
# come from where this process has them, not from the current directory.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONSAFEPATH": "1",
}
USABLE = 0.9  # of the memory that is available: the rest is for the machine


@dataclass(frozen=True)
class Job:
    """What the child process measures."""

    suite: str
    contestant: str
    variant: str
    shape: Shape
    device: str
    threads: int


@dataclass(frozen=True)
class Peak:
    """Bytes, or why there are none."""

    bytes: int | None = None
    failure: str | None = None


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    text = Path("/proc/meminfo").read_text()
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", text)[1])


def static_bytes(shape: Shape) -> int:
    """Inputs, weight and gradients in fp32."""
    return 4 * 2 * shape.dim * (shape.rows + shape.classes)


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def does_not_fit(error: BaseException) -> str:
    """What a table says where `error` stopped a contestant."""
    asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
    return f"does not fit: asked for {int(asked[1]) / 2**30:.1f} GiB more" if asked else "does not fit"


def limit_to_available(device: str) -> None:
    """Make an allocation beyond the available memory fail here, not swap or kill the machine.

    A GPU has its own limit, and its driver reserves address space that must not be counted.
    """
    if device == "cpu":
        usable = _status("VmData") + int(USABLE * available_bytes(device))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (usable, hard))


@cache
def _server() -> BaseContext:
    """The server that processes are forked from; malloc reads its settings when it starts."""
    context = get_context("forkserver")
    # torch imports the second at the first call of a custom operation or of a compiled function.
    context.set_forkserver_preload(["benchmarks.memory", "torch._dynamo"])
    before = dict(os.environ)
    os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


@cache
def measure(job: Job) -> Peak:
    """Measure in another process, which may fail for memory; this one may not."""
    if job.device == "cuda":
        torch.cuda.empty_cache()  # what this process does not use is the other's
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_measure_and_send, args=(job, sender))
    process.start()
    sender.close()
    try:
        peak = receiver.recv()
        process.join()
        return peak
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:
            return Peak(failure="does not fit: killed by the system")
        raise RuntimeError(f"measuring the memory of {job.contestant} failed, exit code {process.exitcode}") from None
    finally:
        process.kill()  # where this process was interrupted


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", text)[1])


def mark(device: str) -> int:
    """Bytes in use now, from where the high-water mark starts anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def high_water(device: str) -> int:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _peak_bytes(job: Job) -> int:
    contestant = peers.find(job.suite, job.contestant, job.shape.rows, job.device)
    build = contestant.variants[job.variant]
    if contestant.compiled:
        step = build(make_inputs(job.shape, job.device, batches=1))
        step(0)
    else:
        tiny = Shape(min(job.shape.rows, 8), job.shape.dim, min(job.shape.classes, 256))
        build(make_inputs(tiny, job.device, batches=1))(0)
        step = build(make_inputs(job.shape, job.device, batches=1))
    step.touch_gradients()
    before = mark(job.device)
    for turn in range(2):
        step(turn)
    return max(0, high_water(job.device) - before)


def _measure_and_send(job: Job, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports an interruption
    torch.set_num_threads(job.threads)
    limit_to_available(job.device)
    try:
        peak = Peak(bytes=_peak_bytes(job))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        peak = Peak(failure=does_not_fit(error))
    sender.send(peak)
