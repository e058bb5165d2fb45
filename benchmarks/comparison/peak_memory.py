"""Peak extra memory of one step, measured in a separate process.

"Extra" means above the memory that training holds anyway: inputs, weight and both gradients. Every measurement gets a
fresh process, forked from a server that has imported all modules and computed nothing. The process

1. runs the contestant on a tiny problem, so that its threads and code are loaded (a compiled contestant runs the full
   problem, since its code is specialised to one shape);
2. builds the full problem and writes every gradient buffer once;
3. restarts the system's high-water mark (/proc/self/clear_refs), runs two steps, and reads the mark.

The forward may use the memory of the gradients, which do not exist yet. malloc is told to return large blocks to
the system at once, so that resident memory does not include freed blocks. On a GPU, torch's allocator has the mark.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

import torch

from ..common.contestants import peak_bytes
from ..common.memory import does_not_fit, is_out_of_memory, limit_to_available
from ..common.problems import Shape, make_inputs
from . import peers

# Large blocks are returned to the system at once, a compiler leaves no processes behind, and modules are imported from
# this process's path instead of the current directory.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "PYTHONSAFEPATH": "1",
}


@dataclass(frozen=True)
class Job:
    """One measurement of the child process."""

    suite: str
    contestant: str
    variant: str
    shape: Shape
    device: str
    threads: int


@dataclass(frozen=True)
class Peak:
    """Bytes, or the reason why there are none."""

    bytes: int | None = None
    failure: str | None = None
    held: int | None = None  # bytes of the class weights and of the state of their optimizer, in the study of heads


def static_bytes(shape: Shape) -> int:
    """Inputs, weight and gradients in fp32."""
    return 4 * 2 * shape.dim * (shape.rows + shape.classes)


@cache
def _server() -> BaseContext:
    """The server that processes are forked from. malloc reads its settings when the server starts."""
    context = get_context("forkserver")
    # torch imports torch._dynamo at the first call of a custom operation or of a compiled function.
    context.set_forkserver_preload([__name__, "torch._dynamo"])
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
    return measure_apart(_peak, job)


def measure_apart(measurement: Callable[[Job], Peak], job: Job) -> Peak:
    """Measure in another process, so that running out of memory does not end this one."""
    if job.device == "cuda":
        torch.cuda.empty_cache()  # leave the unused memory of this process to the other
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_measure_and_send, args=(measurement, job, sender))
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
        process.kill()  # in case this process was interrupted


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


def _measure_and_send(measurement: Callable[[Job], Peak], job: Job, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports an interruption
    torch.set_num_threads(job.threads)
    limit_to_available(job.device)
    try:
        peak = measurement(job)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        peak = Peak(failure=does_not_fit(error))
    sender.send(peak)
