"""The losses that the trainer knows by name, and their options."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro

import fused_margin as fm
from fused_margin.losses.auxiliary import AuxiliaryLoss
from fused_margin.losses.base import ClassificationLoss
from fused_margin.losses.softmax import SoftmaxLoss
from fused_margin.margins import CM1, CM2

from ..defaults import none_means
from ..options import NamedOptions, suggestion
from .auxiliary import ARGUMENTS, BETWEEN_SAMPLES, AuxiliaryConfig

MainLoss = ClassificationLoss | AuxiliaryLoss  # the second has no class weights


@dataclass(frozen=True)
class NamedLoss:
    """A loss class of the library, and the settings in which the named loss differs from the defaults of the class."""

    loss_class: type[MainLoss]
    settings: Mapping[str, Any] = field(default_factory=dict)
    projected: bool = True  # the norm of class weights has no effect, so they are kept at unit norm
    refused: frozenset[str] = frozenset()  # arguments of the base class that this class does not support

    @property
    def has_class_weights(self) -> bool:
        """Whether the loss has a weight per class. If not, it compares the samples of a batch."""
        return issubclass(self.loss_class, ClassificationLoss)


LOSSES = {
    "softmax": NamedLoss(fm.SoftmaxLoss, projected=False, refused=frozenset({"sub_centers"})),
    "modified-softmax": NamedLoss(fm.ModifiedSoftmaxLoss),
    "normface": NamedLoss(fm.NormFaceLoss),
    "l2-softmax": NamedLoss(fm.L2SoftmaxLoss, projected=False, refused=frozenset({"sub_centers"})),
    "l-softmax": NamedLoss(fm.LSoftmaxLoss, projected=False, refused=frozenset({"sub_centers", "label_smoothing"})),
    "sphereface": NamedLoss(fm.SphereFaceLoss),
    "cosface": NamedLoss(fm.CosFaceLoss),
    "am-softmax": NamedLoss(fm.AMSoftmaxLoss),
    "coco": NamedLoss(fm.CoCoLoss),
    "vmf": NamedLoss(fm.VMFLoss),
    "arcface": NamedLoss(fm.ArcFaceLoss),
    "combined": NamedLoss(fm.CombinedMarginLoss),
    "cm1": NamedLoss(fm.CombinedMarginLoss, CM1),
    "cm2": NamedLoss(fm.CombinedMarginLoss, CM2),
    "adaface": NamedLoss(fm.AdaFaceLoss),
    "magface": NamedLoss(fm.MagFaceLoss),
    "elasticface": NamedLoss(fm.ElasticFaceLoss),
    "elasticface-plus": NamedLoss(fm.ElasticFaceLoss, {"by_difficulty": True, "std": 0.0175}),
    "curricularface": NamedLoss(fm.CurricularFaceLoss, refused=frozenset({"label_smoothing"})),
    "subcenter-arcface": NamedLoss(fm.SubCenterArcFaceLoss),
    # A new network that sees hardest triplets only often maps all images to one point (FaceNet, section 3.2).
    "triplet": NamedLoss(fm.TripletLoss, {"mining": "semihard"}, projected=False),
    "angular-triplet": NamedLoss(fm.AngularTripletLoss, {"mining": "semihard"}, projected=False),
    "contrastive": NamedLoss(fm.ContrastiveLoss, {"average": "separate"}, projected=False),
    "siamese-l1": NamedLoss(fm.SiameseL1Loss, projected=False),
}

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]  # for the command line and YAML files; type checkers cannot read it

# The papers' settings suit millions of faces and 512-d embeddings. These suit the characters and digits that need no
# download, with 128-d embeddings. Losses without a row have no such settings.
SMALL_DATA: dict[str, dict[str, Any]] = {
    "normface": {"scale": 16.0},
    "l-softmax": {"margin": 1.35},
    "sphereface": {"margin": 1.35},
    "cosface": {"margin": 0.15, "scale": 16.0},
    "am-softmax": {"margin": 0.15, "scale": 16.0},
    "arcface": {"margin": 0.2, "scale": 16.0, "exclusive_weight": 1.0},
    "combined": {"scale": 16.0},
    "cm1": {"scale": 16.0},
    "cm2": {"scale": 16.0},
    "adaface": {"margin": 0.2, "scale": 16.0},
    "magface": {"scale": 16.0, "options": {"margins": (0.1, 0.3), "norm_weight": 5}},
    "elasticface": {"margin": 0.2, "scale": 16.0},
    "elasticface-plus": {"margin": 0.2, "scale": 16.0},
    "curricularface": {"margin": 0.2, "scale": 16.0},
    "subcenter-arcface": {"margin": 0.2, "scale": 16.0},
}

NOT_OPTIONS = {  # fields of LossConfig, properties of the data, or without use in training
    "num_classes", "embedding_size", "margin", "scale", "exclusive_weight", "class_weight", "reduction", "ignore_index",
    "device", "dtype", "process_group", "sample_rate", "sparse",
}  # fmt: skip


OTHER_KINDS = {"exclusive_refresh": ("a number",)}  # of values, besides the kind of the default


@dataclass(frozen=True)
class LossConfig:
    """The loss and its settings."""

    name: LossName = "arcface"
    """Name of the loss. The defaults of the other options depend on it."""
    margin: Annotated[float | None, tyro.conf.arg(help=MARGIN_HELP), none_means(OF_PAPER)] = None
    scale: Annotated[float | None, tyro.conf.arg(help=SCALE_HELP), none_means(OF_PAPER)] = None
    exclusive_weight: float = 0.0
    """Weight of RegularFace's exclusive term, which pushes the nearest class weights apart. 0 disables it."""
    options: Annotated[NamedOptions, tyro.conf.arg(help=OPTIONS_HELP)] = field(default_factory=dict)
    weight_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the class weights and of their momentum. bfloat16 halves their memory.
    See --optimizer.stochastic-rounding. Embeddings and the computation remain in float32."""
    companions: AuxiliaryConfig = field(default_factory=AuxiliaryConfig)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"loss.name must be one of {', '.join(LOSSES)}, got {self.name!r}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"loss.scale must be positive and finite, got {self.scale}")
        for name in ("margin", "exclusive_weight"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"loss.{name} must be finite and not negative, got {value}")
        named = LOSSES[self.name]
        accepted = accepted_arguments(named.loss_class)
        for name, given in (
            ("margin", self.margin),
            ("scale", self.scale),
            ("exclusive_weight", self.exclusive_weight or None),
        ):
            if given is not None and name not in accepted:
                raise ValueError(f"loss.{name}: {self.name} has none, got {given}")
        if not named.has_class_weights:
            if self.weight_dtype != "float32":
                raise ValueError(f"loss.weight_dtype: {self.name} has no class weights, got {self.weight_dtype}")
            for name, weight in self.companions.weights().items():
                if "class_weight" in ARGUMENTS[name]:
                    raise ValueError(f"loss.companions.{name}: {self.name} has no class weights, got {weight}")
        for name, value in self.options.items():
            if name not in (known := options_of(named)):
                names = ", ".join(sorted(known))
                raise ValueError(
                    f"loss.options: {self.name} has no option {name!r}; it has {names}{suggestion(name, known)}"
                )
            kinds = (kind_of(accepted[name].default), *OTHER_KINDS.get(name, ()))
            if kind_of(value) not in kinds:
                raise ValueError(f"loss.options: {name} of {self.name} must be {' or '.join(kinds)}, got {value!r}")
        try:
            make_small_loss(self)  # the constructor of the loss validates the rest
        except (TypeError, ValueError) as error:
            raise ValueError(f"loss {self.name}: {error}") from error

    @classmethod
    def small_data(cls, name: str) -> LossConfig:
        """Settings for the images that need no download."""
        return cls(name, **SMALL_DATA.get(name, {}))

    @property
    def has_class_weights(self) -> bool:
        return LOSSES[self.name].has_class_weights

    @property
    def compares_samples(self) -> bool:
        """Whether the loss or a companion compares the samples of a batch, and so needs several of a class in it."""
        return not self.has_class_weights or not BETWEEN_SAMPLES.isdisjoint(self.companions.weights())

    def other_gradient(self) -> str | None:
        """An option that adds a gradient of the class weights outside the backward of the loss, and its value."""
        for name, weight in self.companions.weights().items():
            if "class_weight" in ARGUMENTS[name]:
                return f"loss.companions.{name} {weight}"
        if self.exclusive_weight and issubclass(LOSSES[self.name].loss_class, SoftmaxLoss):
            return f"loss.exclusive_weight {self.exclusive_weight} of {self.name}"
        return None


def accepted_arguments(loss_class: type[MainLoss]) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor, including keyword-only parameters of base classes that it passes on."""
    accepted: dict[str, inspect.Parameter] = {}
    for depth, cls in enumerate(c for c in loss_class.__mro__ if "__init__" in vars(c)):
        parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()
        named = [
            p for p in parameters if p.kind == p.KEYWORD_ONLY or (depth == 0 and p.kind == p.POSITIONAL_OR_KEYWORD)
        ]
        accepted = {**{p.name: p for p in named if p.name != "self"}, **accepted}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return accepted


def kind_of(value: Any) -> str:
    kinds = {bool: "True or False", str: "text", tuple: "comma-separated numbers"}
    return kinds.get(type(value), "a number")  # also for None, the default of some numbers


def options_of(named: NamedLoss) -> dict[str, Any]:
    """Options that `LossConfig.options` may set for a loss, with their defaults."""
    return {
        name: named.settings.get(name, parameter.default)
        for name, parameter in accepted_arguments(named.loss_class).items()
        if name not in NOT_OPTIONS | named.refused
    }


def described_settings(config: LossConfig) -> list[tuple[str, str]]:
    """Names and values of the settings of a loss, with the values that its paper gives where none are set."""
    named = LOSSES[config.name]
    accepted = accepted_arguments(named.loss_class)
    described: list[tuple[str, str]] = []
    for name in ("margin", "scale"):
        if name not in accepted:
            continue
        value = getattr(config, name)
        if value is None:
            value = named.settings.get(name, accepted[name].default)
            text = "the norm of the embedding" if value is None else f"{value:g} (default)"
        else:
            text = f"{value:g}"
        described.append((name, text))
    if config.exclusive_weight:
        described.append(("exclusive weight", f"{config.exclusive_weight:g}"))
    options = {**named.settings, **config.options}
    described += [(name, str(value)) for name, value in options.items() if name not in ("margin", "scale")]
    described += [
        (f"{name.replace('_', '-')} loss", f"{weight:g}") for name, weight in config.companions.weights().items()
    ]
    return [*described, ("class weights", config.weight_dtype if config.has_class_weights else "none")]


def options_by_loss() -> dict[str, dict[str, Any]]:
    """`options_of` each loss."""
    return {name: options_of(named) for name, named in LOSSES.items()}


def _described_options() -> str:
    """Help of `LossConfig.options`: the options of all losses with class weights, of most, and of single losses."""
    every = options_by_loss()
    options = {loss: own for loss, own in every.items() if LOSSES[loss].has_class_weights}
    angular = options["arcface"]
    shared = {name: value for name, value in angular.items() if all(name in own for own in options.values())}
    most = {name: value for name, value in angular.items() if name not in shared}
    without = [loss for loss, own in options.items() if not most.keys() <= own.keys()]
    lines = [
        "Other arguments of the loss, such as std=0.1 by_difficulty=True or margins=0.3,0.6.",
        "They are documented in the classes of fused_margin.",
        "Options given here replace all defaults of --loss.options that are shown below.",
        "Options and their defaults, of losses with class weights:",
        f"all losses: {_assignments(shared)}",
        f"all but {', '.join(without)}: {_assignments(most)}",
    ]
    alone: dict[str, list[str]] = {}
    for loss, own in options.items():
        listed = shared if loss in without else angular
        special = {name: value for name, value in own.items() if name not in listed or listed[name] != value}
        if special:
            alone.setdefault(_assignments(special), []).append(loss)
    lines += [f"{', '.join(losses)}: {words}" for words, losses in alone.items()]
    lines += ["Of losses without class weights:"]
    lines += [f"{loss}: {_assignments(own)}" for loss, own in every.items() if loss not in options]
    return "\n ".join(lines)


def _assignments(options: Mapping[str, Any]) -> str:
    words = ((name, ",".join(map(str, v)) if isinstance(v, tuple) else v) for name, v in options.items())
    return " ".join(f"{name}={value}" for name, value in words)


def _papers_values(name: str) -> str:
    """Defaults of an argument, which are the papers' values, with the losses that have them."""
    losses_by_value: dict[Any, list[str]] = {}
    for loss, named in LOSSES.items():
        accepted = accepted_arguments(named.loss_class)
        if name in accepted and accepted[name].default is not None:
            losses_by_value.setdefault(accepted[name].default, []).append(loss)
    return "; ".join(f"{value} for {', '.join(losses)}" for value, losses in losses_by_value.items())


OF_PAPER = "the value of the loss's paper"
MARGIN_HELP = (
    "Margin of the loss: an angle in radians, a cosine for cosface and am-softmax, a factor on the angle for l-softmax and"
    " sphereface, a squared distance for triplet, a distance for contrastive."
    f" None selects the value of the loss's paper: {_papers_values('margin')}."
)
SCALE_HELP = (
    "Scale of the cosines. None selects the value of the loss's paper:"
    f" {_papers_values('scale')}; the norm of the embedding for sphereface."
)
OPTIONS_HELP = _described_options()


def make_small_loss(config: LossConfig) -> MainLoss:
    """A loss of two classes, to validate the settings. It changes no random state and raises no warnings."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return make_loss(config, 2, 2)  # not on "meta", which refuses the exact search of exclusive_refresh


def make_loss(config: LossConfig, num_classes: int, embedding_size: int, **overrides: Any) -> MainLoss:
    """The configured loss; `overrides` are further arguments of its constructor."""
    named = LOSSES[config.name]
    accepted = accepted_arguments(named.loss_class)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    arguments = {**{name: size for name, size in sizes.items() if name in accepted}, **named.settings}
    arguments |= {**config.options, **overrides}
    for name in ("margin", "scale"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    if config.exclusive_weight:
        arguments["exclusive_weight"] = config.exclusive_weight
    return named.loss_class(**arguments)
