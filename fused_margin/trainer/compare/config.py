"""The options of `fused-margin compare`, and its names of losses with added terms."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..config import TrainConfig
from ..options import suggestion
from ..train.auxiliary import ARGUMENTS
from ..train.named_losses import LOSSES, LossConfig

RANDOM = "random-weights"  # the network before training
EXCLUSIVE = "exclusive"
# Terms that choose the class weights in bfloat16, and their stochastic rounding.
ROUNDINGS = {"bfloat16": True, "bfloat16-nearest": False}
# Default weights of added terms, from their papers if possible.
ADDED = {EXCLUSIVE: 1.0, "center": 0.003, "ring": 0.01, "center-invariant": 1e-5}
TERMS = tuple(name.replace("_", "-") for name in ARGUMENTS)
LOSSES_HELP = (
    "Losses to compare: " + ", ".join(LOSSES) + f".\n {RANDOM} is the network before training."
    "\n + adds a term, = sets its weight: arcface+exclusive, softmax+center=0.003."
    "\n Terms and their default weights: "
    + ", ".join(f"{name}={ADDED.get(name, 1.0):g}" for name in (EXCLUSIVE, *TERMS))
    + "."
    "\n +bfloat16 has class weights in bfloat16, rounded stochastically; +bfloat16-nearest rounds them to nearest."
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
    epochs: int = 5
    """Passes over the training images."""
    data: Literal["glyphs", "digits"] = "glyphs"
    """Images to train on. Both need no download. Margins and scales of the losses suit them."""
    output: Path = Path("runs/compare")
    """Folder for the runs, compare.json, compare.md and compare.html."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: a GPU, if there is one and the kernels are built for it."""

    def __post_init__(self) -> None:
        for name, given in (("losses", self.losses), ("seeds", self.seeds)):
            if not given:
                raise ValueError(f"{name}: expected at least one")
            if len(set(given)) < len(given):
                raise ValueError(f"{name}: expected each once, got {' '.join(map(str, given))}")
        for loss in self.losses:
            for seed in self.seeds:
                self.training(loss, seed)  # raises ValueError for invalid settings

    def training(self, loss: str, seed: int) -> TrainConfig:
        """The training of one loss with one seed."""
        chosen = LossConfig() if loss == RANDOM else loss_config(loss)
        defaults = TrainConfig.defaults(self.data, "small", chosen.name)
        stochastic = all(ROUNDINGS.get(term, True) for term in loss.split("+"))
        return dataclasses.replace(
            defaults,
            loss=chosen,
            optimizer=dataclasses.replace(defaults.optimizer, stochastic_rounding=stochastic),
            epochs=self.epochs,
            seed=seed,
            output=self.output / f"{loss}-{seed}",
            accelerator=self.accelerator,
        )


def loss_config(text: str) -> LossConfig:
    """The configuration of a name such as "arcface+exclusive=0.5+bfloat16".

    Raises:
        ValueError: the loss or an added term does not exist.
    """
    name, *added = text.split("+")
    roundings = [part for part in added if part in ROUNDINGS]
    if len(roundings) > 1:
        raise ValueError(f"losses: expected one of {', '.join(ROUNDINGS)} in {text}")
    if name not in LOSSES:
        raise ValueError(
            f"losses: expected {RANDOM} or one of {', '.join(LOSSES)}, got {name!r}{suggestion(name, LOSSES)}"
        )
    weights: dict[str, Any] = {}  # keyword arguments: numbers
    for part in added:
        if part in ROUNDINGS:
            continue
        term, _, weight = part.partition("=")
        if term in weights:
            raise ValueError(f"losses: expected {term} once in {text}")
        if term != EXCLUSIVE and term not in TERMS:
            terms = (EXCLUSIVE, *TERMS, *ROUNDINGS)
            raise ValueError(f"losses: expected {', '.join(terms)} after the +, got {term!r}{suggestion(term, terms)}")
        try:
            weights[term] = float(weight) if weight else ADDED.get(term, 1.0)
        except ValueError:
            raise ValueError(f"losses: expected a number after {term}=, got {weight!r}") from None
    config = dataclasses.replace(LossConfig.small_data(name), exclusive_weight=weights.pop(EXCLUSIVE, 0.0))
    if roundings:
        config = dataclasses.replace(config, weight_dtype="bfloat16")
    companions = {name.replace("-", "_"): weight for name, weight in weights.items()}
    return dataclasses.replace(config, companions=dataclasses.replace(config.companions, **companions))
