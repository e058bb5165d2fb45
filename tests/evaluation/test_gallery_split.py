"""The split of labelled images into gallery and probes, and the threshold that a gallery estimates from itself."""

import math
from collections import Counter

import numpy as np
import pytest

from fused_margin.evaluation import enroll, estimate_threshold, identification, split_gallery

LABELS = np.repeat(np.arange(20), np.arange(1, 21))  # identity i has i + 1 images


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("enrolled", [None, 1, 3])
def test_numbers_of_images(enrolled, seed):
    order = np.random.default_rng(seed).permutation(len(LABELS))
    labels = LABELS[order]
    gallery, probes, is_unknown = split_gallery(labels, unknown=0.37, enrolled=enrolled, seed=seed)
    assert sorted([*gallery, *probes]) == list(range(len(labels)))
    in_gallery, unknown = set(labels[gallery]), set(labels[probes[is_unknown]])
    assert len(unknown) == 7 and not in_gallery & unknown and in_gallery | unknown == set(range(20))
    assert set(labels[probes[~is_unknown]]) == in_gallery - {0}
    for identity, number in Counter(labels[gallery].tolist()).items():
        total = identity + 1
        assert number == max(1, total // 2 if enrolled is None else min(enrolled, total - 1))


def test_choices_depend_on_the_seed():
    splits = [tuple(split_gallery(LABELS, seed=seed).gallery) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    drawn = {tuple(split_gallery([5, 5, 5, 6], enrolled=1, seed=seed).gallery) for seed in range(20)}
    assert drawn == {(0,), (1,), (2,)}  # any image of the only identity with two


def test_one_identity_is_on_each_side():
    for unknown in (1e-9, 0.999):
        for labels in (["a", "a", "b"], ["a", "b", "c", "c"]):
            gallery, probes, is_unknown = split_gallery(labels, unknown)
            assert len(gallery) and is_unknown.any() and not is_unknown.all() and len(probes)


@pytest.mark.parametrize("labels", [LABELS, ["a", "a"]])
def test_no_unknown_identity(labels):
    gallery, probes, is_unknown = split_gallery(labels, unknown=0)
    assert sorted([*gallery, *probes]) == list(range(len(labels))) and not is_unknown.any()
    assert set(np.asarray(labels)[gallery]) == set(labels)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1, 1, 1], {}, "labels: expected two identities or more"),
        ([1, 2, 3], {}, "labels: expected an identity with two images or more"),
        ([1, 1, 2], {"unknown": 1.0}, "unknown: expected a share from 0 to below 1, got 1.0"),
        ([1, 1, 2], {"unknown": -0.1}, "unknown: expected a share from 0"),
        ([1, 1, 2], {"unknown": math.nan}, "unknown: expected a share from 0"),
        ([1, 2, 3], {"unknown": 0}, "labels: expected an identity with two images or more"),
        ([1, 1, 2], {"enrolled": 0}, "enrolled: expected a positive integer, got 0"),
        ([1.5, 1.5], {}, "labels: expected"),
    ],
)
def test_invalid_splits(labels, options, message):
    with pytest.raises(ValueError, match=message):
        split_gallery(labels, **options)


@pytest.mark.parametrize("template", ["mean", "all"])
@pytest.mark.parametrize("fpir", [0.0, 0.01, 0.2, 0.5, 1.0])
def test_threshold_leaves_the_own_identity_out(template, fpir):
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(30), 3))
    features = rng.normal(size=(30, 6))[labels] + 0.5 * rng.normal(size=(90, 6))
    gallery = enroll(features, labels, template)
    found = estimate_threshold(features, labels, gallery, fpir)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    best = np.array(
        [
            max(
                unit[i] @ row
                for row, name in zip(gallery.templates, gallery.identity, strict=True)
                if name != labels[i]
            )
            for i in range(90)
        ]
    )
    best = np.sort(best)[::-1]
    rejected = best[math.floor(fpir * 90)] if fpir < 1 else -np.inf
    # Two images that are nearest to each other tie, and are both rejected. The last bits differ from the search's.
    accepted = np.count_nonzero(best > rejected + 1e-9)
    assert found.measured == accepted / 90 and found.resolved == (fpir >= 1 / 90)
    assert found.threshold == pytest.approx(rejected, abs=1e-12)


def test_images_of_unknown_identities_leave_nothing_out():
    rng = np.random.default_rng(1)
    gallery = enroll(rng.normal(size=(8, 4)), np.arange(8))
    probes, labels = rng.normal(size=(50, 4)), np.full(50, 99)
    expected = identification(probes, labels, gallery).threshold_at_fpir(0.1)
    assert estimate_threshold(probes, labels, gallery, 0.1) == expected


def test_threshold_needs_another_identity():
    features = np.eye(3)
    with pytest.raises(ValueError, match="gallery: expected two identities or more.*choose a threshold"):
        estimate_threshold(features, ["Ann"] * 3, enroll(features, ["Ann"] * 3))
    with pytest.raises(ValueError, match="fpir: expected a rate"):
        estimate_threshold(features, [1, 2, 3], enroll(features, [1, 2, 3]), 2.0)
    with pytest.raises(ValueError, match="labels: expected integers"):
        estimate_threshold(features, ["a", "b", "c"], enroll(features, [1, 2, 3]))
