"""Features of a backbone, its verification on pairs of test images, and the separability of class weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

import fused_margin as fm
from fused_margin.evaluation import (
    DataError,
    PairResult,
    Pairs,
    ScoreSummary,
    cosine_pairs,
    join_mirror,
    make_pairs,
    summarize_pairs,
)
from fused_margin.evaluation.nearest_rows import Progress
from fused_margin.evaluation.plurals import counted, counted_identities

from ..config import TrainConfig
from ..data.augment import augment
from ..data.base import ImageSet, Splits, data_loader, from_input, seeded_generator, to_input, to_picture
from ..data.config import AugmentationConfig
from .progress import Show, show_embedding

TEST_STREAM = 2  # of the random distortion of test images
BATCH_SIZE = 256


class ShownImages:
    """The images behind the rows of features, for reports."""

    def __init__(
        self,
        images: ImageSet,
        index: np.ndarray,
        device: torch.device,
        distortion: AugmentationConfig | None = None,
        seed: int = 0,
    ) -> None:
        """`index`: (num_rows,) of each row's image in `images`; the other arguments as for `embed`."""
        self.images, self.index, self.device = images, index, device
        self.distortion, self.seed = distortion, seed
        self._distorted: dict[int, Tensor] = {}  # pixels by index in `images`, of whole batches

    def identity(self, row: int) -> str:
        """Name of the identity of a row's image."""
        return self.images.identities[int(self.images.labels[self.index[row]])]

    def name(self, row: int) -> str:
        """Name of a row's image."""
        return self.images.name(int(self.index[row]))

    def picture(self, row: int) -> Image.Image:
        """A row's image, with the distortion that the network has seen.

        Raises:
            DataError, OSError: it cannot be read.
        """
        index = int(self.index[row])
        if self.distortion is None:
            return self.images.picture(index)
        if index not in self._distorted:  # the random numbers of a batch depend on all of its images
            number = index // BATCH_SIZE
            rows = range(number * BATCH_SIZE, min((number + 1) * BATCH_SIZE, len(self.images)))
            batch = self.images.__getitems__(list(rows))
            inputs = _network_inputs(batch.images, number, self.device, self.distortion, self.seed)
            self._distorted.update(zip(batch.indices, from_input(inputs), strict=True))
        return to_picture(self._distorted[index])


def _network_inputs(
    images: Tensor, number: int, device: torch.device, distortion: AugmentationConfig | None, seed: int
) -> Tensor:
    """Input of the network for the images of batch `number`, with the distortion of test images if there is one."""
    inputs = to_input(images.to(device))
    if distortion is None:
        return inputs
    return augment(inputs, distortion, seeded_generator(seed, TEST_STREAM, number, device=device))


class Embedded(NamedTuple):
    """Features of a set of images."""

    features: np.ndarray  # (num_images, D) float32, not normalized
    mirrored: np.ndarray | None  # (num_images, D) of the mirror images
    labels: np.ndarray  # (num_images,)
    shown: ShownImages  # the images of the rows
    unreadable: list[str]  # skipped images


@dataclass(frozen=True)
class Verification:
    """Verification results on pairs of images of the test identities."""

    pairs: Pairs
    result: PairResult
    summary: ScoreSummary
    shown: ShownImages  # the images of the pairs' rows


@dataclass(frozen=True)
class Evaluation:
    """Results on the test identities, and of the class weights."""

    verification: Verification | None  # None: there are no test identities
    nearest_cosine: (
        np.ndarray | None
    )  # (num_classes,) cosine of each class weight to its nearest other, if there are any
    separability: tuple[float, float] | None  # mean and standard deviation of nearest_cosine
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
    progress: Progress | None = None,
) -> Embedded:
    """Features of the readable images and, with `mirror`, of their mirror images.

    Args:
        progress: called with the number of images that are done, and of all.

    Raises:
        DataError: no image can be read.
    """
    sampler = BatchSampler(SequentialSampler(images), BATCH_SIZE, drop_last=False)
    features, mirrored, labels = [], [], []
    indices: list[int] = []
    unreadable: list[str] = []
    backbone.eval()
    for number, batch in enumerate(data_loader(images, sampler, workers)):
        unreadable += batch.unreadable
        if progress is not None:
            progress(min((number + 1) * BATCH_SIZE, len(images)), len(images))
        if not len(batch.labels):
            continue
        indices += batch.indices
        inputs = _network_inputs(batch.images, number, device, distortion, seed)
        features.append(backbone(inputs).float().cpu())
        if mirror:
            mirrored.append(backbone(inputs.flip(-1)).float().cpu())
        labels.append(batch.labels)
    if not features:
        raise DataError(
            f"{counted(len(images), 'image')} to compute features of, none of which can be read: {unreadable[0]}"
        )
    return Embedded(
        torch.cat(features).numpy(),
        torch.cat(mirrored).numpy() if mirror else None,
        torch.cat(labels).numpy(),
        ShownImages(images, np.array(indices), device, distortion, seed),
        unreadable,
    )


def evaluate(
    backbone: nn.Module,
    class_weight: Tensor | None,
    splits: Splits,
    config: TrainConfig,
    device: torch.device,
    show: Show,
) -> Evaluation:
    """Verify the backbone on pairs of test images, and measure the separability of the class weights, if any.

    Args:
        show: called with texts of the progress.
    """
    nearest_cosine, separability = (None, None) if class_weight is None else separation(class_weight)
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
        progress=show_embedding(show),
    )
    pairs = make_pairs(embedded.labels, options.pairs, options.folds, config.seed)
    features = join_mirror(embedded.features, embedded.mirrored, options.flip)
    result = cosine_pairs(features, pairs.indices, pairs.same, pairs.fold)
    summary = summarize_pairs(result.scores, pairs.same, options.far)
    verified = Verification(pairs, result, summary, embedded.shown)
    return Evaluation(verified, nearest_cosine, separability, embedded.unreadable)


def count_known(names: Iterable[str], trained: Iterable[str] | None) -> int | None:
    """Number of identities with the name of a trained identity; None if those are unknown."""
    return None if trained is None else len(set(names) & set(trained))


def describe_unseen(number: int, known: int | None) -> str:
    """The number of evaluated identities, and how many of them the network may have been trained on."""
    if known is None:
        return f"{counted_identities(number)}; it is unknown whether the network was trained on any of them"
    if known:
        return f"{counted_identities(number)}, {known:,} with the name of a training identity"
    return f"{counted_identities(number)} not trained on"


def separation(class_weight: Tensor) -> tuple[np.ndarray, tuple[float, float]]:
    """Cosine (num_classes,) of each class weight to its nearest other, with mean and deviation (RegularFace's Sep)."""
    cosine = fm.functional.nearest_class(class_weight).cosine.double().cpu().numpy()
    return cosine, (float(cosine.mean()), float(cosine.std()))
