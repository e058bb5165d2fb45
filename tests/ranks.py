"""Processes that wait for work: the ranks of process groups of every size up to four, on gloo."""

import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4


def work(rank: int, store: str, inbox, outbox) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=timedelta(seconds=60)
    )
    groups = {world: dist.new_group(range(world)) for world in range(1, MOST + 1)}
    while (job := inbox.get()) is not None:
        function, world, arguments = job
        try:
            outbox.put((True, function(groups[world], *arguments)))
        except Exception as error:  # noqa: BLE001 - whatever it is, the test is told
            outbox.put((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()


class RankError(Exception):
    """What ranks raised."""


class Ranks:
    """Runs a function on the first ranks, each with its own arguments; what they return must pickle."""

    def __init__(self, folder):
        context = mp.get_context("spawn")
        self.inboxes = [context.SimpleQueue() for _ in range(MOST)]
        self.outboxes = [context.SimpleQueue() for _ in range(MOST)]
        queues = zip(self.inboxes, self.outboxes, strict=True)
        self.processes = [
            context.Process(target=work, args=(rank, str(folder / "store"), *pair), daemon=True)
            for rank, pair in enumerate(queues)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable, arguments: list[tuple]) -> list:
        """function(group, *arguments[rank]) on len(arguments) ranks."""
        for inbox, given in zip(self.inboxes, arguments, strict=False):
            inbox.put((function, len(arguments), given))
        results = [outbox.get() for outbox in self.outboxes[: len(arguments)]]
        if not all(ok for ok, _ in results):
            raise RankError("\n".join(f"rank {rank}: {value}" for rank, (ok, value) in enumerate(results) if not ok))
        return [value for _, value in results]

    def close(self) -> None:
        for inbox in self.inboxes:
            inbox.put(None)
        for process in self.processes:
            process.join(20)
            process.kill()
