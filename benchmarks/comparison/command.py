"""Command line of the comparison: runs suites, prints tables, writes a JSON file and a figure."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_margin.benchmark.environment import cpu_name
from fused_margin.benchmark.memory import limit_to_available
from fused_margin.benchmark.problems import Shape

from ..common.files import RESULTS, device_slug
from ..kernels import comparisons
from ..kernels import targets as kernel_targets
from . import tables, targets
from .figures import draw
from .report import Report, Verdict
from .runner import Runner

Suite = Literal["step", "exclusive", "memory", "accuracy", "kernels"]
ShapeArgument = Annotated[
    Shape,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NxDxC",
        instance_from_str=lambda strings: Shape.parse(strings[0]),
        is_instance=lambda instance: isinstance(instance, Shape),
        str_from_instance=lambda instance: [str(instance)],
    ),
]
MEMORY_SHAPES = (Shape(256, 512, 10_000), Shape(256, 512, 100_000), targets.MEMORY)
ACCURACY_SHAPE = Shape(256, 512, 20_000)  # small enough for quick float64 answers
TABLE_WIDTH = 140  # if the output is not a terminal
REUSE = {"MALLOC_MMAP_THRESHOLD_": str(2**40), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclass
class Options:
    """Compare fused_margin with its peers: time, peak memory and accuracy."""

    suites: tyro.conf.Positional[tuple[Suite, ...]] = ("step", "exclusive", "memory", "accuracy")
    """Suites to run, independent of each other. kernels needs a GPU and compares the tensor-core kernels with cuBLAS."""

    output: Path | None = None
    """JSON file to write, with the figure beside it as .png. Default: benchmarks/results, named after the processor."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure."""

    threads: int | None = None
    """CPU threads. Default: torch's choice."""

    allocator: Literal["reuse", "system"] = "reuse"
    """Treatment of large freed blocks by malloc on a CPU, for all contestants. system, the default of malloc, returns them
    to the system, and every new block causes page faults; reuse keeps them, as PyTorch's tuning guide advises."""

    rounds: int = 15
    """Timed rounds. Each runs every contestant once."""

    warmup: int = 2
    """Untimed rounds before the timed ones."""

    compiled: bool = True
    """Include torch.compile and peers in Triton, whose compilation takes minutes."""

    only: tuple[str, ...] = ()
    """Contestants to run, by their names in the tables. Default: all."""

    families: tuple[str, ...] | None = None
    """Families of tensor-core kernels in the kernels suite. Default: all that run on the device."""

    quick: bool = False
    """Tiny problems and few rounds, as a test of the program. The times mean nothing."""

    step_shapes: tuple[ShapeArgument, ...] = (targets.STEP, targets.TALL_STEP)
    """Problems of the step suite."""

    exclusive_shape: ShapeArgument = targets.EXCLUSIVE
    """Problem of the exclusive suite, which does not use N."""

    memory_shapes: tuple[ShapeArgument, ...] = MEMORY_SHAPES
    """Problems of the memory suite, with the same N and D."""

    accuracy_shape: ShapeArgument = ACCURACY_SHAPE
    """Problem of the accuracy suite."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("threads", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch finds no GPU")
        if self.quick:
            self.rounds, self.warmup = 3, 1
            self.step_shapes = (Shape(32, 64, 2_000),)
            self.exclusive_shape = Shape(32, 64, 500)
            self.memory_shapes = (Shape(32, 64, 1_000), Shape(32, 64, 2_000))
            self.accuracy_shape = Shape(32, 64, 2_000)


def default_output(device: str, quick: bool) -> Path:
    if quick:  # do not overwrite measured results
        return Path(tempfile.gettempdir()) / "fused-margin-quick.json"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    stem = device_slug(name)
    threads = "" if device == "cuda" else f"-{torch.get_num_threads()}-threads"
    return RESULTS / f"{stem}{threads}.json"


def run(options: Options, report: Report, console: Console, save: Callable[[], object]) -> None:
    """Run the selected suites. Print each table and save the report as soon as a section is complete."""

    def show(*rendered: Table) -> None:
        console.print(*rendered)
        save()

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console) as progress:
        runner = Runner(report, progress, options.rounds, options.warmup, options.compiled, options.only)
        if "step" in options.suites:
            for shape in options.step_shapes:
                show(tables.time_table(runner.step(shape)))
        if "exclusive" in options.suites:
            show(tables.time_table(runner.exclusive(options.exclusive_shape)))
        if "accuracy" in options.suites:
            show(tables.accuracy_table(runner.accuracy(options.accuracy_shape)), tables.check_table(report.checks))
        if "memory" in options.suites:
            show(tables.memory_table(runner.memory(list(options.memory_shapes))))
        if "kernels" in options.suites:
            families = comparisons.available_families() if options.families is None else options.families
            for section in runner.kernels(comparisons.comparisons(families, quick=options.quick)):
                show(tables.table_of(section))
    report.complete = True


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, which timeout(1) sends, as Ctrl-C. A second SIGTERM is ignored, so that the report is written."""

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def restart_with_malloc(settings: dict[str, str]) -> None:
    """Restart this process once with `settings`, since malloc reads them when a process starts."""
    if not settings.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **settings})


def main(arguments: Sequence[str] | None = None) -> None:
    from_command_line = arguments is None
    arguments = sys.argv[1:] if from_command_line else arguments
    options = tyro.cli(Options, prog="python -m benchmarks", args=arguments)
    if "kernels" in options.suites and (why := comparisons.missing(options.device)):
        sys.exit(why)
    if from_command_line and options.allocator == "reuse" and options.device == "cpu":
        restart_with_malloc(REUSE)
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    limit_to_available(options.device)
    output = options.output or default_output(options.device, options.quick)
    command = shlex.join(["python", "-m", "benchmarks", *arguments])
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    report = Report(command, options.device, torch.get_num_threads(), gpu)

    def nothing_selected() -> bool:
        return bool(options.only) and not any(section.entries for section in report.sections)

    def save() -> list[Verdict]:
        verdicts = targets.judge(report) + kernel_targets.judge(report)
        if not nothing_selected():
            report.write(output, verdicts)
        return verdicts

    with interrupted_by_sigterm():
        try:
            run(options, report, console, save)
        except KeyboardInterrupt:
            for section in report.sections[-1:]:
                console.print(tables.table_of(section))
            console.print("[yellow]Interrupted. The measurements so far are saved.[/]")
        finally:
            verdicts = save()
            if nothing_selected():
                sys.exit(
                    f"No contestant is named {' or '.join(map(repr, options.only))}: nothing was measured or written."
                )
            draw(report, output.with_suffix(".png"))
        if verdicts:
            console.print(tables.target_table(verdicts))
        console.print(f"Wrote {output} and a figure beside it.")
