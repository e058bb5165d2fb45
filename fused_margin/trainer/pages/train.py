"""The page of a training, report.html."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_margin.evaluation.plurals import counted, counted_identities

from ..config import OptimizerConfig, TrainConfig
from ..config_values import to_yaml
from ..evaluate.mistakes import scored_pairs
from ..evaluate.network import Evaluation, Verification, describe_unseen
from ..models.build import describe_backbone
from ..train.named_losses import described_settings
from .charts import Chart
from .mistakes import MistakeGroup, describe_images, pair_mistakes, picture_note
from .plots import roc_chart, score_chart, separability_chart, training_charts
from .render import Command, Facts, Result, percent, version_facts, write_page
from .results import duration, fold_table, score_results, separability_result, short_path, skipped_lines

NOT_VERIFIED = (
    "Nothing was verified: the network was trained on all identities, so there are neither scores nor mistakes. "
    "The commands below evaluate it on other images."
)


def write_training_page(
    path: Path,
    report: Mapping[str, Any],
    config: TrainConfig,
    evaluation: Evaluation,
    log: Sequence[Mapping[str, str]],
) -> None:
    """Write the page of a finished training.

    Args:
        path: of the page.
        report: the values of report.json.
        config: of the training.
        evaluation: its results, of which the page shows curves and mistakes.
        log: the rows of log.csv.
    """
    data, verification = report["data"], evaluation.verification
    source = short_path(config.data)
    separability = [] if report["separability"] is None else [separability_result(report["separability"])]
    values = {
        "kind": "training",
        "title": f"{config.loss.name} on {source}",
        "lead": _lead(report, config),
        "results": separability,
        "notes": [NOT_VERIFIED],
        "charts": [] if evaluation.nearest_cosine is None else [separability_chart(evaluation.nearest_cosine)],
        "folds": None,
        "mistakes": [],
        "pictures": "",
        "curves": training_charts(log),
        "training": _training_text(report, config),
        "unreadable": data["unreadable"],
        "skipped": skipped_lines(data["skipped"]),
        "settings_title": "What was trained",
        "facts": [
            Facts("Data", _data_facts(report, config)),
            Facts("Network", _network_facts(report, config)),
            Facts("Loss", [("loss", config.loss.name), *described_settings(config.loss)]),
            Facts("Optimizer", _optimizer_facts(config)),
            Facts("Run", _run_facts(report, config)),
            Facts("Versions", version_facts(report["versions"])),
        ],
        "configuration": to_yaml(config.to_file_values()),
        "commands": _commands(config, verified=verification is not None),
        "json_name": path.with_suffix(".json").name,
    }
    if verification is not None:
        verified = report["verification"]
        accuracy = percent(verified["accuracy"], verified["accuracy_std"])
        over = f"mean ± standard deviation over {counted(len(verified['fold_accuracy']), 'fold')}"
        values["results"] = [Result("Verification accuracy", accuracy, over), *score_results(verified), *separability]
        values["notes"] = []
        values["charts"] = [*_verification_charts(verification), *values["charts"]]
        values["folds"] = fold_table(verified, "cosine")
        values["mistakes"] = _mistakes(verification)
        values["pictures"] = picture_note(verification.shown)
    write_page(path, "train.html", values)


def _lead(report: Mapping[str, Any], config: TrainConfig) -> str:
    train, test, verified = report["data"]["train"], report["data"]["test"], report["verification"]
    images = f"{counted(train['images'], 'image')} of {counted_identities(train['identities'])}"
    lead = f"{describe_backbone(config)}, trained with {config.loss.name} on {images}"
    if verified is None:
        return f"{lead}."
    unseen = describe_unseen(test["identities"], test["named_as_before"])
    return f"{lead}; verified on {counted(verified['pairs'], 'pair')} of images of {unseen}."


def _verification_charts(verification: Verification) -> list[Chart]:
    return [roc_chart(verification.summary), score_chart(verification.summary, "cosine")]


def _mistakes(verification: Verification) -> list[MistakeGroup]:
    indices, same, fold, _ = verification.pairs
    pairs = scored_pairs(verification.result, indices, same, fold, "pairs")
    return pair_mistakes(pairs, describe_images(verification.shown), "cosine")


def _training_text(report: Mapping[str, Any], config: TrainConfig) -> str:
    training, seconds = report["training"], report["seconds"]["training"]
    text = f"{counted(training['steps'], 'step')} in {duration(seconds)}."
    if training["last_loss"] is not None:
        averaged = f"{training['averaged_steps']} steps" if training["averaged_steps"] > 1 else "step"
        text += f" Mean loss of the first and of the last {averaged}: "
        text += f"{training['first_loss']:.3f} and {training['last_loss']:.3f}."
    if config.log_every > 1:
        text += f" The curves have a point for the first step and every {counted(config.log_every, 'step')}."
    return text


def _data_facts(report: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, Any]]:
    data = report["data"]

    def described(part: Mapping[str, int]) -> str:
        return f"{counted(part['images'], 'image')} of {counted_identities(part['identities'])}"

    augmentation = [
        name if value is True else f"{name} {value:g}" for name, value in _values(config.augmentation) if value
    ]
    return [
        ("source", config.data),
        ("description", data["description"]),
        ("training", described(data["train"])),
        ("verification", described(data["test"]) if data["test"]["images"] else "none"),
        ("unreadable", f"{len(data['unreadable']):,}"),
        ("augmentation", ", ".join(augmentation) or "none"),
    ]


def _network_facts(report: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, Any]]:
    model, (height, width) = config.model, config.model.image_size
    options = ", ".join(f"{name}={value}" for name, value in config.backbone_options.items())
    sizes = [] if config.backbone is None else [("options", options)]
    if config.backbone is None or model.groups:
        sizes.append(("embedding", f"{model.embedding_size} dimensions"))
    return [
        ("network", describe_backbone(config)),
        *sizes,
        ("parameters", f"{report['training']['backbone_parameters']:,}"),
        ("input", f"{counted(model.channels, 'channel')} of {width} x {height} pixels"),
        ("initial weights", "random" if config.weights is None else config.weights),
        ("precision", config.precision),
    ]


def _optimizer_facts(config: TrainConfig) -> list[tuple[str, Any]]:
    optimizer = config.optimizer
    class_lr, stepped = (
        f"{optimizer.class_lr:g}",
        "in the backward" if config.steps_in_backward else "after the backward",
    )
    has_class_weights = config.loss.has_class_weights
    return [
        ("optimizer", "SGD"),
        ("learning rate", f"{optimizer.lr:g}"),
        *([("of class weights", class_lr)] if has_class_weights else []),
        ("schedule", _schedule(optimizer)),
        ("momentum", f"{optimizer.momentum:g}"),
        ("weight decay", f"{optimizer.weight_decay:g}"),
        ("gradient clipped to", f"{optimizer.clip_norm:g}"),
        ("moving average", f"decay {optimizer.ema:g}" if optimizer.ema else "none"),
        *([("class weights stepped", stepped)] if has_class_weights else []),
    ]


def _schedule(optimizer: OptimizerConfig) -> str:
    warmup = f"{optimizer.warmup:.0%} warmup, then " if optimizer.warmup else ""
    if optimizer.schedule == "poly":
        return f"{warmup}polynomial decay of power {optimizer.decay_power:g}"
    return f"{warmup}times {optimizer.gamma:g} at {', '.join(f'{share:.1%}' for share in optimizer.milestones)}"


def _run_facts(report: Mapping[str, Any], config: TrainConfig) -> list[tuple[str, Any]]:
    seconds = report["seconds"]
    micro_batches = f" in {counted(config.accumulate, 'micro-batch', 'micro-batches')}" if config.accumulate > 1 else ""
    return [
        ("epochs", f"{config.epochs:,}"),
        ("steps", f"{report['training']['steps']:,}"),
        ("batch size", f"{config.batch_size:,}{micro_batches}"),
        ("images per identity", config.images_per_identity or "in random order"),
        ("seed", config.seed),
        ("resumed", "yes" if config.resume else "no"),
        ("device", f"{report['device']}, {counted(config.devices, 'process', 'processes')}"),
        ("threads", report["threads"]),
        ("reading images", duration(seconds["data"])),
        ("training", duration(seconds["training"])),
        ("evaluation", duration(seconds["evaluation"])),
        ("folder", config.output),
    ]


def _values(config: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]


def _commands(config: TrainConfig, *, verified: bool) -> list[Command]:
    folder = str(config.output_folder)
    backbone = ["--backbone", config.backbone] if config.backbone else []
    evaluate = ["fused-margin", "evaluate", "--checkpoint", folder, *backbone]

    def command(purpose: str, *words: str) -> Command:
        return Command(purpose, shlex.join(words))

    again = ("fused-margin", "train", "--config", f"{folder}/config.yaml", "--output", f"{folder}-again")
    search = [
        command("Search each test image among others:", *evaluate, "--protocol", "megaface"),
        command("Identify test images in a gallery of some identities:", *evaluate, "--protocol", "identification"),
    ]
    return [
        *(search if verified else []),
        command(
            "Evaluate on a verification set, such as a folder with LFW's pairs.txt:",
            *evaluate,
            "--data",
            "LFW",
            "--protocol",
            "lfw",
        ),
        command("Evaluate on a folder of other identities, FOLDER/identity/image.jpg:", *evaluate, "--data", "FOLDER"),
        command("Export the network for PyTorch and ONNX:", "fused-margin", "export", folder, *backbone),
        command("Train again with the same options; further options take precedence:", *again),
        command("Compare the curves of all runs:", "tensorboard", "--logdir", str(config.output_folder.parent)),
    ]
