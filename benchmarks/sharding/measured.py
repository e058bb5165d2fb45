"""Times of a step whose classes are divided among processes, and of the whole step on all threads.

The processes share the cores that the whole step uses, so dividing the classes saves no time; the difference is its cost.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

import fused_margin as fm
from fused_margin._ops.divided import gather_counts
from fused_margin.distributed import Shard, slice_of

from ..common.studies import write_study


@dataclass(frozen=True)
class Config:
    """Time an ArcFace step, forward and backward, with classes divided among processes and in one process."""

    samples: int = 256
    """N, over all processes."""
    size: int = 512
    """D."""
    classes: int = 100_000
    """C, over all processes."""
    world_size: int = 2
    """Number of processes, with one thread each."""
    rounds: int = 7
    """Timed rounds, after one untimed round. Each round runs every variant once."""
    output: Path | None = None
    """JSON file to write."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.sharding")
    torch.manual_seed(0)
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(config.world_size)]
        processes = [
            context.Process(target=work, args=(config, rank, f"{folder}/store", there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        step = whole_step(config)
        workers = [here for here, _ in pipes]
        rounds = [
            {
                "whole, all threads": timed(step, config.world_size),
                "whole, one thread": timed(step, 1),
                "sharded": ask(workers, "step"),
                "its messages alone": ask(workers, "messages"),
                "gathering embeddings, alone": ask(workers, "gather"),
                "waited for embeddings in a step": ask(workers, "wait"),
            }
            for _ in range(1 + config.rounds)
        ][1:]
        for here in workers:
            here.send(None)
        for process in processes:
            process.join()
    seconds = {name: [taken[name] for taken in rounds] for name in rounds[0]}
    for name, values in seconds.items():
        print(f"{name}: {1e3 * statistics.median(values):.1f} ms")
    ratios = [taken["sharded"] / (taken["whole, all threads"] + taken["its messages alone"]) for taken in rounds]
    print(f"sharded over (whole on all threads + messages): {statistics.median(ratios):.3f}")
    write_study("benchmarks.sharding", config, {"seconds": seconds, "ratios": ratios})


def timed(step: Callable[[], None], threads: int) -> float:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def ask(workers: list, task: str) -> float:
    """Let all workers run a task; the seconds of the slowest."""
    for here in workers:
        here.send(task)
    return max(here.recv() for here in workers)


def whole_step(config: Config) -> Callable[[], None]:
    loss_fn = fm.ArcFaceLoss(config.classes, config.size)
    embeddings = torch.randn(config.samples, config.size, requires_grad=True)
    labels = torch.randint(config.classes, (config.samples,))

    def step() -> None:
        embeddings.grad = loss_fn.weight.grad = None
        loss_fn(embeddings, labels).backward()

    return step


def work(config: Config, rank: int, store: str, pipe) -> None:
    """One worker: runs the tasks that it receives, and sends their seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=config.world_size)
    torch.manual_seed(rank)
    loss_fn = fm.ArcFaceLoss(config.classes, config.size, process_group=dist.group.WORLD)
    begin, end = slice_of(config.samples, rank, config.world_size)
    embeddings = torch.randn(end - begin, config.size, requires_grad=True)
    labels = torch.randint(config.classes, (end - begin,))

    def step() -> None:
        embeddings.grad = loss_fn.weight.grad = None
        loss_fn(embeddings, labels).backward()

    tasks = {
        "step": step,
        "messages": lambda: messages(loss_fn.shard, embeddings.detach()),
        "gather": lambda: loss_fn.shard.all_gather(embeddings.detach()),
    }
    while (task := pipe.recv()) is not None:
        dist.barrier()
        if task == "wait":
            pipe.send(waited_for_embeddings(step, (-(-config.samples // config.world_size), config.size)))
            continue
        started = time.perf_counter()
        tasks[task]()
        pipe.send(time.perf_counter() - started)
    dist.destroy_process_group()


def waited_for_embeddings(step: Callable[[], None], shape: tuple[int, int]) -> float:
    """Seconds that a step waits for gathered embeddings, of this shape on each rank."""
    start, waited = Shard.start_all_gather, []

    def start_all_gather(shard: Shard, rows: torch.Tensor):
        gathered, wait = start(shard, rows)

        def timed_wait() -> None:
            started = time.perf_counter()
            wait()
            if rows.shape == shape:
                waited.append(time.perf_counter() - started)

        return gathered, timed_wait

    Shard.start_all_gather = start_all_gather
    try:
        step()
    finally:
        Shard.start_all_gather = start
    return sum(waited)


def messages(shard: Shard, embeddings: torch.Tensor) -> None:
    """The messages of a step without its computation."""
    most, world = max(gather_counts(shard, embeddings, True)), shard.world_size
    rows = embeddings.new_zeros(most, embeddings.shape[1])
    numbers = embeddings.new_zeros(2, most, dtype=torch.float64)
    of_all = numbers.repeat(1, world)
    shard.all_gather(numbers[:1].t())
    shard.all_gather(rows)
    shard.all_reduce_max(of_all[0])
    shard.all_reduce_sum(of_all)
    shard.all_reduce_sum(numbers[0, :2].clone())
    shard.all_gather(numbers)
    shard.reduce_scatter(rows.expand(world, *rows.shape))
