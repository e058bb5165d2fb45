"""Batches with several images of each identity: groups, order, resumption, and division among parts."""

from collections import Counter

import pytest
import torch

from fused_margin.trainer.data.identity_batches import IdentityBatches, split_between_identities

LABELS = torch.tensor([0] * 9 + [1] * 2 + [2] * 4 + [3] + [4] * 7)[torch.randperm(23, generator=torch.Generator())]


def groups_of(batch, size):
    """The batch, cut where a group of `size` images, or of all images of a small identity, is complete."""
    groups, rest = [], list(batch)
    while rest:
        identity = LABELS[rest[0]]
        count = min(size, int((LABELS == identity).sum()))
        groups.append(rest[:count])
        rest = rest[count:]
    return groups


@pytest.mark.parametrize("size", [2, 4])
def test_epochs_have_every_image_in_groups_of_an_identity(size):
    batches = IdentityBatches(LABELS, size, 8, epochs=3, seed=5)
    per_epoch = batches.steps_per_epoch
    assert len(batches) == 3 * per_epoch
    every = list(batches)
    epochs = [every[k * per_epoch : (k + 1) * per_epoch] for k in range(3)]
    for epoch in epochs:
        assert all(0 < len(batch) <= 8 for batch in epoch)
        groups = [group for batch in epoch for group in groups_of(batch, size)]
        assert all(len(set(LABELS[group].tolist())) == 1 and len(set(group)) == len(group) for group in groups)
        count = Counter(index for group in groups for index in group)
        assert count.keys() == set(range(23)) and max(count.values()) <= 2
        assert sum(n == 2 for n in count.values()) == sum(-n % size for n in (9, 4, 7)) + (
            -2 % size if size == 2 else 0
        )
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_step():
    full = list(IdentityBatches(LABELS, 4, 8, epochs=3, seed=5))
    torch.manual_seed(1)  # global random state does not matter
    for step in (1, 4, 7):
        resumed = IdentityBatches(LABELS, 4, 8, epochs=3, seed=5, start_step=step)
        assert list(resumed) == full[step:] and len(resumed) == len(full) - step
    assert list(IdentityBatches(LABELS, 4, 8, epochs=3, seed=6)) != full


def test_parts_have_whole_groups():
    full = list(IdentityBatches(LABELS, 4, 16, epochs=2, seed=5))
    parts = [IdentityBatches(LABELS, 4, 16, epochs=2, seed=5, part=(number, 2)) for number in range(2)]
    for batch, *divided in zip(full, *parts, strict=True):
        assert divided[0] + divided[1] == batch
        assert [group for part in divided for group in groups_of(part, 4)] == groups_of(batch, 4)


@pytest.mark.parametrize(
    ("labels", "parts", "sizes"),
    [
        ([3, 3, 3, 1, 1, 1, 2, 2], 2, [3, 5]),
        ([3, 3, 3, 3, 3, 1, 1, 2], 2, [5, 3]),
        ([0, 0, 1, 1, 2, 2], 3, [2, 2, 2]),
        ([0, 0, 0, 0], 3, [0, 4, 0]),
        ([], 2, [0, 0]),
    ],
)
def test_split_between_identities(labels, parts, sizes):
    assert split_between_identities(torch.tensor(labels, dtype=torch.int64), parts) == sizes
