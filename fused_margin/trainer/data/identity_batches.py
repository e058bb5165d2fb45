"""Batches with several images of each of their identities, for losses that compare the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import TrainingBatches, seeded_generator


class IdentityBatches(TrainingBatches):
    """Batches of P groups with K images of one identity each; P * K is at most the batch size.

    Every epoch divides the images of each identity into new groups, so that it has every image. A last group is filled
    up with other images of its identity; an identity with fewer than K images has one group, without repetition. A batch
    can have several groups of an identity, because there may be fewer identities than groups.

    pytorch-metric-learning's MPerClassSampler draws from NumPy's global random state, so a resumed run would need all
    earlier draws to continue with the same batches, and processes could not agree on them. It also draws images with
    replacement, so that an epoch leaves out some. Here the order depends on (seed, epoch) only, as in `TrainingBatches`.
    """

    def __init__(
        self,
        labels: Tensor,
        images_per_identity: int,
        batch_size: int,
        epochs: int,
        seed: int,
        start_step: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.labels, self.images_per_identity = labels, images_per_identity
        self.counts = torch.bincount(labels)
        self.groups = -(-self.counts // images_per_identity)  # of each identity
        super().__init__(
            int(self.groups.sum()), batch_size // images_per_identity, epochs, seed, start_step=start_step, part=part
        )

    def epoch_batches(self, epoch: int) -> Sequence[Tensor]:
        generator = seeded_generator(self.seed, epoch)
        order = torch.randperm(len(self.labels), generator=generator)
        by_identity = order[self.labels[order].argsort(stable=True)]
        starts, first_group = (values.cumsum(0) - values for values in (self.counts, self.groups))
        identity = torch.repeat_interleave(self.groups)  # of each group
        number = torch.arange(len(identity)) - first_group[identity]  # among the groups of its identity
        position = number.unsqueeze(1) * self.images_per_identity + torch.arange(self.images_per_identity)
        count = self.counts[identity].unsqueeze(1)
        images = by_identity[starts[identity].unsqueeze(1) + position % count]
        images = images.masked_fill((position >= count) & (count < self.images_per_identity), -1)
        images = images[torch.randperm(len(images), generator=generator)]
        return [rows[rows >= 0] for rows in images.tensor_split(self.steps_per_epoch)]

    def own_part(self, indices: Tensor) -> Tensor:
        return indices.split(split_between_identities(self.labels[indices], self.parts))[self.number]


def split_between_identities(labels: Tensor, parts: int) -> list[int]:
    """Sizes of nearly equal parts of labels (N,) that do not divide neighbours of one identity. A part may be empty."""
    changes = (labels.diff() != 0).nonzero().flatten() + 1
    allowed = torch.cat([changes.new_zeros(1), changes, changes.new_tensor([len(labels)])])
    wanted = torch.arange(parts + 1) * len(labels) / parts
    cuts = allowed[(allowed - wanted.unsqueeze(1)).abs().argmin(dim=1)]
    return cuts.diff().tolist()
