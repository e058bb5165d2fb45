"""The options of `fused-margin figure`, and the settings of its losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from fused_margin.margins import minimum_scale

from ..config import OptimizerConfig, TrainConfig
from ..data.config import AugmentationConfig
from ..data.digits import NAMES
from ..models import ModelConfig
from ..train.auxiliary import AuxiliaryConfig
from ..train.named_losses import LossConfig

MAX_SEED = 2**32 - 1  # of scikit-learn
PROBABILITY = 0.999  # of a sample's own class that the scale must allow


class Panel(NamedTuple):
    """The title of a panel, and the settings of its loss for a number of classes."""

    title: str
    settings: Callable[[int], LossConfig]


def cosface(num_classes: int) -> LossConfig:
    """The paper's margin, at most half the largest margin possible in two dimensions (arXiv:1801.09414, eq. 7)."""
    margin = min(0.35, (1 - math.cos(2 * math.pi / num_classes)) / 2)
    return LossConfig("cosface", margin=margin, scale=minimum_scale(num_classes, PROBABILITY))


def arcface(num_classes: int) -> LossConfig:
    """The paper's margin, at most half the angle between evenly spaced classes."""
    margin = min(0.5, math.pi / num_classes)
    return LossConfig("arcface", margin=margin, scale=minimum_scale(num_classes, PROBABILITY))


def sphereface(exclusive_weight: float) -> LossConfig:
    """The paper's margin without annealing, which is too slow for a short training."""
    return LossConfig("sphereface", margin=4.0, exclusive_weight=exclusive_weight, options={"annealing": False})


PANELS = {
    "softmax": Panel("softmax", lambda _: LossConfig("softmax")),
    "modified-softmax": Panel("A-Softmax, m = 1\n(modified softmax)", lambda _: LossConfig("modified-softmax")),
    "center": Panel(
        "softmax + center loss, λ = 0.1",
        lambda _: LossConfig("softmax", companions=AuxiliaryConfig(center=0.1)),
    ),
    "sphereface": Panel("SphereFace, m = 4", lambda _: sphereface(0.0)),
    "cosface": Panel("CosFace, m = {margin:.2g}, s = {scale:.1f}", cosface),
    "arcface": Panel("ArcFace, m = {margin:.2g}, s = {scale:.1f}", arcface),
    "regularface": Panel("SphereFace, m = 4, + exclusive\nterm, λ = 1 (RegularFace)", lambda _: sphereface(1.0)),
}

if TYPE_CHECKING:
    PanelName = str
else:
    PanelName = Literal[tuple(PANELS)]  # for the command line; type checkers cannot read it


@dataclass(frozen=True)
class FigureConfig:
    """Draw the 2-d embeddings that losses learn for a few digits, as in the papers, with a LeNet and a panel per loss.

    All losses start from the same network, trained with softmax for a few epochs, and use the same optimizer and number
    of epochs. The numbers below the panels are measured on the held-out half of the images. Writes figure.png and
    figure.json.
    """

    digits: tuple[int, ...] = (0, 1, 2)
    """Digits of scikit-learn's data set to draw, 0 to 9. More digits need more epochs."""
    losses: tuple[PanelName, ...] = tuple(PANELS)
    """Losses to draw, in the order of the panels."""
    epochs: int = 40
    """Passes over the training images with each loss."""
    softmax_epochs: int = 10
    """Passes over the training images with softmax first; all losses continue from the resulting network.
    0 starts every loss from random weights. 2-d margin losses then often end with two equal class weights."""
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
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED}, got {self.seed}")

    def training(self, loss: LossConfig, epochs: int) -> TrainConfig:
        """The training of one loss; all losses share these settings."""
        return TrainConfig(
            data="digits",
            network="lenet",
            epochs=epochs,
            batch_size=32,
            seed=self.seed,
            accelerator="cpu",
            # A quarter of the channels of LeNet++, and digits at twice their size.
            model=ModelConfig(image_size=(16, 16), width=0.25, embedding_size=2),
            loss=loss,
            optimizer=OptimizerConfig(lr=0.02, class_lr=0.1, clip_norm=1.0),
            augmentation=AugmentationConfig(blur=0.4),
        )
