"""Memory of a process or of a GPU: what is available, what is in use, and the peak since a mark."""

from __future__ import annotations

import gc
import os
import re
import resource
from pathlib import Path

import torch

USABLE = 0.9  # share of the available memory that a run may use; the rest is left to the machine
PEAK_RESET = Path("/proc/self/clear_refs")  # of Linux


def available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    path = Path("/proc/meminfo")
    if not path.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # all memory, on other systems than Linux
    return 1024 * _number("MemAvailable", path)


def measures_peaks(device: str) -> bool:
    """Whether :func:`mark` and :func:`high_water` are supported."""
    return device == "cuda" or PEAK_RESET.exists()


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def does_not_fit(error: BaseException) -> str:
    """The entry of a table for a contestant that ran out of memory with `error`."""
    asked = re.search(r"you tried to allocate (\d+) bytes", str(error))
    return f"does not fit: asked for {int(asked[1]) / 2**30:.1f} GiB more" if asked else "does not fit"


def limit_to_available(device: str) -> None:
    """Let an allocation beyond the available memory fail, so that the machine neither swaps nor kills processes.

    A GPU has its own limit, and its driver reserves address space that must not be counted.
    """
    if device == "cpu" and measures_peaks(device):
        usable = _status("VmData") + int(USABLE * available_bytes(device))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (usable, hard))


def mark(device: str) -> int:
    """Restart the high-water mark, and return the bytes in use now."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    PEAK_RESET.write_text("5")
    return _status("VmRSS")


def high_water(device: str) -> int:
    """The largest number of bytes in use since the last :func:`mark`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    return 1024 * _number(field, Path("/proc/self/status"))


def _number(field: str, path: Path) -> int:
    found = re.search(rf"{field}:\s+(\d+)", path.read_text())
    assert found is not None, f"{path} has no {field}"
    return int(found[1])
