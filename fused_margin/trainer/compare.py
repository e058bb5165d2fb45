"""The command `fused-margin compare`: losses under one budget and several seeds, in the table that papers print."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console

import fused_margin as fm

from .checkpoint import FILE_NAME, CheckpointError, load_run, save_checkpoint
from .cli import INTERRUPTED, failed, termination_as_interrupt
from .companions import TAKES
from .config import TrainConfig
from .consoles import command_consoles, plain_console
from .data import DataError, Splits, load_splits
from .evaluate_config import EvaluateConfig
from .evaluate_run import run_evaluation
from .interrupts import Interrupted
from .loop import Trainer
from .losses import LOSSES, LossConfig
from .run import run
from .wording import counted

PROG = "fused-margin compare"
RANDOM = "random-weights"  # a network that has not been trained
EXCLUSIVE = "exclusive"
# Weights of what is added to a loss; where a paper names one, that.
ADDED = {EXCLUSIVE: 1.0, "center": 0.003, "ring": 0.01, "intra": 1.0, "inter": 1.0, "uniform": 1.0, "triplet": 1.0}
MEASURES = {
    "accuracy": "verification accuracy, %",
    "tar": "TAR at FAR = 1e-3, %",
    "rank1": "rank-1, %",
    "sep_mean": "Sep mean",
    "sep_std": "Sep std",
}
LOSSES_HELP = (
    "Losses to compare, by their names: " + ", ".join(LOSSES) + f".\n {RANDOM} is the network before training."
    "\n A + adds a term with its weight: arcface+exclusive, softmax+center=0.003."
    f"\n Terms with their default weights: {', '.join(f'{name}={ADDED.get(name, 1.0):g}' for name in (EXCLUSIVE, *TAKES))}."
)
PERCENT = ("accuracy", "tar", "rank1")
STEP_TIME = "ms per step"
HEADING_WIDTH = 12  # longer headings of the table on the screen take several lines
TIMED_STEPS = 20  # a loss, one after the other in turns, so that the machine's moods are everyone's
FAR = 1e-3


@dataclass(frozen=True)
class CompareConfig:
    """Train several losses with the same settings, from several seeds, and write a table of their results.

    Finished runs are kept: the same command continues where it was stopped.
    """

    losses: Annotated[tuple[str, ...], tyro.conf.arg(help=LOSSES_HELP)] = (
        RANDOM, "softmax", "normface", "sphereface", "sphereface+exclusive", "cosface", "cosface+exclusive", "arcface",
        "arcface+exclusive",
    )  # fmt: skip
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each loss.
    Each seed draws its own test identities, initial weights, order and augmentation, the same for all losses."""
    epochs: int = 5
    """Passes over the training images."""
    data: Literal["glyphs", "digits"] = "glyphs"
    """Images to train on. Both need no download; the margins and scales of the losses are set for them."""
    output: Path = Path("runs/compare")
    """Folder for the runs, compare.json and compare.md."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto takes a GPU if there is one and the kernels are built for it."""

    def __post_init__(self) -> None:
        for name, given in (("losses", self.losses), ("seeds", self.seeds)):
            if not given:
                raise ValueError(f"{name}: expected one at least")
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once, got {' '.join(map(str, given))}")
        for loss in self.losses:
            for seed in self.seeds:
                self.training(loss, seed)  # raises ValueError for what no training can have

    def training(self, loss: str, seed: int) -> TrainConfig:
        chosen = LossConfig() if loss == RANDOM else loss_config(loss)
        return dataclasses.replace(
            TrainConfig.defaults(self.data, "small", chosen.name),
            loss=chosen,
            epochs=self.epochs,
            seed=seed,
            output=self.output / f"{loss}-{seed}",
            accelerator=self.accelerator,
        )


def loss_config(text: str) -> LossConfig:
    """ "arcface+exclusive=0.5" as a configuration.

    Raises:
        ValueError: no such loss, or nothing that can be added.
    """
    name, *added = text.split("+")
    if name not in LOSSES:
        raise ValueError(f"losses: expected {RANDOM} or one of {', '.join(LOSSES)}, got {name!r}")
    weights = {}
    for part in added:
        what, _, weight = part.partition("=")
        if what in weights:
            raise ValueError(f"losses: expected {what} once in {text}")
        if what != EXCLUSIVE and what not in TAKES:
            raise ValueError(f"losses: expected {EXCLUSIVE}, {', '.join(TAKES)} after the +, got {what!r}")
        try:
            weights[what] = float(weight) if weight else ADDED.get(what, 1.0)
        except ValueError:
            raise ValueError(f"losses: expected a number after {what}=, got {weight!r}") from None
    config = dataclasses.replace(LossConfig.small_data(name), exclusive_weight=weights.pop(EXCLUSIVE, 0.0))
    return dataclasses.replace(config, companions=dataclasses.replace(config.companions, **weights))


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = tyro.cli(CompareConfig, prog=PROG, args=args)
    try:
        with termination_as_interrupt():
            compare(config, console)
    except (Interrupted, KeyboardInterrupt):
        console.print("interrupted; the same command goes on from here")
        return INTERRUPTED
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        return failed(errors, error)
    return 0


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Train and measure what is not yet, write compare.json and compare.md.

    Raises:
        CheckpointError: the output holds runs with other options.
        Interrupted: stopped by a signal; what is there is kept.
    """
    total, rows = len(config.losses) * len(config.seeds), {}
    config.output.mkdir(parents=True, exist_ok=True)
    for number, (seed, loss) in enumerate((s, loss) for s in config.seeds for loss in config.losses):
        with console.status(f"{number + 1} of {total}: {loss}, seed {seed}"):
            measured = measure(config.training(loss, seed), trained=loss != RANDOM)
        rows.setdefault(loss, []).append(measured)
        console.print(
            f"{number + 1} of {total}: {loss}, seed {seed}: accuracy {measured['accuracy']:.2%}", highlight=False
        )
    with console.status("timing steps"):
        step_ms = time_steps([config.training(loss, config.seeds[0]) for loss in config.losses if loss != RANDOM])
    report = {
        "data": config.data,
        "epochs": config.epochs,
        "seeds": list(config.seeds),
        "distractors": {seed: rows[config.losses[0]][k]["distractors"] for k, seed in enumerate(config.seeds)},
        "losses": {
            loss: {
                "config": config.training(loss, 0).to_dict()["loss"],
                "seeds": rows[loss],
                "step_ms": step_ms.get(f"{loss}-{config.seeds[0]}"),
            }
            for loss in config.losses
        },
        "versions": {
            "fused_margin": fm.build_info()["version"], "torch": torch.__version__, "python": platform.python_version()
        },
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    (config.output / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    header, lines = table(rows, {loss: report["losses"][loss]["step_ms"] for loss in rows})
    note = unresolved_note(rows)
    (config.output / "compare.md").write_text(
        markdown(header, lines) + (f"\n{note}\n" if note else ""), encoding="utf-8"
    )
    over = f", mean±std over {len(config.seeds)} seeds" if len(config.seeds) > 1 else f", seed {config.seeds[0]}"
    console.print(f"\n{config.data}, {counted(config.epochs, 'epoch')}{over}", highlight=False)
    console.print(screen_table(header, lines), markup=False, highlight=False, soft_wrap=True)
    if note:
        console.print(note, highlight=False)
    console.print(
        f"files in {config.output}: compare.json, compare.md, a folder a run", highlight=False, soft_wrap=True
    )
    return report


def measure(config: TrainConfig, *, trained: bool) -> dict[str, float]:
    """Train, unless that is done; verify, and search among distractors."""
    quiet, done = plain_console(quiet=True), config.output / "measured.json"
    checkpoint = config.output / FILE_NAME
    if checkpoint.exists():
        started_with = TrainConfig.from_dict(load_run(checkpoint, "continue")["config"])
        if differences := config.differences(started_with):
            raise CheckpointError(f"{config.output} holds a run with other options: {'; '.join(differences)}")
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    if trained:
        run(dataclasses.replace(config, resume=checkpoint.exists()), quiet)
    else:
        config.output.mkdir(parents=True, exist_ok=True)
        save_checkpoint(checkpoint, Trainer(config, read_splits(config)).state_dict())
    pairs, search = (
        run_evaluation(
            EvaluateConfig(checkpoint=config.output, protocol=protocol, far=FAR, accelerator=config.accelerator), quiet
        )
        for protocol in ("pairs", "megaface")
    )
    last = search["result"]["rank1"][-1]
    measured = {
        "accuracy": pairs["result"]["accuracy"],
        "tar": pairs["scores"]["tar_at_far"],
        "far_resolved": pairs["scores"]["far_resolved"],
        "impostors": pairs["scores"]["impostors"],
        "rank1": last["rate"],
        "distractors": last["distractors"],
        "sep_mean": pairs["separability"]["mean"],
        "sep_std": pairs["separability"]["std"],
    }
    done.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    return measured


def read_splits(config: TrainConfig) -> Splits:
    model = config.model
    return load_splits(config.data, model.image_size, model.channels, config.test_fraction, config.seed)


def time_steps(trainings: list[TrainConfig]) -> dict[str, float]:
    """Median milliseconds of a training step, by the names of the runs' folders."""
    if not trainings:
        return {}
    splits = read_splits(trainings[0])
    trainers = {config.output.name: Trainer(config, splits) for config in trainings}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batches = itertools.islice(iter(next(iter(trainers.values())).batches), 1 + TIMED_STEPS)
    for number, indices in enumerate(batches):
        batch = splits.train.__getitems__(indices)
        for name, trainer in trainers.items():
            started = time.monotonic()
            trainer.train_step(batch.images, batch.labels).loss.item()
            if number:  # the first pays for what later ones reuse
                seconds[name].append(time.monotonic() - started)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}


def table(
    rows: dict[str, list[dict[str, float]]], step_ms: dict[str, float | None]
) -> tuple[list[str], list[list[str]]]:
    """Header and lines; each number is the mean over the seeds, with the standard deviation where there are several."""
    lines = []
    for loss, seeds in rows.items():
        line = [loss]
        for name in MEASURES:
            values = np.array([measured[name] for measured in seeds])
            values, digits = (100 * values, 2) if name in PERCENT else (values, 3)
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            line.append(f"{values.mean():.{digits}f}{spread}")
        lines.append([*line, "" if step_ms[loss] is None else f"{step_ms[loss]:.1f}"])
    return ["loss", *MEASURES.values(), STEP_TIME], lines


def screen_table(header: list[str], lines: list[list[str]]) -> str:
    """The table for a screen of 80 columns: the name of each loss is on the line above its numbers."""
    headings = [textwrap.wrap(name, HEADING_WIDTH) for name in header[1:]]
    height = max(map(len, headings))
    rows = [list(row) for row in zip(*([""] * (height - len(words)) + words for words in headings), strict=True)]
    names = [""] * height + [name for name, *_ in lines]
    rows += [[cell.replace(" ± ", "±") for cell in cells] for _, *cells in lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    written = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(f"{name}\n{row}" if name else row for name, row in zip(names, written, strict=True))


def unresolved_note(rows: dict[str, list[dict[str, float]]]) -> str:
    """Says where there are too few impostors for the false accept rate of the table; empty where there are enough."""
    # Runs that were measured by an older version do not tell.
    few = {run["impostors"] for seeds in rows.values() for run in seeds if not run.get("far_resolved", True)}
    if not few:
        return ""
    return f"TAR at FAR = {FAR:g}: none of {' or '.join(f'{number:,}' for number in sorted(few))} impostors may pass."


def markdown(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *lines))
