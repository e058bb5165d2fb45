"""The options of `fused-margin train`. The docstrings of the fields are the help of the command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict

from .config_values import ConfigError, missing_options, overlay, to_plain
from .data import EMBEDDED, find_reader
from .data.config import AugmentationConfig
from .defaults import none_means
from .models import ModelConfig, Network
from .options import NamedOptions
from .train.named_losses import LossConfig

MAX_SEED = 2**64 - 1  # of torch
IMAGES_PER_IDENTITY = 4  # of a batch, for losses that compare its samples
# Options that may differ in a resumed run.
RUNTIME_FIELDS = (
    "output", "config", "resume", "accelerator", "devices", "workers", "checkpoint_every", "log_every",
    "optimizer.in_backward",
)  # fmt: skip
# Options that early checkpoints do not have; they get their defaults.
LATER_OPTIONS = (
    "weights", "images_per_identity", "loss.weight_dtype", "loss.companions.angular_triplet",
    "loss.companions.angular_triplet_margin", "loss.companions.contrastive_form",
    "loss.companions.contrastive_normalize", "loss.companions.deepid2", "loss.companions.siamese", "loss.companions.range",
    "loss.companions.range_k", "loss.companions.range_margin", "loss.companions.range_alpha",
    "loss.companions.range_beta", "loss.companions.marginal", "loss.companions.marginal_theta",
    "loss.companions.marginal_xi", "loss.companions.center_invariant", "optimizer.in_backward",
    "optimizer.stochastic_rounding", "augmentation.occlusion", "augmentation.brightness", "augmentation.contrast",
    "augmentation.saturation", "augmentation.resolution", "augmentation.jpeg",
    "model.groups", "model.group_aggregation", "model.group_features", "model.group_weight", "model.group_batches",
)  # fmt: skip
# Options that the configuration file of a run omits, so that it can start another run.
LAUNCH_FIELDS = ("output", "config", "resume")


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD. Class weights whose norm has no effect are normalized after every step."""

    lr: float = 0.05
    """Largest learning rate of the backbone."""
    class_lr: float = 0.5
    """Largest learning rate of normalized class weights."""
    momentum: float = 0.9
    """Momentum of the backbone and of the class weights."""
    weight_decay: float = 5e-4
    """Weight decay of the backbone.
    It also applies to class weights whose norm has an effect (softmax, l2-softmax, l-softmax)."""
    warmup: float = 0.1
    """Share of the steps with linear warmup of the learning rate."""
    schedule: Literal["poly", "step"] = "poly"
    """Decay of the learning rate after the warmup.
    poly: polynomial decay (--optimizer.decay-power).
    step: constant between milestones (--optimizer.milestones, --optimizer.gamma)."""
    decay_power: float = 1.0
    """Power of the schedule poly: the factor of the learning rate is (1 - progress) to this power.
    0: constant."""
    milestones: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    """Milestones of the schedule step, as shares of the run.
    The default is RegularFace's: every 6 of 30 epochs.
    SphereFace's are 0.571 0.857, with a gamma of 0.1: after 16,000 and 24,000 of 28,000 steps."""
    gamma: float = 0.5
    """Factor of the learning rate at each milestone of the schedule step."""
    clip_norm: float = 5.0
    """Largest norm of the backbone's gradient; larger gradients are clipped."""
    ema: float = 0.0
    """Decay per step of an exponential moving average of the backbone's weights, such as 0.999.
    The average is then evaluated and exported. 0: no average."""
    in_backward: Annotated[bool | None, none_means("True wherever it can be done")] = None
    """Whether the backward steps the class weights, so that their gradient is never stored.
    The results differ by rounding only. A resumed run may have another value.
    It cannot be done without class weights, with --accumulate above 1, or with --precision 16-mixed.
    Nor with the companions intra, inter and uniform, or the exclusive term of softmax, l2-softmax and l-softmax."""
    stochastic_rounding: bool = True
    """Whether class weights and momentum in bfloat16 are rounded up or down at random, without bias.
    It has an effect where the backward steps the class weights (--optimizer.in-backward).
    Rounding to nearest loses steps that are smaller than half a unit in the last place."""

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
    """Verification on pairs of images of the test identities."""

    pairs: int = 6000
    """Number of pairs, half of them of one identity."""
    folds: int = 10
    """Number of folds of the cross-validation that chooses the threshold."""
    far: float = 1e-3
    """False accept rate at which the true accept rate is reported."""
    flip: Literal["none", "concat"] = "none"
    """How to combine the features of an image and its mirror image.
    concat: concatenate both. Suitable for faces.
    none: use the image only."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"evaluation.folds must be at least 2, got {self.folds}")
        if self.pairs < 2 * self.folds:
            raise ValueError(f"evaluation.pairs must be at least two per fold ({2 * self.folds}), got {self.pairs}")
        if not 0 < self.far < 1:
            raise ValueError(f"evaluation.far must be between 0 and 1, got {self.far}")


@dataclass(frozen=True)
class TrainConfig:
    """Train a network with a fused margin loss and verify it on identities that it was not trained on.

    Without options: characters of matplotlib's fonts, in under three minutes on two CPU cores. The defaults of other
    options depend on --data, --network and --loss.name: the help shows those for the given ones.
    """

    data: str = "glyphs"
    """Images to train and verify on. The defaults of other options depend on it.
    glyphs: characters of twelve fonts. digits: scikit-learn's handwritten digits. Both need no download.
    A folder of identities: FOLDER/identity/image.jpg.
    A folder with InsightFace's train.rec and train.idx.
    A list (.txt, .lst) of a path and a label per line, or in the format of mxnet's im2rec."""
    config: Annotated[Path | None, none_means("no file")] = None
    """YAML file of options, such as the config.yaml of an earlier run.
    Options on the command line take precedence."""
    output: Annotated[Path | None, none_means("runs/<data>-<time>")] = None
    """Folder for checkpoint, configuration, logs, report, figure and page."""
    resume: bool = False
    """Continue the run in --output, or the latest run in runs/, with its options."""
    epochs: int = 5
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    accumulate: int = 1
    """Gradient-accumulation micro-batches per step. More of them need less memory.
    Batch norm, pairs and triplets, adaptive margins and the labels of --model.groups see one micro-batch at a time.
    This changes their results."""
    images_per_identity: int = 0
    """Images of one identity that are together in a batch, for losses that compare the samples of a batch.
    A batch of B images has B / K groups of K images. Each epoch has every image, in new groups in a new order.
    With --accumulate and --devices each part has whole groups. 0: all images in random order."""
    seed: int = 0
    """Seed of the split of identities, the initial weights, the order of images and the augmentation."""
    test_fraction: float = 0.2
    """Share of the identities that are used for verification.
    0: train on all identities, without verification."""
    network: Network = "small"
    """Network, which determines the defaults of the --model options.
    small: ResNet of SphereFace and RegularFace, sized for two CPU cores.
    paper: the same ResNet as published, with 512-d embeddings.
    lenet: LeNet++ of the center-loss paper, with 2-d embeddings."""
    backbone: Annotated[str | None, none_means("the --network")] = None
    """Your own network instead of --network, as package.module.factory.
    The factory takes --backbone-options and returns a module from images (N, channels, H, W) to embeddings (N, D).
    Repeat this option to resume, evaluate or export, because a checkpoint must not decide which code runs."""
    backbone_options: NamedOptions = field(default_factory=dict)
    """Keyword arguments of --backbone, such as model_name=resnet18 num_classes=128.
    Values are Python literals; other values are text."""
    weights: Annotated[Path | None, none_means("random")] = None
    """Initial weights of the backbone.
    The folder or checkpoint of an earlier run, or a backbone.pt of fused-margin export.
    Class weights always start at random."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: a GPU, if there is one and the kernels are built for it."""
    devices: int = 1
    """Number of processes, each with a GPU or a part of the CPU.
    The images of a step and the classes are divided among them.
    A resumed run may have another number."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Precision of the backbone. 16-mixed needs a GPU."""
    workers: int = 0
    """Number of processes that load image files."""
    checkpoint_every: int = 100
    """Steps between checkpoints. A checkpoint is also written at the end and on Ctrl-C."""
    log_every: int = 10
    """Steps between rows of log.csv and points of TensorBoard's curves, which begin with the first step."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # also of the sections

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
            raise ValueError("backbone_options need a --backbone")
        for name in ("workers", "seed", "images_per_identity"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        images = self.images_per_identity
        if images == 1 or 2 * images * self.accumulate > self.batch_size:
            raise ValueError(
                "images_per_identity must be 0, or from 2 to half of the images of a micro-batch "
                f"({self.batch_size // (2 * self.accumulate)}), got {images}"
            )
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED}, got {self.seed}")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be in [0, 1), got {self.test_fraction}")
        if self.optimizer.in_backward and (obstacle := self._in_backward_obstacle()):
            raise ValueError(f"optimizer.in_backward: the backward cannot step the class weights with {obstacle}")

    @property
    def steps_in_backward(self) -> bool:
        """Whether the backward steps the class weights."""
        return (
            self._in_backward_obstacle() is None if self.optimizer.in_backward is None else self.optimizer.in_backward
        )

    def _in_backward_obstacle(self) -> str | None:
        """An option with which the backward cannot step the class weights, and its value."""
        if not self.loss.has_class_weights:
            return f"loss.name {self.loss.name}, which has none"
        if self.accumulate > 1:
            return f"accumulate {self.accumulate}"
        if self.precision == "16-mixed":  # scales the loss
            return f"precision {self.precision}"
        return self.loss.other_gradient()

    @property
    def output_folder(self) -> Path:
        """`output` of a run, for which the commands choose a folder if it is not given.

        Raises:
            ValueError: it is not given.
        """
        if self.output is None:
            raise ValueError("output: a run needs a folder")
        return self.output

    @classmethod
    def defaults(cls, data: str = "glyphs", network: Network = "small", loss: str = "arcface") -> TrainConfig:
        """Default options for a source of images, a network and a loss."""
        model = ModelConfig.of(network)
        settings = LossConfig.small_data(loss) if data in EMBEDDED else LossConfig(loss)
        images = IMAGES_PER_IDENTITY if settings.compares_samples else 0
        config = cls(data=data, network=network, model=model, loss=settings, images_per_identity=images)
        if data == "glyphs":
            return config
        if data == "digits":
            # Ten identities of 180 images; seven of them are training classes.
            return dataclasses.replace(config, epochs=8, batch_size=64, test_fraction=0.3)
        # Aligned faces: half the published image size, and only mirroring, as published.
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
        """Plain values, as in checkpoints and reports."""
        return to_plain(self)

    def to_file_values(self) -> dict[str, Any]:
        """Plain values for a configuration file that starts the same run again."""
        return {name: value for name, value in self.to_dict().items() if name not in LAUNCH_FIELDS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, reads_data: bool = True) -> TrainConfig:
        """The inverse of `to_dict`.

        Args:
            values: result of `to_dict`.
            reads_data: whether the images of `data` will be read. If not, they need not exist, and `data` is "glyphs".

        Raises:
            ValueError: a field is unknown or missing, or its value is not valid.
        """
        try:
            config = overlay(cls(), values if reads_data else {**values, "data": "glyphs"})
            missing = [name for name in missing_options(cls().to_dict(), values) if name not in LATER_OPTIONS]
            if missing:
                raise ConfigError(f"{', '.join(missing)}: not given")
        except ConfigError as error:
            raise ValueError(f"not a configuration of this version: {error}") from error
        return config

    def differences(self, other: TrainConfig) -> list[str]:
        """Descriptions of the options that differ, except `RUNTIME_FIELDS`."""
        return _differences(self.to_dict(), other.to_dict(), "")


def _differences(given: Mapping[str, Any], of_run: Mapping[str, Any], prefix: str) -> list[str]:
    differences = []
    for name, value in given.items():
        if isinstance(value, dict) and value.keys() == of_run[name].keys():
            differences += _differences(value, of_run[name], f"{prefix}{name}.")
        elif prefix + name not in RUNTIME_FIELDS and value != of_run[name]:
            option = (prefix + name).replace("_", "-")
            differences.append(f"--{option} {value} (the run has {of_run[name]})")
    return differences
