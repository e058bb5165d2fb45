"""Launches the processes of a run, and communicates between them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from rich.console import Console

import fused_margin as fm
from fused_margin.evaluation.errors import DataError

from ..config import TrainConfig


def is_first_process() -> bool:
    """Whether this process has rank 0, also before `Devices` has launched the processes."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


class Devices:
    """One process per device. Each runs the same program on its part of the images and classes.

    Raises:
        DataError: the devices do not exist or do not support the configuration.
    """

    def __init__(self, config: TrainConfig) -> None:
        accelerator, has_gpu = config.accelerator, fm.build_info()["cuda"]["available"]
        if accelerator == "auto":
            accelerator = "cuda" if has_gpu else "cpu"
        elif accelerator == "cuda" and not has_gpu:
            raise DataError("--accelerator cuda: there is no GPU, or the kernels are not built for it; use auto or cpu")
        if config.precision == "16-mixed" and accelerator == "cpu":
            raise DataError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
        if accelerator == "cuda" and config.devices > torch.cuda.device_count():
            raise DataError(f"--devices {config.devices}: there are {torch.cuda.device_count()} GPUs")
        several = config.devices > 1
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=config.devices,
            strategy="ddp" if several else "auto",
            precision=config.precision,
        )
        self.fabric.launch()  # starts the other processes
        if several and accelerator == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.devices))

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world_size > 1 else None

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def own_console(self, console: Console) -> Console:
        """The console in the first process, a quiet one in the others."""
        return console if self.rank == 0 else Console(quiet=True)

    def broadcast(self, value: Any) -> Any:
        """The value of the first process."""
        return self.fabric.broadcast(value) if self.world_size > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.world_size == 1 else bool(self.all_reduce_sum(torch.tensor([flag]))[0])

    def all_reduce_sum(self, counts: torch.Tensor) -> torch.Tensor:
        """Sums over all processes, on the CPU."""
        if self.world_size == 1:
            return counts
        total = counts.to(self.device, torch.int64)
        dist.all_reduce(total)
        return total.cpu()

    def union(self, names: set[str]) -> set[str]:
        """The union of the sets of all processes."""
        if self.world_size == 1:
            return names
        gathered: list[set[str]] = [set()] * self.world_size
        dist.all_gather_object(gathered, names)
        return set().union(*gathered)
