"""The options of `fused-margin figure`, and the settings of the losses it draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from fused_margin.margins import minimum_scale

from .companions import CompanionConfig
from .config import OptimizerConfig, TrainConfig
from .data.augment import AugmentationConfig
from .data.digits import NAMES
from .losses import LossConfig
from .models import ModelConfig

LARGEST_SEED = 2**32 - 1  # that scikit-learn takes
PROBABILITY = 0.999  # that the scale of cosines allows for a sample's own class


class Panel(NamedTuple):
    """A loss to draw: what stands above it, and its settings for a number of classes."""

    title: str
    settings: Callable[[int], LossConfig]


def cosface(num_classes: int) -> LossConfig:
    """The paper's margin, or half the largest that the plane has room for (arXiv:1801.09414, eq. 7)."""
    margin = min(0.35, (1 - math.cos(2 * math.pi / num_classes)) / 2)
    return LossConfig("cosface", margin=margin, scale=minimum_scale(num_classes, PROBABILITY))


def arcface(num_classes: int) -> LossConfig:
    """The paper's margin, or half the angle between classes that share the plane evenly."""
    margin = min(0.5, math.pi / num_classes)
    return LossConfig("arcface", margin=margin, scale=minimum_scale(num_classes, PROBABILITY))


def sphereface(exclusive_weight: float) -> LossConfig:
    """The paper's margin from the first step: in so short a training annealing would leave little of it."""
    return LossConfig("sphereface", margin=4.0, exclusive_weight=exclusive_weight, options={"annealing": False})


PANELS = {
    "softmax": Panel("softmax", lambda _: LossConfig("softmax")),
    "modified-softmax": Panel("A-Softmax, m = 1\n(modified softmax)", lambda _: LossConfig("modified-softmax")),
    "center": Panel(
        "softmax + center loss, λ = 0.1",
        lambda _: LossConfig("softmax", companions=CompanionConfig(center=0.1)),
    ),
    "sphereface": Panel("SphereFace, m = 4", lambda _: sphereface(0.0)),
    "cosface": Panel("CosFace, m = {margin:.2g}, s = {scale:.1f}", cosface),
    "arcface": Panel("ArcFace, m = {margin:.2g}, s = {scale:.1f}", arcface),
    "regularface": Panel("SphereFace, m = 4, + exclusive\nterm, λ = 1 (RegularFace)", lambda _: sphereface(1.0)),
}


@dataclass(frozen=True)
class FigureConfig:
    """Draw the 2-d embeddings that losses learn for a few digits, as the papers do: a LeNet, a panel for each loss.

    All losses start from one network, trained with softmax for a few epochs, and train with one optimizer for equally
    many epochs. Half of the digits' images are held out: the numbers below the panels are measured on those. Writes
    figure.png and figure.json.
    """

    digits: tuple[int, ...] = (0, 1, 2)
    """Digits of scikit-learn's data set to draw, 0 to 9. More digits need more epochs."""
    losses: tuple[Literal[tuple(PANELS)], ...] = tuple(PANELS)
    """Losses to draw, in the order of the panels."""
    epochs: int = 40
    """Passes over the training images with each loss."""
    softmax_epochs: int = 10
    """Passes with softmax before that, shared by all losses. 0 starts every loss from random weights.
    From those, margins in the plane often leave two class weights on top of each other."""
    seed: int = 0
    """Seed of the held-out images, the initial weights, the order and the augmentation."""
    output: Path = Path("runs/figure")
    """Folder for figure.png and figure.json."""

    def __post_init__(self) -> None:
        if len(set(self.digits)) < max(2, len(self.digits)) or not set(self.digits) <= set(range(len(NAMES))):
            given = " ".join(map(str, self.digits)) or "none"
            raise ValueError(f"digits must be two or more of 0 to 9, each once, got {given}")
        if len(set(self.losses)) < max(1, len(self.losses)):
            given = " ".join(self.losses) or "none"
            raise ValueError(f"losses must be one or more, each once, got {given}")
        for name, least in (("epochs", 1), ("softmax_epochs", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {self.seed}")

    def training(self, loss: LossConfig, epochs: int) -> TrainConfig:
        """The one budget and optimizer that all losses have."""
        return TrainConfig(
            data="digits",
            network="lenet",
            epochs=epochs,
            batch_size=32,
            seed=self.seed,
            accelerator="cpu",
            # A quarter of LeNet++, on twice the side of the digits, which have no more in them.
            model=ModelConfig(image_size=(16, 16), width=0.25, embedding_size=2),
            loss=loss,
            optimizer=OptimizerConfig(lr=0.02, class_lr=0.1, clip_norm=1.0),
            augmentation=AugmentationConfig(blur=0.4),
        )
