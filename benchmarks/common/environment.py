"""Hardware and versions of a run, as every file of results records them."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fused_margin as fm

from .files import write_json

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


def write_study(module: str, config: Any, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write `content` to `config.output`, if there is one, with the other options as its problem.

    Args:
        module: the study, as in ``python -m module``.
    """
    if config.output is not None:
        options = {name: value for name, value in asdict(config).items() if name != "output"}
        command = shlex.join(["python", "-m", module, *sys.argv[1:]])
        write_json(config.output, {**header(command), "problem": options, **content}, indent)
