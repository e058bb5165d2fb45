"""Trains 2-d embeddings with several losses, measures and draws them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import normalize

import fused_margin as fm
from fused_margin.evaluation.plurals import counted

from ..data.base import Splits, TensorImages
from ..data.digits import NAMES, read_digits
from ..evaluate.network import embed
from ..evaluate.reports import versions
from ..train.loop import Trainer
from ..train.named_losses import LossConfig
from .config import PANELS, FigureConfig
from .drawing import DrawnPanel, Geometry, draw_panels

HELD_OUT = 0.5  # share of each digit's images


def run_figure(config: FigureConfig, console: Console) -> dict[str, Any]:
    """Train with every loss, measure, and write figure.png and figure.json to the output.

    Raises:
        FloatingPointError: a training diverged.
        Interrupted: stopped by a signal; nothing is written.
        OSError: a file cannot be written.
    """
    config.output.mkdir(parents=True, exist_ok=True)  # fails before the training
    splits = split_images(config.digits, config.training(LossConfig("softmax"), 1).model.image_size, config.seed)
    start = None
    if config.softmax_epochs:
        console.print("softmax, from which all losses start", highlight=False)
        start = _train(config, LossConfig("softmax"), config.softmax_epochs, splits, None, console)

    drawn, numbers = [], {}
    for number, name in enumerate(config.losses, 1):
        settings = PANELS[name].settings(len(config.digits))
        title = PANELS[name].title.format(**dataclasses.asdict(settings))
        console.print(f"{' '.join(title.split())} ({number} of {len(config.losses)})", style="bold", highlight=False)
        trainer = _train(config, settings, config.epochs, splits, start, console)
        panel = _panel(title, trainer, splits)
        drawn.append(panel)
        numbers[name] = {
            "held_out_accuracy": panel.geometry.accuracy,
            "mean_angle_to_own_class": panel.geometry.to_own_class,
            "smallest_angle_between_classes": panel.geometry.between_classes,
            "mean_norm": float(np.linalg.norm(panel.test, axis=1).mean()),
            "class_weight": panel.class_weight.tolist(),
            "last_loss": trainer.losses[-1],
            "seconds": round(trainer.seconds, 2),
            "loss": dataclasses.asdict(settings),
        }

    names, colors = [NAMES[digit] for digit in config.digits], [f"C{digit}" for digit in config.digits]
    title = (
        f"Embeddings of the digits {', '.join(names)} in the plane, {counted(config.epochs, 'epoch')} with each loss"
    )
    draw_panels(config.output / "figure.png", title, drawn, names, colors)
    report = _report(config, splits, numbers)
    (config.output / "figure.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_report(console, config, drawn)
    return report


def split_images(digits: Sequence[int], image_size: tuple[int, int], seed: int) -> Splits:
    """Training images and held-out images of the same digits, stratified by digit."""
    images, labels = read_digits(image_size, channels=1)
    parts = train_test_split(np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=seed)
    train, test = (TensorImages.of(images[part], labels[part], list(NAMES), digits) for part in parts)
    return Splits(train, test, description="scikit-learn's handwritten digits", test_distortion=None)


def measure(embeddings: np.ndarray, labels: np.ndarray, class_weight: np.ndarray, predicted: np.ndarray) -> Geometry:
    """Accuracy and angles of embeddings (N, D) with labels and predictions (N,) and class weights (C, D)."""
    unit, weight = (normalize(rows.astype(np.float64)) for rows in (embeddings, class_weight))
    own = np.einsum("ij,ij->i", unit, weight[labels])
    others = (weight @ weight.T)[np.triu_indices(len(weight), 1)]
    degrees = [np.rad2deg(np.arccos(cosine.clip(-1, 1))) for cosine in (own, others)]
    return Geometry(float(np.mean(predicted == labels)), float(degrees[0].mean()), float(degrees[1].min()))


def _train(
    config: FigureConfig, loss: LossConfig, epochs: int, splits: Splits, start: Trainer | None, console: Console
) -> Trainer:
    trainer = Trainer(config.training(loss, epochs), splits)
    if start is not None:
        trainer.backbone.load_state_dict(start.backbone.state_dict())
        criterion = trainer.model.criterion
        # Not all losses have a bias.
        criterion.loss_fn.load_state_dict(start.model.criterion.loss_fn.state_dict(), strict=False)
        for weight in criterion.projected_parameters():
            fm.optim.project_(weight)
    trainer.fit(console, save=lambda: None)
    return trainer


def _panel(title: str, trainer: Trainer, splits: Splits) -> DrawnPanel:
    train, test = (
        embed(trainer.backbone, images, trainer.fabric.device, mirror=False) for images in (splits.train, splits.test)
    )
    loss_fn, weight = trainer.model.criterion.loss_fn, trainer.class_weight
    assert isinstance(loss_fn, fm.MarginLoss | fm.SoftmaxLoss) and weight is not None  # as all losses of PANELS
    with torch.no_grad():
        logits = loss_fn.logits(torch.from_numpy(test.features))
    class_weight = weight.numpy()
    geometry = measure(test.features, test.labels, class_weight, logits.argmax(dim=1).numpy())
    return DrawnPanel(title, train.features, train.labels, test.features, test.labels, class_weight, geometry)


def _report(config: FigureConfig, splits: Splits, numbers: dict[str, Any]) -> dict[str, Any]:
    training = config.training(LossConfig("softmax"), config.epochs).to_dict()
    shared = ("epochs", "batch_size", "seed", "network", "model", "optimizer", "augmentation")
    return {
        "digits": list(config.digits),
        "images": {"train": len(splits.train), "held_out": len(splits.test)},
        "softmax_epochs": config.softmax_epochs,
        "training": {name: training[name] for name in shared},
        "losses": numbers,
        "versions": versions(),
    }


def _print_report(console: Console, config: FigureConfig, drawn: list[DrawnPanel]) -> None:
    table = Table(title=f"Held-out images of {len(config.digits)} digits")
    for column in ("loss", "accuracy", "mean angle to own class", "smallest angle between classes"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for name, panel in zip(config.losses, drawn, strict=True):
        accuracy, own, between = panel.geometry
        table.add_row(name, f"{accuracy:.2%}", f"{own:.1f}°", f"{between:.1f}°")
    console.print(table)
    console.print(f"files in {config.output}: figure.json, figure.png", highlight=False, soft_wrap=True)
