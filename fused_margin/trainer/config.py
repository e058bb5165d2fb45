"""The trainer's options: dataclasses whose docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .config_values import ConfigError, missing_options, overlay, to_plain
from .data import find_reader
from .data.augment import AugmentationConfig
from .losses import LossConfig
from .models import ModelConfig, Network
from .options import NamedOptions

EMBEDDED = ("glyphs", "digits")
LARGEST_SEED = 2**64 - 1  # that torch takes
# What a resumed run may do differently without becoming another run.
RUNTIME_FIELDS = ("output", "config", "resume", "accelerator", "devices", "workers", "checkpoint_every", "log_every")
# Options that checkpoints of older versions do not have; they take their default.
LATER_OPTIONS = ("weights",)
# What the configuration file of a run leaves out, so that it may start another.
LAUNCH_FIELDS = ("output", "config", "resume")


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD. Class weights whose norm does not count are projected onto the unit sphere after every step."""

    lr: float = 0.05
    """Largest learning rate of the backbone."""
    class_lr: float = 0.5
    """Largest learning rate of class weights that are kept on the unit sphere."""
    momentum: float = 0.9
    """Momentum of the backbone and of the class weights."""
    weight_decay: float = 5e-4
    """Weight decay of the backbone.
    It also applies to class weights whose norm counts (softmax, l2-softmax, l-softmax)."""
    warmup: float = 0.1
    """Share of the steps at the start in which the learning rate rises linearly from 0."""
    schedule: Literal["poly", "step"] = "poly"
    """How the learning rate falls after the warmup.
    poly: polynomial decay (--optimizer.decay-power).
    step: constant between milestones (--optimizer.milestones, --optimizer.gamma)."""
    decay_power: float = 1.0
    """Power of the schedule poly: the learning rate falls as (1 - progress) to this power.
    0 keeps it constant."""
    milestones: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Milestones of the schedule step: shares of the run after which the learning rate falls.
    The default is RegularFace's, every 6 of 30 epochs.
    SphereFace's are 0.571 0.857 with a gamma of 0.1: after 16,000 and 24,000 of 28,000 steps."""
    gamma: float = 0.5
    """Factor of the learning rate at each milestone of the schedule step."""
    clip_norm: float = 5.0
    """Largest norm of the backbone's gradient. A larger gradient is scaled down to it."""
    ema: float = 0.0
    """Decay per step of a moving average of the backbone's weights, such as 0.999.
    The average is then evaluated and exported. 0 keeps no average."""

    def __post_init__(self) -> None:
        for name in ("lr", "class_lr", "clip_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("weight_decay", "decay_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} must not be negative, got {getattr(self, name)}")
        for name in ("momentum", "warmup", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        if not all(0 < share < 1 for share in self.milestones):
            raise ValueError(f"optimizer.milestones must be between 0 and 1, got {self.milestones}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"optimizer.gamma must be above 0 and at most 1, got {self.gamma}")


@dataclass(frozen=True)
class EvaluationConfig:
    """Verification on pairs of images of unseen identities."""

    pairs: int = 6000
    """Number of pairs, half of them of one identity."""
    folds: int = 10
    """Number of folds of the cross-validation that chooses the threshold."""
    far: float = 1e-3
    """False accept rate at which the true accept rate is reported."""
    flip: Literal["none", "concat"] = "none"
    """concat: embed the mirror image too, and concatenate both embeddings. Suits faces.
    none: embed the image only."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"evaluation.folds must be at least 2, got {self.folds}")
        if self.pairs < 2 * self.folds:
            raise ValueError(f"evaluation.pairs must be at least two per fold ({2 * self.folds}), got {self.pairs}")
        if not 0 < self.far < 1:
            raise ValueError(f"evaluation.far must be between 0 and 1, got {self.far}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a network with a fused margin loss and verify it on identities it has not seen.

    Without options: characters of the fonts that matplotlib carries, two CPU cores, under three
    minutes.
    """

    data: str = "glyphs"
    """Images to train and verify on: glyphs, digits, or a path.
    glyphs are characters of twelve fonts, digits are scikit-learn's handwritten ones. Both need no download.
    A folder of identities is read as FOLDER/identity/image.jpg.
    A folder with train.rec and train.idx can be named too.
    So can a list (.txt, .lst) with a path and a label in each line, or as mxnet's im2rec writes it.
    The defaults of the other options depend on it."""
    config: Path | None = None
    """YAML file with values that replace the defaults, such as the config.yaml of an earlier run.
    Options on the command line take precedence."""
    output: Path | None = None
    """Folder for checkpoint, configuration, logs, report and figure.
    If not given, runs/<data>-<time>."""
    resume: bool = False
    """Continue the run in --output, or the latest in runs/, with the options it was started with."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    accumulate: int = 1
    """Number of micro-batches that a step is divided into, whose gradients are added. More of them need less memory.
    Batch norm, mined triplets and adaptive margins depend on the other images of a batch.
    They see one micro-batch at a time, so with them the step is not quite the same. Otherwise it is."""
    seed: int = 0
    """Seed of the identities' split, the initial weights, the order and the augmentation."""
    test_fraction: float = 0.2
    """Share of the identities that are kept for verification.
    0 trains on all identities and verifies on none."""
    network: Network = "small"
    """Network whose settings are the defaults of the --model options.
    small: ResNet of SphereFace and RegularFace, in a size for two CPU cores.
    paper: the same ResNet as published, with 512-d embeddings.
    lenet: LeNet++ of the center-loss paper, with 2-d embeddings that can be drawn."""
    backbone: str | None = None
    """Network of your own in place of --network, as package.module.factory.
    The factory is called with --backbone-options.
    It returns a module from images (N, channels, H, W) to embeddings (N, D).
    Name it again to resume, evaluate or export: a checkpoint alone imports and calls nothing."""
    backbone_options: NamedOptions = field(default_factory=dict)
    """Keyword arguments of --backbone, such as model_name=resnet18 num_classes=128.
    Values are Python literals, or text where they are not."""
    weights: Path | None = None
    """Trained weights that the backbone starts from, instead of random ones.
    The folder or the checkpoint of an earlier run, or a backbone.pt of fused-margin export.
    Class weights still start at random."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto takes a GPU if there is one and the kernels are built for it."""
    devices: int = 1
    """Number of processes. Each has a GPU, or a part of the CPU.
    The images of a step and the classes are divided among them.
    A resumed run may have another number."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the backbone. 16-mixed needs a GPU."""
    workers: int = 0
    """Number of processes that read images ahead, for images in files."""
    checkpoint_every: int = 100
    """Steps between checkpoints. One is always written at the end and on Ctrl-C."""
    log_every: int = 10
    """Steps between rows of log.csv and points of TensorBoard's curves."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.data not in EMBEDDED:
            find_reader(self.data)
        for name in ("epochs", "batch_size", "accumulate", "devices", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("accumulate", "devices"):
            if getattr(self, name) > self.batch_size:
                raise ValueError(f"{name} must be at most batch_size ({self.batch_size}), got {getattr(self, name)}")
        if self.backbone_options and self.backbone is None:
            raise ValueError("backbone_options are for a --backbone, and there is none")
        for name in ("workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed > LARGEST_SEED:
            raise ValueError(f"seed must be at most {LARGEST_SEED}, got {self.seed}")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be between 0 and 1, or 0 for none, got {self.test_fraction}")

    @classmethod
    def defaults(cls, data: str = "glyphs", network: Network = "small", loss: str = "arcface") -> TrainConfig:
        """The settings that suit one source of images, one size of network and one loss."""
        model = ModelConfig.of(network)
        settings = LossConfig.small_data(loss) if data in EMBEDDED else LossConfig(loss)
        config = cls(data=data, network=network, model=model, loss=settings)
        if data == "glyphs":
            return config
        if data == "digits":
            # Ten identities, 180 images each: seven classes to train on.
            return dataclasses.replace(config, epochs=8, batch_size=64, test_fraction=0.3)
        # Aligned faces: half the published side, and as published only mirrored.
        if network == "small":
            model = ModelConfig(channels=3, image_size=(56, 48))
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
        return to_plain(self)

    def to_file_values(self) -> dict[str, Any]:
        """Plain values that start the same run again, elsewhere."""
        return {name: value for name, value in self.to_dict().items() if name not in LAUNCH_FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, reads_data: bool = True) -> TrainConfig:
        """The inverse of `to_dict`.

        Args:
            values: what `to_dict` has returned.
            reads_data: whether the images of `data` will be read. If not, they may be gone, and `data` is "glyphs".

        Raises:
            ValueError: a field is unknown or missing, or its value is not valid.
        """
        try:
            config = overlay(cls(), values if reads_data else {**values, "data": EMBEDDED[0]})
            missing = [name for name in missing_options(cls().to_dict(), values) if name not in LATER_OPTIONS]
            if missing:
                raise ConfigError(f"{', '.join(missing)}: not given")
        except ConfigError as error:
            raise ValueError(f"not a configuration of this version: {error}") from error
        return config

    def differences(self, other: TrainConfig) -> list[str]:
        """Options in which two runs differ, beyond where and on what they run."""
        return _differences(self.to_dict(), other.to_dict(), "")


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for name, value in mine.items():
        if isinstance(value, dict) and value.keys() == theirs[name].keys():
            found += _differences(value, theirs[name], f"{prefix}{name}.")
        elif prefix + name not in RUNTIME_FIELDS and value != theirs[name]:
            option = (prefix + name).replace("_", "-")
            found.append(f"--{option} {value} (the run has {theirs[name]})")
    return found
