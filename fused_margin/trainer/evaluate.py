"""Evaluation of a trained backbone: features of images, then verification on pairs of the test images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

import fused_margin as fm

from . import verification
from .config import TrainConfig
from .data.augment import AugmentationConfig, augment
from .data.base import DataError, ImageSet, Splits, data_loader, seeded_generator, to_input
from .protocols import cosine_pairs, join_mirror
from .wording import identities

TEST_STREAM = 2  # keeps the test images' distortion apart from the training's
BATCH_SIZE = 256


class Embedded(NamedTuple):
    """What a backbone makes of a set of images."""

    features: np.ndarray  # (num_images, D) float32, not normalised
    mirrored: np.ndarray | None  # (num_images, D) of the mirror images
    labels: np.ndarray  # (num_images,)
    unreadable: list[str]  # images that are left out


@dataclass(frozen=True)
class Verification:
    """What was measured on pairs of images of the unseen identities."""

    accuracy: verification.FoldAccuracy
    summary: verification.ScoreSummary
    num_pairs: int
    folds_disjoint: bool


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the unseen identities, and on the class weights."""

    verification: Verification | None  # None: all identities were trained on
    nearest_cosine: np.ndarray  # (num_classes,) cosine of each class weight to its nearest
    separability: tuple[float, float]  # mean and standard deviation of it
    unreadable: list[str]


@torch.no_grad()
def embed(
    backbone: nn.Module,
    images: ImageSet,
    device: torch.device,
    *,
    mirror: bool,
    distortion: AugmentationConfig | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Embedded:
    """Features of the readable images and, with `mirror`, of their mirror images.

    Raises:
        DataError: no image can be read.
    """
    sampler = BatchSampler(SequentialSampler(images), BATCH_SIZE, drop_last=False)
    features, mirrored, labels, unreadable = [], [], [], []
    backbone.eval()
    for number, batch in enumerate(data_loader(images, sampler, workers)):
        unreadable += batch.unreadable
        if not len(batch.labels):
            continue
        inputs = to_input(batch.images.to(device))
        if distortion is not None:
            inputs = augment(inputs, distortion, seeded_generator(seed, TEST_STREAM, number, device=device))
        features.append(backbone(inputs).float().cpu())
        if mirror:
            mirrored.append(backbone(inputs.flip(-1)).float().cpu())
        labels.append(batch.labels)
    if not features:
        raise DataError(f"none of the {len(images):,} images to evaluate on could be read")
    return Embedded(
        torch.cat(features).numpy(),
        torch.cat(mirrored).numpy() if mirror else None,
        torch.cat(labels).numpy(),
        unreadable,
    )


def evaluate(
    backbone: nn.Module,
    class_weight: Tensor,
    splits: Splits,
    config: TrainConfig,
    device: torch.device,
) -> Evaluation:
    """Verify the backbone on pairs of the test images, if there are any, and measure the class weights."""
    nearest_cosine, separability = separation(class_weight)
    if not len(splits.test):
        return Evaluation(None, nearest_cosine, separability, [])
    options = config.evaluation
    embedded = embed(
        backbone,
        splits.test,
        device,
        mirror=options.flip != "none",
        distortion=splits.test_distortion,
        seed=config.seed,
        workers=config.workers,
    )
    pairs = verification.make_pairs(embedded.labels, options.pairs, options.folds, config.seed)
    features = join_mirror(embedded.features, embedded.mirrored, options.flip)
    result = cosine_pairs(features, pairs.indices, pairs.same, pairs.fold)
    summary = verification.summarize_pairs(result.scores, pairs.same, options.far)
    verified = Verification(result.folds, summary, len(pairs.same), pairs.folds_disjoint)
    return Evaluation(verified, nearest_cosine, separability, embedded.unreadable)


def count_known(names: Iterable[str], trained: Iterable[str] | None) -> int | None:
    """How many of the identities have the name of one that was trained on; None where those are not known."""
    return None if trained is None else len(set(names) & set(trained))


def describe_unseen(number: int, known: int | None) -> str:
    """How many identities are evaluated, and how many of them, as `count_known` found, the network may know."""
    if known is None:
        return f"{identities(number)}; it is not known whether the network was trained on any of them"
    if known:
        return f"{identities(number)}, {known:,} of which {'has' if known == 1 else 'have'} the name of one trained on"
    return f"{identities(number)} not trained on"


def separation(class_weight: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Cosine (num_classes,) of each class weight to its nearest; their mean and standard deviation (RegularFace's Sep)."""
    cosine = fm.functional.nearest_class(class_weight).cosine.double().cpu().numpy()
    return cosine, (float(cosine.mean()), float(cosine.std()))
