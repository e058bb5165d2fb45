"""Command line of the study of whole steps: `python -m benchmarks head`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from fused_margin.benchmark.environment import header, machine_name
from fused_margin.benchmark.figure import draw
from fused_margin.benchmark.heads import Comparison
from fused_margin.benchmark.measure import Measurement
from fused_margin.benchmark.memory import limit_to_available
from fused_margin.benchmark.problems import Shape
from fused_margin.benchmark.results import Problem
from fused_margin.benchmark.tables import step_table

from ..common.files import write_json
from ..comparison.command import REUSE, TABLE_WIDTH, interrupted_by_sigterm, restart_with_malloc
from ..comparison.report import Verdict
from ..comparison.tables import target_table
from . import documents, many, tables
from .measure import optimizers, step_in_backward_difference
from .results import Study, judge


@dataclass(frozen=True)
class Options:
    """Time whole training steps of a classification head beside peers: forward, backward and optimizer; and their memory."""

    classes: int = 100_000
    """C."""

    size: int = 512
    """D."""

    samples: tuple[int, ...] = (64, 128, 256)
    """N, the batch sizes."""

    ours_only: bool = False
    """Only ours, step in backward, on one batch, with progress: for numbers of classes that peers cannot hold."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of class weights, momentum and embeddings. bfloat16 needs --ours-only."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure."""

    threads: int | None = None
    """CPU threads. Default: torch's choice."""

    allocator: Literal["system", "reuse"] = "system"
    """Treatment of large freed blocks by malloc on a CPU, for all contestants: system, the default of malloc, returns them to
    the system; reuse keeps them."""

    rounds: int | None = None
    """Timed rounds, each of which runs every contestant once. Default: 9, with --ours-only 3."""

    warmup: int | None = None
    """Untimed rounds before the timed ones. Default: 2, with --ours-only 1."""

    compiled: bool = True
    """Include torch.compile, whose compilation takes minutes."""

    memory: bool = True
    """Measure the memory of every contestant, each in a fresh process."""

    output: Path | None = None
    """JSON file to write, with the picture beside it as .png."""

    def __post_init__(self) -> None:
        least = {"classes": 2, "size": 1, "threads": 1, "rounds": 1, "warmup": 0}
        for name, lowest in least.items():
            if (value := getattr(self, name)) is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if not self.samples or min(self.samples) < 1:
            raise ValueError(f"samples must be one or several positive numbers, got {self.samples}")
        if self.dtype != "float32" and not self.ours_only:
            raise ValueError("dtype: the comparison is in float32; bfloat16 needs --ours-only")
        if self.ours_only and (len(self.samples) > 1 or self.samples[0] > self.classes):
            raise ValueError(f"samples: --ours-only needs one number, at most that of the classes, got {self.samples}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch finds no GPU")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study. Arguments are those after `head`; by default, those of the command line."""
    if arguments is None:
        arguments = sys.argv[2:]
        restart = True
    else:
        restart = False
    options = tyro.cli(Options, prog="python -m benchmarks head", args=arguments)
    if restart and options.allocator == "reuse" and options.device == "cpu":
        restart_with_malloc(REUSE)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    limit_to_available(options.device)
    start = header(shlex.join(["python", "-m", "benchmarks", "head", *arguments]), options.device)
    start |= {
        "threads": torch.get_num_threads(),
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
    }

    def save(study: str, content: dict[str, Any]) -> None:
        if options.output is not None:
            write_json(options.output, {**start, "study": study, **content})

    with interrupted_by_sigterm():
        (run_many if options.ours_only else run_comparison)(options, console, save)
    if options.output is not None:
        console.print(f"Wrote {options.output}.", highlight=False)


def say_on(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, highlight=False)


def run_comparison(options: Options, console: Console, save: Callable[[str, dict], None]) -> None:
    measurement = Measurement(
        Comparison() if options.compiled else Comparison(modes=()),
        options.device,
        9 if options.rounds is None else options.rounds,
        2 if options.warmup is None else options.warmup,
        say_on(console),
    )
    study = Study(difference=step_in_backward_difference(options.device))
    try:
        study.optimizers = optimizers(measurement, options.classes, options.size)
        console.print(tables.optimizer_table(study))
        for samples in options.samples:
            problem = Problem(Shape(samples, options.size, options.classes))
            study.problems.append(problem)
            measurement.times(problem)
            if options.memory:
                measurement.memory(problem)
            console.print(step_table(problem))
            save(documents.COMPARISON, study.summary())
        study.complete = True
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted. The measurements so far are saved.[/]")
    save(documents.COMPARISON, study.summary())
    if options.output is not None:
        draw(study.problems, options.output.with_suffix(".png"), machine_name(options.device, torch.get_num_threads()))
    console.print(target_table(judge(study)))


def run_many(options: Options, console: Console, save: Callable[[str, dict], None]) -> None:
    content = many.run(
        Shape(options.samples[0], options.size, options.classes),
        getattr(torch, options.dtype),
        options.device,
        1 if options.warmup is None else options.warmup,
        3 if options.rounds is None else options.rounds,
        say_on(console),
    )
    console.print(
        f"{content['median_seconds']:.2f} s per step; bytes per class between steps: "
        f"{content['counted_bytes_per_class']:,} counted, {content['measured_bytes_per_class']:,.0f} measured; "
        f"peak of the process {content['peak_process_bytes'] / 1e9:.2f} GB; "
        f"peak of a step above weights and momentum {content['peak_bytes'] / 2**20:,.0f} MiB",
        highlight=False,
    )
    console.print(target_table([Verdict(**target) for target in content["targets"]]))
    save(documents.MANY, {"complete": True, **content})
