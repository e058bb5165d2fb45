"""The processes of a run: their launch, what they agree on, and who speaks."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from rich.console import Console

import fused_margin as fm

from .config import TrainConfig
from .consoles import plain_console
from .data.base import DataError


def is_first_process() -> bool:
    """Before the launch too: what it or torchrun has started knows its number."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


class Devices:
    """One process for each device; all run the same program, each on its part of the images and classes.

    Raises:
        DataError: there are no such devices.
    """

    def __init__(self, config: TrainConfig) -> None:
        accelerator, has_gpu = config.accelerator, fm.build_info()["cuda"]["available"]
        if accelerator == "auto":
            accelerator = "cuda" if has_gpu else "cpu"
        elif accelerator == "cuda" and not has_gpu:
            raise DataError("--accelerator cuda: there is no GPU, or the kernels are not built for it")
        if config.precision == "16-mixed" and accelerator == "cpu":
            raise DataError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
        if accelerator == "cuda" and config.devices > torch.cuda.device_count():
            raise DataError(f"--devices {config.devices}: there are {torch.cuda.device_count()} GPUs")
        several = config.devices > 1
        if several and config.loss.companions.weights():
            raise DataError(f"--devices {config.devices}: --loss.companions see one process's images only; use one")
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=config.devices,
            strategy="ddp" if several else "auto",
            precision=config.precision,
        )
        self.fabric.launch()  # from here on there are as many processes
        if several and accelerator == "cpu":
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.devices))

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world(self) -> int:
        return self.fabric.world_size

    @property
    def group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD if self.world > 1 else None

    @property
    def device(self) -> torch.device:
        return self.fabric.device

    def own_console(self, console: Console) -> Console:
        """The first process speaks."""
        return console if self.rank == 0 else plain_console(quiet=True)

    def same(self, value: Any) -> Any:
        """The first process's value."""
        return self.fabric.broadcast(value) if self.world > 1 else value

    def any(self, flag: bool) -> bool:
        """Whether it is so in a process."""
        return flag if self.world == 1 else bool(self.sums(torch.tensor([flag]))[0])

    def sums(self, counts: torch.Tensor) -> torch.Tensor:
        """Over all processes, on the CPU."""
        if self.world == 1:
            return counts
        total = counts.to(self.device, torch.int64)
        dist.all_reduce(total)
        return total.cpu()

    def union(self, names: set[str]) -> set[str]:
        """Of all processes."""
        if self.world == 1:
            return names
        everyone: list[set[str]] = [set()] * self.world
        dist.all_gather_object(everyone, names)
        return set().union(*everyone)
