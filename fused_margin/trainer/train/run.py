"""A training run: reads images, trains, verifies, and writes the files of the run."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fused_margin.evaluation.files import describe_skipped
from fused_margin.evaluation.plurals import counted, counted_identities

from ..config import TrainConfig
from ..config_values import write_file
from ..data import Splits, load_splits
from ..evaluate.figures import draw_report
from ..evaluate.network import Evaluation, Verification, count_known, describe_unseen, evaluate
from ..evaluate.reports import results_table, score_rows, score_values, versions
from ..models.build import build_backbone, describe_backbone, embedding_size
from ..pages.train import write_training_page
from .checkpoint import (
    FILE_NAME,
    CheckpointError,
    load_backbone_weights,
    load_into_backbone,
    load_run,
    remove_partial_checkpoints,
)
from .devices import Devices
from .logs import CURVES_NAME, LOG_NAME, RunLog, read_log
from .loop import Trainer

CONFIG_NAME = "config.yaml"
MAX_AVERAGE = 20  # steps at the start and the end of a run over which the shown losses are averaged
MAX_LISTED = 5  # number of unreadable images to print; the report has all


def run(config: TrainConfig, console: Console) -> dict[str, Any]:
    """Train or resume, verify, and write checkpoint, configuration, logs and report (JSON, PNG, HTML) to the output.

    Raises:
        BackboneError: the network cannot be made, or does not fit the images.
        CheckpointError: the output already has a run, or the run cannot be resumed.
        DataError: the images do not allow training or verification, or none of them can be read.
        Interrupted: stopped by a signal; a checkpoint has been written.
        FloatingPointError: the training diverged.
    """
    output = config.output_folder
    checkpoint = output / FILE_NAME
    if not config.resume and checkpoint.exists():
        raise CheckpointError(f"{output} holds a run: continue it with --resume or name another --output")
    remove_partial_checkpoints(checkpoint)
    # Build the network first, so that errors come before images are read.
    backbone = build_backbone(config)
    embedding_size(backbone, config.model)
    weights = None
    if config.weights is not None and not config.resume:
        weights = load_backbone_weights(config.weights)
        load_into_backbone(weights.backbone, backbone, config.weights)
    devices = Devices(config)
    console = devices.own_console(console)
    # The default name has the time, which differs between processes.
    output = Path(devices.broadcast(str(output)))
    config, checkpoint = dataclasses.replace(config, output=output), output / FILE_NAME
    state = load_run(checkpoint, "resume") if config.resume else None

    started = time.monotonic()
    with console.status("reading the images"):
        splits = read_splits(config)
    data_seconds = time.monotonic() - started
    trainer = Trainer(config, splits, devices, weights)
    if state is not None:
        trainer.load_state_dict(state)
    _print_start(console, config, trainer, splits)
    if devices.rank:
        trainer.fit(console, lambda: trainer.save(checkpoint))
        return _join_verification(trainer)
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / CONFIG_NAME, config.to_file_values())
    with closing(RunLog(output, trainer.step, [*trainer.logged_names, *_result_names(config, splits)])) as log:

        def save() -> None:
            log.flush()  # a resumed run does not repeat these steps
            trainer.save(checkpoint)

        trainer.fit(console, save, log.write)
        return _verify(config, console, trainer, splits, log, data_seconds)


def read_splits(config: TrainConfig) -> Splits:
    """Training and test images of a configuration."""
    model = config.model
    return load_splits(config.data, model.image_size, model.channels, config.test_fraction, config.seed)


def _join_verification(trainer: Trainer) -> dict[str, Any]:
    """Takes part in the collectives of rank 0's verification; returns an empty report."""
    devices, _ = trainer.devices, trainer.class_weight
    devices.union(trainer.unreadable)
    devices.fabric.barrier()
    return {}


def _verify(
    config: TrainConfig, console: Console, trainer: Trainer, splits: Splits, log: RunLog, data_seconds: float
) -> dict[str, Any]:
    """Evaluate the trained network, and log, draw, write and print the results."""
    output, devices = config.output_folder, trainer.devices
    started = time.monotonic()
    with console.status("verifying") as status:
        evaluation = evaluate(
            trainer.evaluated_backbone, trainer.class_weight, splits, config, devices.device, status.update
        )
    unreadable = sorted(devices.union(trainer.unreadable).union(evaluation.unreadable))
    devices.fabric.barrier()
    report = _report(config, trainer, splits, evaluation, unreadable)
    log.write(trainer.step, _logged(report, config, splits))
    if report["verification"] is None:
        title = f"{config.data}: trained on all {counted_identities(splits.train.num_classes)}"
    else:
        accuracy = report["verification"]["accuracy"]
        title = f"{config.data}: {_evaluated(report)}\naccuracy {accuracy:.2%}"
    draw_report(
        output / "report.png",
        title,
        evaluation,
        trainer.losses,
        config.epochs,
    )
    report["seconds"] = {
        "data": round(data_seconds, 2),
        "training": round(trainer.seconds, 2),
        "evaluation": round(time.monotonic() - started, 2),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    log.flush()
    _, rows = read_log(output / LOG_NAME)
    write_training_page(output / "report.html", report, config, evaluation, rows)
    _print_report(console, report, output)
    return report


def _report(
    config: TrainConfig,
    trainer: Trainer,
    splits: Splits,
    evaluation: Evaluation,
    unreadable: list[str],
) -> dict[str, Any]:
    separability = evaluation.separability
    averaged = averaged_steps(len(trainer.losses))
    return {
        "data": {
            "description": splits.description,
            "train": {"identities": splits.train.num_classes, "images": len(splits.train)},
            "test": {
                "identities": splits.test.num_classes,
                "images": len(splits.test),
                # Test identities whose names are among those that the initial weights were trained on.
                "named_as_before": count_known(splits.test.identities, trainer.identities_before),
            },
            "unreadable": unreadable,
            "skipped": dict(splits.skipped),
        },
        "verification": None if evaluation.verification is None else _verification_values(evaluation.verification),
        # None: the loss has no class weights.
        "separability": None if separability is None else dict(zip(("mean", "std"), separability, strict=True)),
        "training": {
            "steps": trainer.step,
            "first_loss": _mean(trainer.losses[:averaged]),
            "last_loss": _mean(trainer.losses[-averaged:]),
            "averaged_steps": averaged,
            "backbone_parameters": trainer.num_parameters,
        },
        "versions": versions(),
        "device": str(trainer.fabric.device),
        "threads": torch.get_num_threads(),
        "config": config.to_dict(),
    }


def _evaluated(report: dict[str, Any]) -> str:
    test = report["data"]["test"]
    return describe_unseen(test["identities"], test["named_as_before"])


def _verification_values(verified: Verification) -> dict[str, Any]:
    accuracy, threshold = verified.result.folds
    return {
        "accuracy": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std()),
        "fold_accuracy": accuracy.tolist(),
        "fold_threshold": threshold.tolist(),
        "pairs": len(verified.pairs.same),
        "folds_share_no_identity": verified.pairs.folds_disjoint,
        **score_values(verified.summary),
    }


def averaged_steps(steps: int) -> int:
    """Number of steps over which the shown first and last losses are averaged: at most an eighth of the run."""
    return max(1, min(MAX_AVERAGE, steps // 8))


def _result_names(config: TrainConfig, splits: Splits) -> list[str]:
    """Names of the results that are logged after the training."""
    verification = ["verification/accuracy", "verification/auc", "verification/tar_at_far"] if len(splits.test) else []
    separability = ["separability/mean", "separability/std"] if config.loss.has_class_weights else []
    return [*verification, *separability]


def _logged(report: dict[str, Any], config: TrainConfig, splits: Splits) -> dict[str, float]:
    """The results by their logged names; without the TAR if there are too few impostors for the FAR."""
    results = {}
    for name in _result_names(config, splits):
        part, measure = name.split("/")
        if measure != "tar_at_far" or report[part]["far_resolved"]:
            results[name] = report[part][measure]
    return results


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _print_start(console: Console, config: TrainConfig, trainer: Trainer, splits: Splits) -> None:
    verified = f"verify: {counted(splits.test.num_classes, 'other identity', 'other identities')}, {counted(len(splits.test), 'image')}"
    if not len(splits.test):
        verified = "no identities for verification"
    console.print(splits.description, style="bold", highlight=False)
    console.print(
        f"train: {counted_identities(splits.train.num_classes)}, {counted(len(splits.train), 'image')}\n{verified}\n"
        f"{describe_backbone(config)} with {trainer.num_parameters:,} parameters, "
        f"{counted(trainer.total_steps, 'step')} on {trainer.fabric.device}",
        highlight=False,
    )
    if config.loss.weight_dtype != "float32":
        stochastic = config.steps_in_backward and config.optimizer.stochastic_rounding
        rounded = "stochastically" if stochastic else "to nearest"
        console.print(f"class weights in {config.loss.weight_dtype}, rounded {rounded}", highlight=False)
    if splits.skipped:
        console.print(describe_skipped(splits.skipped), highlight=False, soft_wrap=True)
    if config.weights is not None and not config.resume:
        console.print(f"starting from the weights of {config.weights}", highlight=False, soft_wrap=True)
    if trainer.step:
        console.print(f"continuing at step {trainer.step:,}", highlight=False)


def _print_report(console: Console, report: dict[str, Any], output: Path) -> None:
    verification, separability = report["verification"], report["separability"]
    seconds, training = report["seconds"], report["training"]
    title = "Trained on all identities, without verification"
    if verification is not None:
        title = f"Verification on {_evaluated(report)}"
    table = results_table(title)
    if verification is not None:
        table.add_row(
            f"accuracy, {len(verification['fold_accuracy'])} folds, {verification['pairs']:,} pairs",
            f"{verification['accuracy']:.2%} ± {verification['accuracy_std']:.2%}",
        )
        for row in score_rows(verification):
            table.add_row(*row)
    if separability is not None:
        table.add_row("Sep of the class weights", f"{separability['mean']:.3f} ± {separability['std']:.3f}")
    if training["last_loss"] is not None:
        averaged = training["averaged_steps"]
        steps = f"{averaged} steps" if averaged > 1 else "step"
        table.add_row(f"loss, first to last {steps}", f"{training['first_loss']:.2f} to {training['last_loss']:.2f}")
    table.add_row(
        "seconds to read, train, verify",
        " + ".join(f"{seconds[part]:.0f}" for part in ("data", "training", "evaluation")),
    )
    console.print(table)
    unreadable = report["data"]["unreadable"]
    if unreadable:
        lines = [f"skipped {counted(len(unreadable), 'unreadable image')}:", *unreadable[:MAX_LISTED]]
        if (more := len(unreadable) - MAX_LISTED) > 0:
            lines.append(f"and {more:,} more, listed in the report")
        console.print(*lines, sep="\n  ", highlight=False, soft_wrap=True)
    names = ", ".join((FILE_NAME, CONFIG_NAME, LOG_NAME, f"{CURVES_NAME}/", "report.json", "report.png", "report.html"))
    console.print(f"files in {output}: {names}", highlight=False, soft_wrap=True)
