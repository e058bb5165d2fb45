"""Labelled image sets, their split into training and test identities, and the order of training batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.plurals import counted_identities

from .config import AugmentationConfig

T = TypeVar("T")


class Batch(NamedTuple):
    """The readable images, and `name: reason` of the unreadable ones."""

    images: Tensor  # (N, channels, H, W) uint8
    labels: Tensor  # (N,) int64
    indices: list[int]  # of the N images in their set
    unreadable: tuple[str, ...] = ()


class ImageSet(Dataset[Batch]):
    """Labelled images of a set of identities. Subclasses read a batch by indices."""

    def __init__(self, labels: Tensor, identities: Sequence[str]) -> None:
        self.labels = labels  # (num_images,) int64
        self.identities = list(identities)  # name of each label

    @property
    def num_classes(self) -> int:
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:  # called by DataLoader for a whole batch
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Name of an image, for messages and reports."""
        raise NotImplementedError

    def picture(self, index: int) -> Image.Image:
        """An image to look at.

        Raises:
            DataError, OSError: it cannot be read.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of the identities and their numbers of images."""
        counts = torch.bincount(self.labels, minlength=self.num_classes).tolist()
        text = "\n".join(f"{n} {name}" for n, name in zip(counts, self.identities, strict=True))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class TensorImages(ImageSet):
    """Images in memory."""

    def __init__(self, images: Tensor, labels: Tensor, identities: Sequence[str]) -> None:
        super().__init__(labels, identities)
        self.images = images  # (num_images, channels, H, W) uint8

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.as_tensor(indices)
        return Batch(self.images[index], self.labels[index], indices)

    def name(self, index: int) -> str:
        return f"image {index:,}"

    def picture(self, index: int) -> Image.Image:
        return to_picture(self.images[index])

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, names: Sequence[str], identities: Sequence[int]) -> TensorImages:
        """The images of some `identities`, with labels from 0."""
        rows, labels = rows_of(labels, len(names), identities)
        return cls(images[rows].contiguous(), labels, [names[i] for i in identities])


@dataclass(frozen=True)
class Splits:
    """Training and test sets of disjoint identities."""

    train: ImageSet
    test: ImageSet
    description: str
    test_distortion: AugmentationConfig | None  # applied to test images that are drawn undistorted
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of skipped files, folders or lines by kind

    def fingerprint(self) -> str:
        return f"{self.train.fingerprint()}-{self.test.fingerprint()}"


class TrainingBatches(Sampler[list[int]]):
    """Batches of indices from `start_step` to the last epoch, each epoch in a new random order.

    The order depends on (seed, epoch) only, so a resumed run needs its step only to continue with the same batches. The
    batch sizes of an epoch differ by at most one; there is no small last batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start_step: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.num_images, self.epochs, self.seed = num_images, epochs, seed
        self.start_step = start_step
        self.number, self.parts = part  # this process's part of every batch, and the number of parts
        self.steps_per_epoch = -(-num_images // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start_step

    def __iter__(self) -> Iterator[list[int]]:
        first_epoch, skip = divmod(self.start_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            for indices in self.epoch_batches(epoch)[skip:]:
                yield self.own_part(indices).tolist()
            skip = 0

    def epoch_batches(self, epoch: int) -> Sequence[Tensor]:
        """The indices of each batch of an epoch, over all parts."""
        order = torch.randperm(self.num_images, generator=seeded_generator(self.seed, epoch))
        return order.tensor_split(self.steps_per_epoch)

    def own_part(self, indices: Tensor) -> Tensor:
        """This process's part of a batch."""
        return indices.tensor_split(self.parts)[self.number]


def data_loader(images: ImageSet, batches: Sampler[list[int]], workers: int) -> DataLoader[Batch]:
    """Read `images` in the order of `batches`, in `workers` background processes."""
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
    )


def _unchanged(batch: T) -> T:
    return batch


def _ignore_interrupt(_worker: int) -> None:
    # A terminal sends Ctrl-C to the workers too, but the training process decides when to stop.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def seeded_generator(*entropy: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator seeded by `entropy`. Trailing zeros do not change the stream."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def split_identities(
    source: str, num_identities: int, test_fraction: float, seed: int, eligible: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Training and test identities, ascending. Test identities are `eligible` ones; a fraction of 0 gives none.

    Raises:
        DataError: fewer than two identities remain for training.
    """
    candidates = np.arange(num_identities) if eligible is None else eligible
    # At least two, for impostor pairs.
    num_test = min(max(2, round(test_fraction * num_identities)), len(candidates)) if test_fraction else 0
    test = np.random.default_rng(seed).permutation(candidates)[:num_test]
    train = np.setdiff1d(np.arange(num_identities), test)
    if len(train) < 2:
        raise DataError(
            f"{len(test)} of the {num_identities} identities in {source} are for verification, which "
            "leaves fewer than two for training: lower the test fraction"
        )
    return train.tolist(), sorted(test.tolist())


def split_by_images(source: str, counts: np.ndarray, test_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Training and test identities by `counts` of images (num_identities,). Identities with one image are used for
    training.

    Raises:
        DataError: `source` has too few identities for training and verification.
    """
    paired = np.flatnonzero(counts >= 2)
    if not test_fraction:
        if len(counts) < 2:
            raise DataError(f"{source} has images of one identity; at least two are needed")
        return split_identities(source, len(counts), test_fraction, seed)
    if len(counts) < 4 or len(paired) < 2:
        raise DataError(
            f"{source} has {counted_identities(len(counts))}, {len(paired)} of them with two images or more; "
            "at least two are needed for training and two more with two images for verification "
            "(--test-fraction 0 uses all for training)"
        )
    return split_identities(source, len(counts), test_fraction, seed, eligible=paired)


class Part(NamedTuple):
    """The listed images of some identities."""

    rows: np.ndarray  # (num_images,) positions in the list
    labels: Tensor  # (num_images,) from 0
    identities: list[str]  # name of each label


def split_listed(
    source: str, labels: np.ndarray, names: Sequence[str], test_fraction: float, seed: int
) -> tuple[Part, Part]:
    """Training and test part of images with labels (num_images,) and a name per label, as `split_by_images`."""
    train, test = split_by_images(source, np.bincount(labels, minlength=len(names)), test_fraction, seed)

    def part(identities: list[int]) -> Part:
        rows, new_labels = rows_of(torch.from_numpy(labels), len(names), identities)
        return Part(rows.numpy(), new_labels, [names[i] for i in identities])

    return part(train), part(test)


def rows_of(labels: Tensor, num_identities: int, selected: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of the images (num_images,) of the `selected` identities, and their labels from 0."""
    new_label = torch.full((num_identities,), -1)
    new_label[list(selected)] = torch.arange(len(selected))
    labels = new_label[labels]
    rows = (labels >= 0).nonzero().flatten()
    return rows, labels[rows]


def to_input(images: Tensor) -> Tensor:
    """Pixels (uint8, 0 to 255) as network input, (x - 127.5) / 127.5."""
    return (images.float() - 127.5) / 127.5


def from_input(inputs: Tensor) -> Tensor:
    """The inverse of `to_input`; values out of range are clipped."""
    return (inputs * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_picture(pixels: Tensor) -> Image.Image:
    """Pixels (channels, H, W) uint8, gray or RGB, as an image of Pillow."""
    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).cpu().numpy())


def on_gray(images: Tensor) -> Tensor:
    """Convert white on black (uint8) to white on mid-gray, which is zero in the network input.

    Without batch norm, a non-zero constant background gives nearly equal initial embeddings, which slows down training.
    """
    return 128 + images // 2
