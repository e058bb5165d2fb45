"""Worker processes that form gloo process groups of one to four ranks."""

import pickle
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Client, Listener
from pathlib import Path

import torch
import torch.distributed as dist
from forks import Forks

MAX_RANKS = 4


def work(rank: int, store: Path, address: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=MAX_RANKS, timeout=timedelta(seconds=60)
    )
    groups = {world_size: dist.new_group(range(world_size)) for world_size in range(1, MAX_RANKS + 1)}
    with Client(address) as connection:
        while (job := pickle.loads(connection.recv_bytes())) is not None:
            function, world_size, arguments = job
            try:
                answer = True, function(groups[world_size], *arguments)
            except Exception as error:  # noqa: BLE001 - any error is reported to the test
                answer = False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            connection.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()


class RankError(Exception):
    """The errors that ranks raised."""


class Ranks:
    """Runs a function on the first ranks, each with its own arguments; results must be picklable."""

    def __init__(self, forks: Forks, folder: Path):
        listeners = [Listener() for _ in range(MAX_RANKS)]
        self.processes = [
            forks.start(work, rank, folder / "store", listener.address) for rank, listener in enumerate(listeners)
        ]
        self.connections = [listener.accept() for listener in listeners]

    def run(self, function: Callable, arguments: list[tuple]) -> list:
        """Run function(group, *arguments[rank]) on len(arguments) ranks."""
        asked = self.connections[: len(arguments)]
        for connection, given in zip(asked, arguments, strict=True):
            connection.send_bytes(pickle.dumps((function, len(arguments), given)))
        results = [pickle.loads(connection.recv_bytes()) for connection in asked]
        if not all(ok for ok, _ in results):
            raise RankError("\n".join(f"rank {rank}: {value}" for rank, (ok, value) in enumerate(results) if not ok))
        return [value for _, value in results]

    def close(self) -> None:
        for connection in self.connections:
            connection.send_bytes(pickle.dumps(None))
        for process in self.processes:
            process.wait(20)
