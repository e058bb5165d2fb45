"""The options of `fused-margin compare`, and its names of losses with added terms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fused_margin.evaluation.protocols import LfwVariant

from ..config import IMAGES_PER_IDENTITY, TrainConfig
from ..config_values import ConfigError, overlay, read_file
from ..data import EMBEDDED
from ..defaults import none_means
from ..models import Network
from ..options import suggestion
from ..train.auxiliary import ARGUMENTS
from ..train.named_losses import LOSSES, LossConfig
from .benchmarks import TEST_IDENTITIES, split_word
from .table import RANDOM

EXCLUSIVE, GROUPS = "exclusive", "groups"
EPOCHS = 5  # of the images that need no download
# Terms that choose the class weights in bfloat16, and their stochastic rounding.
ROUNDINGS = {"bfloat16": True, "bfloat16-nearest": False}
# Default weights of added terms, from their papers if possible, and number of groups.
ADDED = {EXCLUSIVE: 1.0, "center": 0.003, "ring": 0.01, "center-invariant": 1e-5, "deepid2": 0.05, GROUPS: 32.0}
WEIGHTED = (EXCLUSIVE, *(name.replace("_", "-") for name in ARGUMENTS))
TERMS = (*WEIGHTED, GROUPS, *ROUNDINGS)
# Images of an identity in a batch for terms beside class weights. With four, which losses without class weights have, a
# batch has half as many classes, and ArcFace collapses on glyphs.
TERM_IMAGES = 2
# Options of a configuration file that the command line has.
COMMAND_OPTIONS = ("config", "output", "resume")
LOSSES_HELP = (
    "Losses to compare: " + ", ".join(LOSSES) + f".\n {RANDOM} is the network before training."
    "\n = sets the margin: arcface=0.45. + adds a term, = sets its weight: arcface+exclusive, softmax+center=0.003."
    "\n Terms and their default weights: "
    + ", ".join(f"{name}={ADDED.get(name, 1.0):g}" for name in WEIGHTED)
    + f".\n +{GROUPS} ends the network in GroupFace's head with {ADDED[GROUPS]:g} groups; +{GROUPS}=8 has 8."
    "\n +bfloat16 has class weights in bfloat16, rounded stochastically; +bfloat16-nearest rounds them to nearest."
    "\n If the loss compares the images of a batch, each batch has "
    f"{IMAGES_PER_IDENTITY} images of each of its identities, and {TERM_IMAGES} if only a term does,"
    "\n unless --config has images_per_identity."
)


@dataclass(frozen=True)
class CompareConfig:
    """Train several losses with the same settings and several seeds, and write a table of the results.

    Finished runs are kept, so the same command continues after an interruption.
    """

    losses: Annotated[tuple[str, ...], tyro.conf.arg(help=LOSSES_HELP)] = (
        RANDOM, "softmax", "normface", "sphereface", "sphereface+exclusive", "cosface", "cosface+exclusive", "arcface",
        "arcface+exclusive",
    )  # fmt: skip
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs of each loss. A seed determines test identities, initial weights, order and augmentation."""
    epochs: Annotated[int | None, none_means("that of --config, or 5 for glyphs and digits, or 30")] = None
    """Passes over the training images."""
    data: Annotated[str | None, none_means("that of --config, or glyphs")] = None
    """Images to train on, as for fused-margin train.
    glyphs and digits need no download, and the losses have margins and scales that suit them.
    On other images they have those of their papers."""
    benchmarks: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: test identities)")] = ()
    """What to evaluate each network on, as NAME=PATH, instead of test identities. The table has its columns.
    A verification set (as for --data of fused-margin evaluate): the accuracy under LFW's or YouTube Faces' protocol.
    LISTS,PROBES,DISTRACTORS: MegaFace's templatelists and two folders of images; rank-1, and TAR at FAR = 1e-6.
    Images that fused-margin train accepts: accuracy and TAR on pairs, and among half of the identities rank-1 and,
    with the other half unknown, DIR.
    test-identities: the same for identities that are kept out of the training.
    Without these, all identities are trained on, unless --config has a test_fraction."""
    variant: LfwVariant = "insightface"
    """Variant of LFW's protocol, as for fused-margin evaluate."""
    network: Annotated[Network | None, none_means("that of --config, or small")] = None
    """Network, as for fused-margin train."""
    config: Annotated[Path | None, none_means("no file")] = None
    """YAML file of options of fused-margin train, such as the config.yaml of a run.
    Its loss, seed and accelerator are replaced."""
    output: Path = Path("runs/compare")
    """Folder for the runs, compare.json, compare.md and compare.html."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: a GPU, if there is one and the kernels are built for it."""

    def __post_init__(self) -> None:
        for name, given in (("losses", self.losses), ("seeds", self.seeds)):
            if not given:
                raise ValueError(f"{name}: expected at least one")
        names = tuple(split_word(word)[0] for word in self.benchmarks)
        for name, given in (("losses", self.losses), ("seeds", self.seeds), ("benchmarks", names)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once, got {' '.join(map(str, given))}")
        for loss in self.losses:
            for seed in self.seeds:
                training = self.training(loss, seed)  # raises ValueError for invalid settings
        if training.devices > 1:
            raise ValueError(f"devices: compare trains in one process, got {training.devices} in {self.config}")
        if self.uses_test_identities and not training.test_fraction:
            raise ValueError(
                "test_fraction: with 0 there are no test identities to evaluate; name other benchmarks with "
                f"--benchmarks, or raise it in {self.config}"
            )

    @property
    def images(self) -> str:
        """Images to train on: their path, or the name of those that need no download."""
        return self.data or self._file_values.get("data", "glyphs")

    @property
    def uses_test_identities(self) -> bool:
        """Whether identities are kept out of the training, to evaluate on them."""
        return not self.benchmarks or TEST_IDENTITIES in (split_word(word)[1] for word in self.benchmarks)

    @cached_property
    def _file_values(self) -> dict[str, Any]:
        if self.config is None:
            return {}
        values = read_file(self.config)
        if misplaced := sorted(set(COMMAND_OPTIONS) & set(values)):
            raise ConfigError(f"{self.config}: {', '.join(misplaced)}: not in the file of a comparison")
        values.pop("loss", None)
        return values

    def training(self, loss: str, seed: int) -> TrainConfig:
        """The training of one loss with one seed."""
        embedded = self.images in EMBEDDED
        chosen = LossConfig() if loss == RANDOM else loss_config(loss, small_data=embedded)
        base = self._base(chosen.name)
        terms = added_terms(loss)
        stochastic = all(ROUNDINGS.get(term, True) for term in terms)
        images = base.images_per_identity
        if chosen.compares_samples and "images_per_identity" not in self._file_values:
            images = TERM_IMAGES if chosen.has_class_weights else IMAGES_PER_IDENTITY
        return dataclasses.replace(
            base,
            model=dataclasses.replace(base.model, groups=int(terms.get(GROUPS, base.model.groups))),
            images_per_identity=images,
            data=base.data if embedded else str(Path(base.data).resolve()),
            weights=None if base.weights is None else base.weights.resolve(),
            loss=chosen,
            optimizer=dataclasses.replace(base.optimizer, stochastic_rounding=stochastic),
            epochs=base.epochs if self.epochs is None else self.epochs,
            seed=seed,
            output=self.output / f"{loss}-{seed}",
            accelerator=self.accelerator,
        )

    def _base(self, loss: str) -> TrainConfig:
        """The options of the trainings that this command has no options for."""
        values = self._file_values
        network = self.network or values.get("network", "small")
        config = TrainConfig.defaults(self.images, network, loss)
        if self.images in EMBEDDED:
            config = dataclasses.replace(config, epochs=EPOCHS)
        if not self.uses_test_identities:
            config = dataclasses.replace(config, test_fraction=0.0)
        try:
            return overlay(config, {**values, "data": self.images, "network": network})
        except ConfigError as error:
            raise ConfigError(f"{self.config}: {error}") from error


def added_terms(text: str) -> dict[str, float]:
    """The terms of a name such as "arcface+exclusive=0.5+groups": weights, the number of groups, 1 for a rounding.

    Raises:
        ValueError: a term does not exist, is there twice, or another number is expected.
    """
    numbers: dict[str, float] = {}
    for part in text.split("+")[1:]:
        term, equals, number = part.partition("=")
        if term not in TERMS:
            raise ValueError(f"losses: expected {', '.join(TERMS)} after the +, got {term!r}{suggestion(term, TERMS)}")
        if term in numbers:
            raise ValueError(f"losses: expected {term} once in {text}")
        if equals and term in ROUNDINGS:
            raise ValueError(f"losses: {term} takes no number, got {part}")
        numbers[term] = _number(term, number) if equals else ADDED.get(term, 1.0)
        if term == GROUPS and not (numbers[term] >= 2 and numbers[term].is_integer()):
            raise ValueError(f"losses: expected a whole number of at least 2 after {GROUPS}=, got {number!r}")
    if len(numbers.keys() & ROUNDINGS) > 1:
        raise ValueError(f"losses: expected one of {', '.join(ROUNDINGS)} in {text}")
    return numbers


def loss_config(text: str, *, small_data: bool = True) -> LossConfig:
    """The configuration of a name such as "arcface=0.45+exclusive=0.5+bfloat16".

    Args:
        small_data: whether the settings are those for images that need no download, instead of the papers'.

    Raises:
        ValueError: the loss or an added term does not exist, or a number is expected.
    """
    name, equals, margin = text.split("+")[0].partition("=")
    if name == RANDOM:
        raise ValueError(f"losses: {RANDOM} takes no margin and no terms, got {text!r}")
    if name not in LOSSES:
        raise ValueError(
            f"losses: expected {RANDOM} or one of {', '.join(LOSSES)}, got {name!r}{suggestion(name, LOSSES)}"
        )
    terms = added_terms(text)
    config = LossConfig.small_data(name) if small_data else LossConfig(name)
    config = dataclasses.replace(config, exclusive_weight=terms.get(EXCLUSIVE, 0.0))
    if equals:
        config = dataclasses.replace(config, margin=_number(name, margin))
    if not terms.keys().isdisjoint(ROUNDINGS):
        config = dataclasses.replace(config, weight_dtype="bfloat16")
    companions: dict[str, Any] = {  # keyword arguments: numbers
        name: terms[term] for name in ARGUMENTS if (term := name.replace("_", "-")) in terms
    }
    return dataclasses.replace(config, companions=dataclasses.replace(config.companions, **companions))


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"losses: expected a number after {name}=, got {text!r}") from None
