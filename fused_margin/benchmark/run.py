"""The options of `fused-margin benchmark`, and its run: measures, prints a table, writes the result and a picture."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

import fused_margin as fm

from .environment import header, machine_name
from .heads import DEFAULT_MODE, TUNED_MODE, Comparison
from .losses import LossName, has_peer
from .measure import Measurement, needed_bytes
from .memory import USABLE, available_bytes, limit_to_available, measures_peaks
from .problems import Shape
from .results import Problem
from .tables import step_table

STUDY = "benchmark"  # the entry `study` of the file
TABLE_WIDTH = 140  # if the output is not a terminal
COMPILATIONS = {"none": (), "default": (DEFAULT_MODE,), "max-autotune": (DEFAULT_MODE, TUNED_MODE)}


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time whole training steps of a classification head on this machine: forward, backward and optimizer; and their memory.

    Ours, with the step of the class weights in the backward and with a stored gradient, beside the same loss in eager
    PyTorch, compiled by torch.compile, and of pytorch-metric-learning if that is installed. Ours projects the class
    weights. The others use SGD(fused=True). All are timed in turns, and a contestant with a wrong loss is not timed. The
    defaults take about a minute on two CPU cores.
    """

    batch_size: int = 128
    """N, the number of embeddings per step."""
    num_classes: int = 50_000
    """C."""
    embedding_size: int = 512
    """D."""
    loss: LossName = "arcface"
    """Loss, with the margin of its paper and scale 64."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of embeddings, class weights and momentum."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: a GPU, if there is one and the kernels are built for it."""
    threads: Annotated[
        int | None, tyro.conf.arg(help_behavior_hint=f"(default: {torch.get_num_threads()}, torch's choice)")
    ] = None
    """CPU threads."""
    rounds: int = 5
    """Timed rounds. Each runs every contestant once."""
    warmup: int = 1
    """Untimed rounds before the timed ones."""
    compile: Literal["none", "default", "max-autotune"] = "default"
    """Mode of torch.compile. It needs a C++ compiler on a CPU.
    max-autotune: the faster of default and max-autotune; its compilation takes minutes.
    none: without torch.compile."""
    ours_only: bool = False
    """Only ours, without a check of the loss: for numbers of classes that the others cannot hold."""
    memory: bool = True
    """Measure the peak memory of every contestant, each in a fresh process. On Linux only, unless on a GPU."""
    output: Annotated[Path | None, tyro.conf.arg(help_behavior_hint="(default: no file)")] = None
    """JSON file to write, with the picture beside it as .png."""

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "num_classes": 2, "embedding_size": 1, "threads": 1, "rounds": 1, "warmup": 0}
        for name, lowest in least.items():
            if (value := getattr(self, name)) is not None and value < lowest:
                raise ValueError(f"{name.replace('_', '-')} must be at least {lowest}, got {value}")
        if self.threads is not None and self.threads > (processors := os.cpu_count() or 1):
            raise ValueError(
                f"threads must be at most {processors}, the processors of this machine, got {self.threads}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: torch finds no GPU; use --device cpu")
        if self.device == "cuda" and not fm.build_info()["cuda"]["available"]:
            raise ValueError("device: the kernels are not built for a GPU (see fused-margin info); use --device cpu")
        if self.output is not None and (self.output.is_dir() or self.output.suffix != ".json"):
            raise ValueError(f"output: expected the name of a .json file, got {str(self.output)!r}")

    @property
    def chosen_device(self) -> str:
        if self.device != "auto":
            return self.device
        return "cuda" if fm.build_info()["cuda"]["available"] else "cpu"

    @property
    def shape(self) -> Shape:
        return Shape(self.batch_size, self.embedding_size, self.num_classes)

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.loss, self.dtype, COMPILATIONS[self.compile], peers=not self.ours_only)


class DoesNotFitError(Exception):
    """The contestants need more memory than is available."""


def run_benchmark(config: BenchmarkConfig, console: Console, args: Sequence[str]) -> None:
    """Measure, print the table, and write the files. After an interruption they have what was measured before it.

    Args:
        args: the options as given, for the result.

    Raises:
        DoesNotFitError: the memory is too small. Nothing was measured.
        KeyboardInterrupt: Ctrl-C; the table and the files were written.
        OSError: a file cannot be written.
    """
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    device = config.chosen_device
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _require_memory(config.shape, config.comparison, available_bytes(device))
    limit_to_available(device)
    if config.output is not None:
        config.output.parent.mkdir(parents=True, exist_ok=True)
    start = header(shlex.join(["fused-margin", "benchmark", *args]), device)
    machine = machine_name(device, torch.get_num_threads())
    versions = start["versions"]
    console.print(
        f"{machine}, torch {versions['torch']}, fused_margin {versions['fused_margin']['version']}", highlight=False
    )
    problem = Problem(config.shape, comparison=config.comparison)
    complete = False
    try:
        with _progress(console) as say:
            measurement = Measurement(config.comparison, device, config.rounds, config.warmup, say)
            measurement.times(problem)
            if config.memory:
                measurement.memory(problem)
        complete = True
    finally:
        if complete or any(row.rounds for row in problem.rows):
            console.print(step_table(problem))
            if config.output is not None:
                options = {"threads": torch.get_num_threads(), "options": _plain(config), "device": device}
                _write(config.output, {**start, "study": STUDY, "complete": complete, **options}, problem, machine)
                console.print(f"wrote {config.output} and {config.output.with_suffix('.png').name}", highlight=False)
    if not config.ours_only and not has_peer():
        console.print("pytorch-metric-learning is not installed, and was left out", highlight=False)
    if config.memory and not measures_peaks(device):
        console.print("this system does not measure the peak memory of a process on a CPU", highlight=False)


def _require_memory(shape: Shape, comparison: Comparison, available: int) -> None:
    needed = needed_bytes(shape, comparison)
    if needed <= USABLE * available:
        return
    advice = "choose a smaller --num-classes, --batch-size or --embedding-size"
    if comparison.peers:
        alone = needed_bytes(shape, Comparison(comparison.loss, comparison.dtype, peers=False))
        advice += f", or --ours-only, which needs about {alone:,} bytes ({alone / 1e9:,.1f} GB)"
    raise DoesNotFitError(
        f"{shape.label} in {comparison.dtype} does not fit: it needs about {needed:,} bytes ({needed / 1e9:,.1f} GB), and "
        f"{available:,} bytes ({available / 1e9:.1f} GB) of memory are available; {advice}"
    )


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A function that shows what is being measured: in one line of a terminal, otherwise as lines."""
    if not console.is_terminal:
        yield lambda text: console.print(text, highlight=False)
        return
    with console.status("") as status:
        yield status.update


def _plain(config: BenchmarkConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name != "output"}


def _write(path: Path, start: dict[str, Any], problem: Problem, machine: str) -> None:
    from .figure import draw

    content = {**start, "problems": [problem.summary()]}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draw([problem], path.with_suffix(".png"), machine)
