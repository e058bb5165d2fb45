"""What every source of images gives the trainer: labelled sets, read by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..wording import identities
from .augment import AugmentationConfig

UTF16_MARKS = ("\udcff\udcfe", "\udcfe\udcff")  # byte order marks, read as UTF-8 with surrogateescape


class DataError(ValueError):
    """The images given do not allow what was asked."""


class Batch(NamedTuple):
    """Images that could be read, and `name: reason` of those that could not."""

    images: Tensor  # (N, channels, H, W) uint8
    labels: Tensor  # (N,) int64
    unreadable: tuple[str, ...] = ()


class ImageSet(Dataset[Batch]):
    """Labelled images of a set of identities; subclasses read them by a list of indices."""

    def __init__(self, labels: Tensor, identities: Sequence[str]) -> None:
        self.labels = labels  # (num_images,) int64
        self.identities = list(identities)  # name of each label

    @property
    def num_classes(self) -> int:
        return len(self.identities)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:  # the DataLoader's hook for a whole batch
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Digest of the identities and of how many images each has."""
        counts = torch.bincount(self.labels, minlength=self.num_classes).tolist()
        text = "\n".join(f"{n} {name}" for n, name in zip(counts, self.identities, strict=True))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


class TensorImages(ImageSet):
    """Images held in memory."""

    def __init__(self, images: Tensor, labels: Tensor, identities: Sequence[str]) -> None:
        super().__init__(labels, identities)
        self.images = images  # (num_images, channels, H, W) uint8

    def __getitems__(self, indices: list[int]) -> Batch:
        index = torch.as_tensor(indices)
        return Batch(self.images[index], self.labels[index])

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, names: Sequence[str], identities: Sequence[int]) -> TensorImages:
        """The images of some `identities`, which are numbered anew."""
        rows, labels = rows_of(labels, len(names), identities)
        return cls(images[rows].contiguous(), labels, [names[i] for i in identities])


def text_lines(path: Path, newline: str | None = None) -> Iterator[str]:
    """Lines of a UTF-8 text, `newline` as for `open`; other bytes are kept: file names may be in any encoding.

    Raises:
        DataError: it is UTF-16, as some programs of Windows write, or no text.
    """
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as lines:
        for line in lines:
            if "\0" in line or line.startswith(UTF16_MARKS):
                raise DataError(f"{path} is not UTF-8 text: it may be UTF-16; save it as UTF-8")
            yield line


@dataclass(frozen=True)
class Splits:
    """Training and test sets of disjoint identities."""

    train: ImageSet
    test: ImageSet
    description: str
    test_distortion: AugmentationConfig | None  # where distortion is part of what an image is
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of files, folders or lines of each kind

    def fingerprint(self) -> str:
        return f"{self.train.fingerprint()}-{self.test.fingerprint()}"


class TrainingBatches(Sampler[list[int]]):
    """Batches of indices from `start_step` to the last epoch, each epoch in a new random order.

    The order is a function of (seed, epoch) alone, so that a resumed run needs no more than its
    step to see what it would have seen. The batches of an epoch differ by one image at most:
    there is no small last one.
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
        self.number, self.parts = part  # of every batch, the part with this number of so many
        self.steps_per_epoch = -(-num_images // batch_size)

    def __len__(self) -> int:
        return self.epochs * self.steps_per_epoch - self.start_step

    def __iter__(self) -> Iterator[list[int]]:
        first_epoch, skip = divmod(self.start_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.epochs):
            order = torch.randperm(self.num_images, generator=seeded_generator(self.seed, epoch))
            for indices in order.tensor_split(self.steps_per_epoch)[skip:]:
                yield indices.tensor_split(self.parts)[self.number].tolist()
            skip = 0


def data_loader(images: ImageSet, batches: Sampler[list[int]], workers: int) -> DataLoader[Batch]:
    """Read `images` in the order of `batches`, in `workers` background processes."""
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _ignore_interrupt(_worker: int) -> None:
    # A terminal sends Ctrl-C to the workers too; only the trainer decides when to stop.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def seeded_generator(*entropy: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a generator whose stream is a function of `entropy`, unrelated for unequal numbers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def split_identities(
    num_identities: int, test_fraction: float, seed: int, eligible: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Train and test identities, in ascending order; only `eligible` ones go to the test set.

    A fraction of 0 keeps none for the test.
    """
    candidates = np.arange(num_identities) if eligible is None else np.asarray(eligible)
    # Two of each at least: a verification pair of unlike identities, a class and its rival.
    num_test = min(max(2, round(test_fraction * num_identities)), len(candidates)) if test_fraction else 0
    test = np.random.default_rng(seed).permutation(candidates)[:num_test]
    train = np.setdiff1d(np.arange(num_identities), test)
    return train.tolist(), sorted(test.tolist())


def split_by_images(source: str, counts: np.ndarray, test_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Train and test identities by their numbers of images (num_identities,); one image is for training.

    Raises:
        DataError: `source` has too few identities to train and verify on.
    """
    paired = np.flatnonzero(counts >= 2)
    if not test_fraction:
        if len(counts) < 2:
            raise DataError(f"{source} has images of one identity; at least two are needed")
        return split_identities(len(counts), test_fraction, seed)
    if len(counts) < 4 or len(paired) < 2:
        raise DataError(
            f"{source} has {identities(len(counts))}, {len(paired)} of them with two images or more; "
            "at least two are needed to train on and two more with two images to verify on "
            "(--test-fraction 0 trains on all and verifies on none)"
        )
    train, test = split_identities(len(counts), test_fraction, seed, eligible=paired)
    if len(train) < 2:
        raise DataError(
            f"{len(test)} of the {len(counts)} identities in {source} are for verification, which "
            "leaves fewer than two to train on: lower the test fraction"
        )
    return train, test


class Part(NamedTuple):
    """The images of some identities among all that are listed."""

    rows: np.ndarray  # (num_images,) places in the listing
    labels: Tensor  # (num_images,) numbered anew
    identities: list[str]  # name of each label


def split_listed(
    source: str, labels: np.ndarray, names: Sequence[str], test_fraction: float, seed: int
) -> tuple[Part, Part]:
    """Training and test part of images with labels (num_images,) and a name for each label; as `split_by_images`."""
    kept = split_by_images(source, np.bincount(labels, minlength=len(names)), test_fraction, seed)

    def part(identities: list[int]) -> Part:
        rows, new_labels = rows_of(torch.from_numpy(labels), len(names), identities)
        return Part(rows.numpy(), new_labels, [names[i] for i in identities])

    return part(kept[0]), part(kept[1])


def rows_of(labels: Tensor, num_identities: int, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of the images (num_images,) of some identities, and their labels, numbered anew."""
    new_label = torch.full((num_identities,), -1)
    new_label[list(kept)] = torch.arange(len(kept))
    labels = new_label[labels]
    rows = (labels >= 0).nonzero().flatten()
    return rows, labels[rows]


def to_input(images: Tensor) -> Tensor:
    """Pixels (uint8, 0 to 255) to the network's input, (x - 127.5) / 127.5."""
    return (images.float() - 127.5) / 127.5


def on_gray(images: Tensor) -> Tensor:
    """White on black (uint8) to white on mid-gray, which is the input's zero.

    Without batch norm a constant background makes all embeddings start out alike, and the first
    epochs go into undoing it.
    """
    return 128 + images // 2
