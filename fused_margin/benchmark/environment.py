"""Hardware and versions of a run, as every file of results records them."""

from __future__ import annotations

import os
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_margin as fm

PEERS = ("pytorch-metric-learning", "triton", "cut-cross-entropy", "liger-kernel")


def cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def hardware(device: str) -> dict[str, Any]:
    facts = {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties()
        facts |= {
            "gpu": gpu.name,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "gpu_multiprocessors": gpu.multi_processor_count,
            "gpu_memory_bytes": gpu.total_memory,
        }
    return facts


def machine_name(device: str, threads: int) -> str:
    facts = hardware(device)
    if "gpu" in facts:
        return facts["gpu"]
    return f"{facts['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "fused_margin": fm.build_info(),
    } | {name.replace("-", "_"): version(name) for name in PEERS if _installed(name)}


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def header(command: str, device: str = "cpu") -> dict[str, Any]:
    """The first entries of every file of results."""
    return {
        "format": 1,
        "command": command,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware(device),
        "versions": versions(),
    }
