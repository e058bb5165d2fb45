"""A sharded step on several processes against the whole one on all threads: `python -m benchmarks.sharding`.

The processes share the cores that the whole step has: dividing the work gains nothing here, and what it costs is seen.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro

import fused_margin as fm
from fused_margin._ops.sharded import tell_samples
from fused_margin.distributed import Shard, slice_of

from .results import hardware, versions


@dataclass(frozen=True)
class Config:
    """Time an ArcFace step, forward and backward, with classes divided and whole."""

    samples: int = 256
    """N, over all processes."""
    size: int = 512
    """D."""
    classes: int = 100_000
    """C, over all processes."""
    world: int = 2
    """Processes, with one thread each."""
    rounds: int = 7
    """Each contestant once a round; the first round is not counted."""
    output: Path | None = None
    """File for the result."""


def main() -> None:
    config = tyro.cli(Config, prog="python -m benchmarks.sharding")
    torch.manual_seed(0)
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(config.world)]
        processes = [
            context.Process(target=work, args=(config, rank, f"{folder}/store", there), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        step = whole_step(config)
        everyone = [here for here, _ in pipes]
        rounds = [
            {
                "whole, all threads": timed(step, config.world),
                "whole, one thread": timed(step, 1),
                "sharded": ask(everyone, "step"),
                "its messages alone": ask(everyone, "messages"),
                "gathering embeddings, alone": ask(everyone, "gather"),
                "waited for embeddings in a step": ask(everyone, "wait"),
            }
            for _ in range(1 + config.rounds)
        ][1:]
        for here in everyone:
            here.send(None)
        for process in processes:
            process.join()
    seconds = {name: [taken[name] for taken in rounds] for name in rounds[0]}
    for name, values in seconds.items():
        print(f"{name}: {1e3 * statistics.median(values):.1f} ms")
    ratios = [taken["sharded"] / (taken["whole, all threads"] + taken["its messages alone"]) for taken in rounds]
    print(f"sharded over (whole on all threads + messages): {statistics.median(ratios):.3f}")
    if config.output is not None:
        settings = {name: value for name, value in asdict(config).items() if name != "output"}
        report = {
            "problem": settings,
            "hardware": hardware("cpu"),
            "versions": versions(),
            "seconds": seconds,
            "ratios": ratios,
        }
        config.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def timed(step: Callable[[], None], threads: int) -> float:
    torch.set_num_threads(threads)
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def ask(everyone: list, what: str) -> float:
    """The slowest process's seconds."""
    for here in everyone:
        here.send(what)
    return max(here.recv() for here in everyone)


def whole_step(config: Config) -> Callable[[], None]:
    loss_fn = fm.ArcFaceLoss(config.classes, config.size)
    embeddings = torch.randn(config.samples, config.size, requires_grad=True)
    labels = torch.randint(config.classes, (config.samples,))

    def step() -> None:
        embeddings.grad = loss_fn.weight.grad = None
        loss_fn(embeddings, labels).backward()

    return step


def work(config: Config, rank: int, store: str, pipe) -> None:
    """A process of the sharded step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=config.world)
    torch.manual_seed(rank)
    loss_fn = fm.ArcFaceLoss(config.classes, config.size, process_group=dist.group.WORLD)
    begin, end = slice_of(config.samples, rank, config.world)
    embeddings = torch.randn(end - begin, config.size, requires_grad=True)
    labels = torch.randint(config.classes, (end - begin,))

    def step() -> None:
        embeddings.grad = loss_fn.weight.grad = None
        loss_fn(embeddings, labels).backward()

    tasks = {
        "step": step,
        "messages": lambda: messages(loss_fn.shard, embeddings.detach()),
        "gather": lambda: loss_fn.shard.gather(embeddings.detach()),
    }
    while (task := pipe.recv()) is not None:
        dist.barrier()
        if task == "wait":
            pipe.send(waited_for_embeddings(step, config.size))
            continue
        started = time.perf_counter()
        tasks[task]()
        pipe.send(time.perf_counter() - started)
    dist.destroy_process_group()


def waited_for_embeddings(step: Callable[[], None], size: int) -> float:
    """Seconds of a step in which nothing but the gathering of embeddings (N, size) goes on."""
    start, waited = Shard.start_gather, []

    def start_gather(shard: Shard, rows: torch.Tensor):
        everyone, wait = start(shard, rows)

        def timed_wait() -> None:
            started = time.perf_counter()
            wait()
            if rows.shape[-1] == size:
                waited.append(time.perf_counter() - started)

        return everyone, timed_wait

    Shard.start_gather = start_gather
    try:
        step()
    finally:
        Shard.start_gather = start
    return sum(waited)


def messages(shard: Shard, embeddings: torch.Tensor) -> None:
    """What a step sends, with nothing computed."""
    most, world = max(tell_samples(shard, embeddings, True)), shard.world
    rows = embeddings.new_zeros(most, embeddings.shape[1])
    numbers = embeddings.new_zeros(world, 4, most, dtype=torch.float64)
    shard.gather(numbers[0, :1].t())
    shard.gather(rows)
    shard.largest(numbers[:, 0].flatten())
    shard.scatter_sums(numbers[:, :2])
    shard.add_up(numbers[0, 0, :1].clone())
    shard.add_up(numbers[0, 0, :1].clone())
    shard.gather(numbers[0])
    shard.scatter_sums(rows.expand(world, *rows.shape))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
