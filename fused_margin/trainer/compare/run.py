"""Trains and measures several losses with several seeds, and writes the table of their results."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from fused_margin.evaluation.plurals import counted

from ..config import TrainConfig
from ..evaluate.reports import versions
from ..pages.compare import write_comparison_page
from ..train.checkpoint import FILE_NAME, CheckpointError, load_backbone_weights, load_run
from ..train.loop import Trainer
from ..train.run import read_splits, run
from .benchmarks import Benchmark, open_benchmarks
from .config import CompareConfig
from .table import RANDOM, markdown, screen_table, table, unresolved_note

LAST_FILE = "report.html"  # that a training writes
TIMED_STEPS = 20  # per loss. Losses take turns, so that machine noise affects all alike.


def compare(config: CompareConfig, console: Console) -> dict[str, Any]:
    """Train and measure the losses that are not finished, and write compare.json, compare.md and compare.html.

    Raises:
        BackboneError: a backbone cannot be made, or does not fit the images.
        CheckpointError: the output has runs with other options.
        DataError: there is nothing to evaluate at the path of a benchmark.
        Interrupted: stopped by a signal; finished runs are kept.
    """
    # Errors in the benchmarks come before any training.
    training = config.training(config.losses[0], config.seeds[0])
    benchmarks = open_benchmarks(config.benchmarks, config.variant, training)
    measures = [measure for benchmark in benchmarks for measure in benchmark.measures]
    total = len(config.losses) * len(config.seeds)
    rows: dict[str, list[dict[str, float]]] = {}
    config.output.mkdir(parents=True, exist_ok=True)
    for number, (seed, loss) in enumerate((s, loss) for s in config.seeds for loss in config.losses):
        run_name = f"{number + 1} of {total}: {loss}, seed {seed}"
        with console.status(run_name):
            measured = measure(config.training(loss, seed), benchmarks, trained=loss != RANDOM)
        rows.setdefault(loss, []).append(measured)
        rates = [f"{each.heading.removesuffix(', %')} {measured[each.key]:.2%}" for each in measures if each.is_percent]
        console.print(f"{run_name}: {', '.join(rates)}", highlight=False, soft_wrap=True)
    step_ms = None if config.benchmarks else _step_times(config, console)
    report = {
        "data": config.images,
        "epochs": training.epochs,
        "seeds": list(config.seeds),
        **_evaluated(config, benchmarks, rows),
        "losses": {
            loss: {
                "config": of_loss.to_dict()["loss"],
                "groups": of_loss.model.groups,
                "images_per_identity": of_loss.images_per_identity,
                "seeds": rows[loss],
                "step_ms": None if step_ms is None else step_ms[loss],
            }
            for loss in config.losses
            for of_loss in [config.training(loss, config.seeds[0])]
        },
        "versions": versions(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (config.output / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    header, lines = table(rows, step_ms, measures)
    note = unresolved_note(rows, measures)
    (config.output / "compare.md").write_text(
        markdown(header, lines) + (f"\n{note}\n" if note else ""), encoding="utf-8"
    )
    write_comparison_page(config.output / "compare.html", report, config, benchmarks)
    over = f", mean±std over {len(config.seeds)} seeds" if len(config.seeds) > 1 else f", seed {config.seeds[0]}"
    console.print(f"\n{config.images}, {counted(training.epochs, 'epoch')}{over}", highlight=False, soft_wrap=True)
    shown = [measure for measure in measures if measure.better]  # the others would make it wider than 80 columns
    console.print(screen_table(*table(rows, step_ms, shown)), markup=False, highlight=False, soft_wrap=True)
    if note:
        console.print(note, highlight=False)
    console.print(
        f"files in {config.output}: compare.json, compare.md, compare.html, a folder per run",
        highlight=False,
        soft_wrap=True,
    )
    return report


def _evaluated(
    config: CompareConfig, benchmarks: Sequence[Benchmark], rows: Mapping[str, Sequence[Mapping[str, float]]]
) -> dict[str, Any]:
    """What the networks were evaluated on, for the report."""
    if config.benchmarks:
        return {"benchmarks": {benchmark.name: benchmark.settings for benchmark in benchmarks}}
    first = rows[config.losses[0]]
    return {"distractors": {seed: run["distractors"] for seed, run in zip(config.seeds, first, strict=True)}}


def measure(training: TrainConfig, benchmarks: Sequence[Benchmark], *, trained: bool) -> dict[str, float]:
    """Train unless finished; evaluate on the benchmarks whose results are not there yet."""
    output = training.output_folder
    checkpoint = output / FILE_NAME
    if checkpoint.exists():
        try:
            started_with = TrainConfig.from_dict(load_run(checkpoint, "continue")["config"])
        except ValueError as error:
            raise CheckpointError(f"cannot continue {output}: {error}") from error
        if differences := training.differences(started_with):
            raise CheckpointError(f"{output} has a run with other options: {'; '.join(differences)}")
    stored = [benchmark.stored(output) for benchmark in benchmarks]
    if None in stored and not (output / LAST_FILE).exists():
        _train(training, trained=trained)
    results: dict[str, float] = {}
    for benchmark, result in zip(benchmarks, stored, strict=True):
        results |= benchmark.evaluate(training) if result is None else result
    return results


def _train(training: TrainConfig, *, trained: bool) -> None:
    """Train, or continue; an untrained network is only saved."""
    output = training.output_folder
    checkpoint = output / FILE_NAME
    if trained:
        run(dataclasses.replace(training, resume=checkpoint.exists()), Console(quiet=True))
    elif not checkpoint.exists():
        output.mkdir(parents=True, exist_ok=True)
        weights = None if training.weights is None else load_backbone_weights(training.weights)
        Trainer(training, read_splits(training), weights=weights).save(checkpoint)


def _step_times(config: CompareConfig, console: Console) -> dict[str, float | None]:
    """Median milliseconds of a training step by loss; None for the untrained network."""
    with console.status("timing steps"):
        timed = time_steps([config.training(loss, config.seeds[0]) for loss in config.losses if loss != RANDOM])
    return {loss: timed.get(f"{loss}-{config.seeds[0]}") for loss in config.losses}


def time_steps(trainings: list[TrainConfig]) -> dict[str, float]:
    """Median milliseconds of a training step, by folder name of the run."""
    if not trainings:
        return {}
    splits = read_splits(trainings[0])
    trainers = {config.output_folder.name: Trainer(config, splits) for config in trainings}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    batches = zip(*(trainer.batches for trainer in trainers.values()), strict=False)  # may differ between losses
    for number, drawn in enumerate(itertools.islice(batches, 1 + TIMED_STEPS)):
        read = {indices: splits.train.__getitems__(list(indices)) for indices in set(map(tuple, drawn))}
        for (name, trainer), indices in zip(trainers.items(), drawn, strict=True):
            batch = read[tuple(indices)]
            started = time.monotonic()
            result = trainer.train_step(batch.images, batch.labels)
            if result is not None:
                result.loss.item()  # waits for the device
            if number:  # without the first step, which allocates memory
                seconds[name].append(time.monotonic() - started)
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
