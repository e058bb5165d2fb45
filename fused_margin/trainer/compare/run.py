"""Trains and measures several losses with several seeds, and writes the table of their results."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import statistics
import time
from typing import Any

import torch
from rich.console import Console

from fused_margin.evaluation.plurals import counted

from ..config import TrainConfig
from ..evaluate.config import EvaluateConfig
from ..evaluate.reports import versions
from ..evaluate.run import run_evaluation
from ..pages.compare import write_comparison_page
from ..train.checkpoint import FILE_NAME, CheckpointError, load_run
from ..train.loop import Trainer
from ..train.run import read_splits, run
from .config import RANDOM, CompareConfig
from .table import FAR, markdown, screen_table, table, unresolved_note

TIMED_STEPS = 20  # per loss. Losses take turns, so that machine noise affects all alike.


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Train and measure the losses that are not finished, and write compare.json, compare.md and compare.html.

    Raises:
        CheckpointError: the output has runs with other options.
        Interrupted: stopped by a signal; finished runs are kept.
    """
    total = len(config.losses) * len(config.seeds)
    rows: dict[str, list[dict[str, float]]] = {}
    config.output.mkdir(parents=True, exist_ok=True)
    for number, (seed, loss) in enumerate((s, loss) for s in config.seeds for loss in config.losses):
        with console.status(f"{number + 1} of {total}: {loss}, seed {seed}"):
            measured = measure(config.training(loss, seed), trained=loss != RANDOM)
        rows.setdefault(loss, []).append(measured)
        console.print(
            f"{number + 1} of {total}: {loss}, seed {seed}: accuracy {measured['accuracy']:.2%}", highlight=False
        )
    with console.status("timing steps"):
        timed = time_steps([config.training(loss, config.seeds[0]) for loss in config.losses if loss != RANDOM])
    step_ms = {loss: timed.get(f"{loss}-{config.seeds[0]}") for loss in config.losses}
    report = {
        "data": config.data,
        "epochs": config.epochs,
        "seeds": list(config.seeds),
        "distractors": {seed: rows[config.losses[0]][k]["distractors"] for k, seed in enumerate(config.seeds)},
        "losses": {
            loss: {
                "config": config.training(loss, 0).to_dict()["loss"],
                "seeds": rows[loss],
                "step_ms": step_ms[loss],
            }
            for loss in config.losses
        },
        "versions": versions(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (config.output / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    header, lines = table(rows, step_ms)
    note = unresolved_note(rows)
    (config.output / "compare.md").write_text(
        markdown(header, lines) + (f"\n{note}\n" if note else ""), encoding="utf-8"
    )
    write_comparison_page(config.output / "compare.html", report, config)
    over = f", mean±std over {len(config.seeds)} seeds" if len(config.seeds) > 1 else f", seed {config.seeds[0]}"
    console.print(f"\n{config.data}, {counted(config.epochs, 'epoch')}{over}", highlight=False)
    console.print(screen_table(header, lines), markup=False, highlight=False, soft_wrap=True)
    if note:
        console.print(note, highlight=False)
    console.print(
        f"files in {config.output}: compare.json, compare.md, compare.html, a folder per run",
        highlight=False,
        soft_wrap=True,
    )
    return report


def measure(config: TrainConfig, *, trained: bool) -> dict[str, float]:
    """Train unless finished; evaluate with the protocols pairs and megaface."""
    quiet, output = Console(quiet=True), config.output_folder
    done, checkpoint = output / "measured.json", output / FILE_NAME
    if checkpoint.exists():
        try:
            started_with = TrainConfig.from_dict(load_run(checkpoint, "continue")["config"])
        except ValueError as error:
            raise CheckpointError(f"cannot continue {output}: {error}") from error
        if differences := config.differences(started_with):
            raise CheckpointError(f"{output} has a run with other options: {'; '.join(differences)}")
    if done.exists():
        return json.loads(done.read_text(encoding="utf-8"))
    if trained:
        run(dataclasses.replace(config, resume=checkpoint.exists()), quiet)
    else:
        output.mkdir(parents=True, exist_ok=True)
        Trainer(config, read_splits(config)).save(checkpoint)
    pairs, search = (
        run_evaluation(
            EvaluateConfig(checkpoint=output, protocol=protocol, far=FAR, accelerator=config.accelerator), quiet
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
    temporary = done.with_suffix(".tmp")  # so that a kill leaves a complete file or none
    temporary.write_text(json.dumps(measured) + "\n", encoding="utf-8")
    os.replace(temporary, done)
    return measured


def time_steps(trainings: list[TrainConfig]) -> dict[str, float]:
    """Median milliseconds of a training step, by folder name of the run."""
    if not trainings:
        return {}
    splits = read_splits(trainings[0])
    trainers = {config.output_folder.name: Trainer(config, splits) for config in trainings}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batches = itertools.islice(iter(next(iter(trainers.values())).batches), 1 + TIMED_STEPS)
    for number, indices in enumerate(batches):
        batch = splits.train.__getitems__(indices)
        for name, trainer in trainers.items():
            started = time.monotonic()
            result = trainer.train_step(batch.images, batch.labels)
            if result is not None:
                result.loss.item()  # waits for the device
            if number:  # without the first step, which allocates memory
                seconds[name].append(time.monotonic() - started)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
