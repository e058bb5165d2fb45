"""The training criterion: a loss chosen by name, its options, its companions and its class weights."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.margins import CM1, CM2

from .companions import CompanionConfig, Companions
from .options import NamedOptions


@dataclass(frozen=True)
class Recipe:
    """What a name means: a loss of the library, and where its paper's settings differ from the class's own."""

    make: type[nn.Module]
    settings: Mapping[str, Any] = field(default_factory=dict)
    projected: bool = True  # whether the class weights' norm means nothing, so that they are kept on the unit sphere
    refused: frozenset[str] = frozenset()  # arguments of the base class that this class takes with their default only


LOSSES = {
    "softmax": Recipe(fm.SoftmaxLoss, projected=False, refused=frozenset({"sub_centers"})),
    "modified-softmax": Recipe(fm.ModifiedSoftmaxLoss),
    "normface": Recipe(fm.NormFaceLoss),
    "l2-softmax": Recipe(fm.L2SoftmaxLoss, projected=False, refused=frozenset({"sub_centers"})),
    "l-softmax": Recipe(fm.LSoftmaxLoss, projected=False),
    "sphereface": Recipe(fm.SphereFaceLoss),
    "cosface": Recipe(fm.CosFaceLoss),
    "arcface": Recipe(fm.ArcFaceLoss),
    "combined": Recipe(fm.CombinedMarginLoss),
    "cm1": Recipe(fm.CombinedMarginLoss, CM1),
    "cm2": Recipe(fm.CombinedMarginLoss, CM2),
    "adaface": Recipe(fm.AdaFaceLoss),
    "magface": Recipe(fm.MagFaceLoss),
    "elasticface": Recipe(fm.ElasticFaceLoss),
    "elasticface-plus": Recipe(fm.ElasticFaceLoss, {"by_difficulty": True, "std": 0.0175}),
    "curricularface": Recipe(fm.CurricularFaceLoss),
    "subcenter-arcface": Recipe(fm.SubCenterArcFaceLoss),
}

# The papers' settings are for millions of faces and 512 numbers for each. These are for the characters and digits that
# come with the trainer, and 128 numbers; names that are not here have none to set.
SMALL_DATA: dict[str, dict[str, Any]] = {
    "normface": {"scale": 16.0},
    "l-softmax": {"margin": 1.35},
    "sphereface": {"margin": 1.35},
    "cosface": {"margin": 0.15, "scale": 16.0},
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

NOT_OPTIONS = {  # fields of LossConfig, facts of the data, or nothing that training needs
    "num_classes", "embedding_size", "margin", "scale", "exclusive_weight", "class_weight", "reduction", "ignore_index",
    "device", "dtype", "process_group", "sample_rate", "sparse",
}  # fmt: skip


OTHER_KINDS = {"exclusive_refresh": ("a number",)}  # of value, beside the kind of the default


@dataclass(frozen=True)
class LossConfig:
    """The loss and its settings."""

    name: Literal[tuple(LOSSES)] = "arcface"
    """Name of the loss. The defaults of the other options depend on it."""
    margin: Annotated[float | None, tyro.conf.arg(help=MARGIN_HELP)] = None
    scale: Annotated[float | None, tyro.conf.arg(help=SCALE_HELP)] = None
    exclusive_weight: float = 0.0
    """Weight of RegularFace's exclusive term, which pushes the nearest class weights apart. 0 adds none."""
    options: Annotated[NamedOptions, tyro.conf.arg(help=OPTIONS_HELP)] = field(default_factory=dict)
    companions: CompanionConfig = field(default_factory=CompanionConfig)

    def __post_init__(self) -> None:
        if self.name not in LOSSES:
            raise ValueError(f"loss.name must be one of {', '.join(LOSSES)}, got {self.name!r}")
        if self.scale is not None and not 0 < self.scale < math.inf:
            raise ValueError(f"loss.scale must be positive and finite, got {self.scale}")
        for name in ("margin", "exclusive_weight"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"loss.{name} must be finite and not negative, got {value}")
        recipe = LOSSES[self.name]
        accepted = accepted_arguments(recipe.make)
        for name, given in (
            ("margin", self.margin),
            ("scale", self.scale),
            ("exclusive_weight", self.exclusive_weight or None),
        ):
            if given is not None and name not in accepted:
                raise ValueError(f"loss.{name}: {self.name} has none, got {given}")
        for name, value in self.options.items():
            if name not in (known := options_of(recipe)):
                known = ", ".join(sorted(known))
                raise ValueError(f"loss.options: {self.name} has no option {name!r}; it has {known}")
            kinds = (kind_of(accepted[name].default), *OTHER_KINDS.get(name, ()))
            if kind_of(value) not in kinds:
                raise ValueError(f"loss.options: {name} of {self.name} must be {' or '.join(kinds)}, got {value!r}")
        try:
            make_small_loss(self)  # the loss knows what else is wrong
        except (TypeError, ValueError) as error:
            raise ValueError(f"loss {self.name}: {error}") from error

    @classmethod
    def small_data(cls, name: str) -> LossConfig:
        """Settings that suit the images that come with the trainer."""
        return cls(name, **SMALL_DATA.get(name, {}))


def accepted_arguments(make: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """What the constructor takes by name, with its base classes' keyword-only options where it hands them on."""
    found: dict[str, inspect.Parameter] = {}
    for depth, cls in enumerate(c for c in make.__mro__ if "__init__" in vars(c)):
        parameters = inspect.signature(cls.__init__).parameters.values()
        named = [
            p for p in parameters if p.kind == p.KEYWORD_ONLY or (depth == 0 and p.kind == p.POSITIONAL_OR_KEYWORD)
        ]
        found = {**{p.name: p for p in named if p.name != "self"}, **found}
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return found


def kind_of(value: Any) -> str:
    kinds = {bool: "True or False", str: "a word", tuple: "numbers with commas between"}
    return kinds.get(type(value), "a number")  # None too: the default of a number that may be learned


def options_of(recipe: Recipe) -> dict[str, Any]:
    """What `LossConfig.options` may give to a loss, with the default values."""
    return {
        name: recipe.settings.get(name, parameter.default)
        for name, parameter in accepted_arguments(recipe.make).items()
        if name not in NOT_OPTIONS | recipe.refused
    }


def options_by_loss() -> dict[str, dict[str, Any]]:
    """`options_of` each loss."""
    return {name: options_of(recipe) for name, recipe in LOSSES.items()}


def _described_options() -> str:
    """Help of `LossConfig.options`: the options of all losses, of most, and of each alone."""
    options = options_by_loss()
    angular = options["arcface"]
    shared = {name: value for name, value in angular.items() if all(name in own for own in options.values())}
    most = {name: value for name, value in angular.items() if name not in shared}
    without = [loss for loss, own in options.items() if not most.keys() <= own.keys()]
    lines = [
        "Other arguments of the loss, such as std=0.1 by_difficulty=True or margins=0.3,0.6.",
        "The classes of fused_margin document them.",
        "A loss that is given any does not get those that are shown below as the default of --loss.options.",
        "Options and their defaults:",
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
    return "\n ".join(lines)


def _assignments(options: Mapping[str, Any]) -> str:
    words = ((name, ",".join(map(str, v)) if isinstance(v, tuple) else v) for name, v in options.items())
    return " ".join(f"{name}={value}" for name, value in words)


def _papers_values(name: str) -> str:
    """An argument's default in each loss that has it: what the loss's paper uses."""
    found: dict[Any, list[str]] = {}
    for loss, recipe in LOSSES.items():
        accepted = accepted_arguments(recipe.make)
        if name in accepted and accepted[name].default is not None:
            found.setdefault(accepted[name].default, []).append(loss)
    return "; ".join(f"{value} for {', '.join(losses)}" for value, losses in found.items())


MARGIN_HELP = (
    "Margin of the loss: an angle in radians, a cosine for cosface, a factor on the angle for l-softmax and sphereface."
    f" None takes the value of the loss's paper: {_papers_values('margin')}."
)
SCALE_HELP = (
    "Scale of the cosines. None takes the value of the loss's paper:"
    f" {_papers_values('scale')}; the norm of the embedding for sphereface."
)
OPTIONS_HELP = _described_options()


def make_small_loss(config: LossConfig) -> nn.Module:
    """The loss of two classes, to learn what it makes of its settings; random numbers are drawn as without it.

    It does not warn of the settings: the loss that is trained does.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        return make_loss(config, 2, 2)  # not on "meta", where the exact search of exclusive_refresh is refused


def make_loss(config: LossConfig, num_classes: int, embedding_size: int, **placement: Any) -> nn.Module:
    recipe = LOSSES[config.name]
    arguments = {**recipe.settings, **config.options, **placement}
    for name in ("margin", "scale"):
        if getattr(config, name) is not None:
            arguments[name] = getattr(config, name)
    if config.exclusive_weight:
        arguments["exclusive_weight"] = config.exclusive_weight
    return recipe.make(num_classes, embedding_size, **arguments)


class Criterion(nn.Module):
    """Embeddings (N, D) and labels (N,) to the loss; it owns the class weights.

    Attributes:
        last_parts: what the loss and each companion contributed to the last result, detached.
    """

    def __init__(
        self, config: LossConfig, num_classes: int, embedding_size: int, process_group: Any | None = None
    ) -> None:
        super().__init__()
        self.name, self.projected = config.name, LOSSES[config.name].projected
        divided = {} if process_group is None else {"process_group": process_group}
        self.loss_fn = make_loss(config, num_classes, embedding_size, **divided)
        workspace_mb = config.options.get("workspace_mb", 256)
        self.companions = Companions(config.companions, num_classes, embedding_size, workspace_mb)
        self.last_parts: dict[str, Tensor] = {}
        for weight in self.projected_parameters():
            fm.optim.project_(weight)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        parts = {self.name: self.loss_fn(embeddings, labels)}
        if self.companions.weights:
            parts |= self.companions(
                embeddings, class_directions(self.loss_fn.weight, self.loss_fn.sub_centers), labels
            )
        self.last_parts = {name: part.detach() for name, part in parts.items()}
        return sum(parts.values())

    def projected_parameters(self) -> list[nn.Parameter]:
        """Class weights whose rows stay on the unit sphere."""
        return [self.loss_fn.weight] if self.projected else []

    def plain_parameters(self) -> list[nn.Parameter]:
        """All others, which train as the backbone does: class weights whose norm counts, biases, learned scales and radii."""
        projected = {id(weight) for weight in self.projected_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in projected]

    @property
    def class_weight(self) -> Tensor:
        """(C, D), detached; with sub-centers the direction of their mean."""
        return class_directions(self.loss_fn.weight.detach(), self.loss_fn.sub_centers)


def class_directions(weight: Tensor, sub_centers: int) -> Tensor:
    """Weights (C * sub_centers, D) to one row a class (C, D): itself, or the unit-length mean of its unit sub-centers."""
    if sub_centers == 1:
        return weight
    return F.normalize(F.normalize(weight, dim=1).unflatten(0, (-1, sub_centers)).mean(1), dim=1)


def stored_class_weight(config: LossConfig, criterion_state: Mapping[str, Tensor]) -> Tensor:
    """Class weights (C, D) in the state dict of a `Criterion`."""
    return class_directions(criterion_state["loss_fn.weight"], make_small_loss(config).sub_centers)
