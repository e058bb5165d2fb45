"""Measurements of memory in separate processes.

Every measurement gets a fresh process, forked from a server that has imported all modules and computed nothing. malloc is
told to return large blocks to the system at once, so that resident memory does not include freed blocks.
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
from multiprocessing.context import ForkServerContext
from typing import TypeVar

import torch

from .memory import does_not_fit, is_out_of_memory, limit_to_available
from .problems import Shape

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

    contestant: str
    variant: str
    shape: Shape
    device: str
    threads: int


AnyJob = TypeVar("AnyJob", bound=Job)


@dataclass(frozen=True)
class Peak:
    """Bytes, or the reason why there are none."""

    bytes: int | None = None
    failure: str | None = None
    held: int | None = None  # bytes of the class weights and of the state of their optimizer, in the study of heads


@cache
def _server(module: str) -> ForkServerContext:
    """The server that processes are forked from, which imports `module`. malloc reads its settings when it starts."""
    context = get_context("forkserver")
    # torch imports torch._dynamo at the first call of a custom operation or of a compiled function.
    context.set_forkserver_preload([module, "torch._dynamo"])
    before = dict(os.environ)
    os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ |= before
    return context


def measure_apart(measurement: Callable[[AnyJob], Peak], job: AnyJob) -> Peak:
    """Measure in another process, so that running out of memory does not end this one."""
    if job.device == "cuda":
        torch.cuda.empty_cache()  # leave the unused memory of this process to the other
    server = _server(measurement.__module__)
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(target=_measure_and_send, args=(measurement, job, sender))
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


def _measure_and_send(measurement: Callable[[AnyJob], Peak], job: AnyJob, sender: Connection) -> None:
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
