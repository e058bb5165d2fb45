"""The trainer's options: dataclasses whose docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data import find_reader
from .data.augment import AugmentationConfig
from .model import ResNet20Config

EMBEDDED = ("glyphs", "digits")
# What a resumed run may do differently without becoming another run.
RUNTIME_FIELDS = ("output", "resume", "accelerator", "workers", "checkpoint_every")


@dataclass(frozen=True)
class LossConfig:
    """ArcFace with RegularFace's exclusive term."""

    margin: float = 0.2
    """Additive angular margin in radians."""
    scale: float = 16.0
    """Scale of the cosines."""
    exclusive_weight: float = 1.0
    """Weight of the exclusive term, which pushes the nearest class weights apart; 0: none."""

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise ValueError(f"loss.scale must be positive and finite, got {self.scale}")
        if not 0 <= self.margin < math.inf:
            raise ValueError(f"loss.margin must be finite and not negative, got {self.margin}")
        if not 0 <= self.exclusive_weight < math.inf:
            raise ValueError(f"loss.exclusive_weight must not be negative, got {self.exclusive_weight}")


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD; the class weights are put back on the unit sphere after every step."""

    lr: float = 0.05
    """Largest learning rate of the backbone."""
    class_lr: float = 0.5
    """Largest learning rate of the class weights."""
    momentum: float = 0.9
    """Momentum of both."""
    weight_decay: float = 5e-4
    """Weight decay of the backbone; the class weights have unit norm and take none."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises linearly from 0."""
    decay_power: float = 1.0
    """After it the learning rate falls as (1 - progress) to this power; 0: constant."""
    clip_norm: float = 5.0
    """Largest norm of the backbone's gradient."""

    def __post_init__(self) -> None:
        for name in ("lr", "class_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "decay_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        for name in ("momentum", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Verification on pairs of images of unseen identities."""

    pairs: int = 6000
    """Number of pairs, half of them of one identity."""
    folds: int = 10
    """Folds of the cross-validation that chooses the threshold."""
    far: float = 1e-3
    """False accept rate at which the true accept rate is reported."""
    flip: Literal["none", "concat"] = "none"
    """concat: embed the mirror image too and concatenate both embeddings (faces)."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"evaluation.folds must be at least 2, got {self.folds}")
        if self.pairs < 2 * self.folds:
            raise ValueError(f"evaluation.pairs must be at least two per fold ({2 * self.folds}), got {self.pairs}")
        if not 0 < self.far < 1:
            raise ValueError(f"evaluation.far must be between 0 and 1, got {self.far}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a ResNet20 with a fused margin loss and verify it on identities it has not seen.

    Without options: characters of the fonts that matplotlib carries, two CPU cores, under three
    minutes.
    """

    data: str = "glyphs"
    """glyphs (characters of twelve fonts), digits (handwritten), or where images are.

    A folder of identities (FOLDER/identity/image.jpg), a folder with train.rec and train.idx, or a list (.txt, .lst).

    The defaults of the other options depend on it."""
    output: Path | None = None
    """Folder for checkpoint, report and figure; runs/<data>-<time> if not given."""
    resume: bool = False
    """Continue the run in --output, or the latest in runs/, with the options it was started with."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    seed: int = 0
    """Seed of the identities' split, the initial weights, the order and the augmentation."""
    test_fraction: float = 0.2
    """Share of the identities that are kept for verification."""
    network: Literal["small", "paper"] = "small"
    """Where the --model options start from: sizes for two CPU cores, or the published ones (512-d)."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU where there is one and the kernels are built for it."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Precision of the backbone."""
    workers: int = 0
    """Processes that read images ahead (for images in files)."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is left at the end and on Ctrl-C in any case."""
    model: ResNet20Config = field(default_factory=ResNet20Config)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.data not in EMBEDDED:
            find_reader(self.data)
        for name, least in (("epochs", 1), ("batch_size", 1), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, got {self.test_fraction}")

    @classmethod
    def defaults(cls, data: str = "glyphs", network: str = "small") -> TrainConfig:
        """The settings that suit one source of images."""
        model = ResNet20Config.paper() if network == "paper" else ResNet20Config()
        config = cls(data=data, network=network, model=model)
        if data == "glyphs":
            return config
        if data == "digits":
            # Ten identities, 180 images each: seven classes to train on.
            return dataclasses.replace(config, epochs=8, batch_size=64, test_fraction=0.3)
        # Aligned faces: half the published side, and as published only mirrored.
        if network == "small":
            model = ResNet20Config(channels=3, image_size=(56, 48))
        mirror_only = AugmentationConfig(rotation=0, scale=0, shear=0, shift=0, blur=0, noise=0, mirror=True)
        return dataclasses.replace(
            config,
            epochs=30,
            model=model,
            augmentation=mirror_only,
            evaluation=EvaluationConfig(flip="concat"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what a checkpoint and a report hold."""
        values = dataclasses.asdict(self)
        values["output"] = None if self.output is None else str(self.output)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is unknown or its value is not valid.
        """
        sections = {
            "model": ResNet20Config,
            "loss": LossConfig,
            "optimizer": OptimizerConfig,
            "augmentation": AugmentationConfig,
            "evaluation": EvaluationConfig,
        }
        try:
            parts = {name: section(**values[name]) for name, section in sections.items()}
            output = values["output"] and Path(values["output"])
            return cls(**{**values, **parts, "output": output})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a configuration of this version: {error}") from error

    def differences(self, other: TrainConfig) -> list[str]:
        """Options in which two runs differ, beyond where and on what they run."""
        return _differences(self.to_dict(), other.to_dict(), "")


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for name, value in mine.items():
        if isinstance(value, dict):
            found += _differences(value, theirs[name], f"{prefix}{name}.")
        elif prefix + name not in RUNTIME_FIELDS and value != theirs[name]:
            option = (prefix + name).replace("_", "-")
            found.append(f"--{option} {value} (the run has {theirs[name]})")
    return found
