"""Protocols against cases computed by hand, and what is promised of the pairs."""

import numpy as np
import pytest

from fused_margin.trainer.data import DataError
from fused_margin.trainer.verification import area_under_curve, kfold_accuracy, make_pairs, roc, tar_at_far


def test_kfold_accuracy_by_hand():
    # Fold 0 alone is separated by 0.5; fold 1 alone by 0.8, and its pair of score 0.7 is a different one.
    scores = np.array([0.6, 0.5, 0.4, 0.3, 0.9, 0.8, 0.7, 0.1])
    same = np.array([True, True, False, False, True, True, False, False])
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    result = kfold_accuracy(scores, same, fold)
    np.testing.assert_array_equal(result.threshold, [0.8, 0.5])  # each from the other fold
    np.testing.assert_array_equal(result.accuracy, [0.5, 0.75])


def test_threshold_is_not_chosen_on_the_fold_it_scores():
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 300)
    accuracy = kfold_accuracy(rng.normal(size=600), same, np.repeat(np.arange(10), 60)).accuracy
    assert accuracy.mean() < 0.56  # the best threshold on the fold itself would give more on noise


def test_tar_at_far_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    same = np.array([True, False, True, True, False, False])
    curve = roc(scores, same)
    assert tar_at_far(curve, 0.0) == pytest.approx(1 / 3)  # above 0.8 there is one pair of the three
    assert tar_at_far(curve, 0.3) == pytest.approx(1 / 3)  # one false accept is 1/3 already
    assert tar_at_far(curve, 0.34) == pytest.approx(1.0)
    assert area_under_curve(curve) == pytest.approx(7 / 9)  # 7 of the 9 same-different pairs in order


def test_perfect_and_inverted_scores():
    same = np.array([True] * 10 + [False] * 10)
    fold = np.tile(np.arange(5), 4)
    assert kfold_accuracy(same.astype(float), same, fold).accuracy.mean() == 1
    assert area_under_curve(roc(-same.astype(float), same)) == 0
    assert tar_at_far(roc(-same.astype(float), same), 1e-3) == 0


def test_pairs_of_disjoint_folds():
    labels = np.random.default_rng(1).integers(0, 60, 600)
    pairs = make_pairs(labels, 1000, 10, seed=3)
    first, second = labels[pairs.indices].T
    np.testing.assert_array_equal(first == second, pairs.same)
    assert len(np.unique(pairs.indices, axis=0)) == len(pairs.same) == 1000
    assert (pairs.indices[:, 0] != pairs.indices[:, 1]).all()
    assert pairs.folds_disjoint
    identities = [set(first[pairs.fold == f]) | set(second[pairs.fold == f]) for f in range(10)]
    assert sum(map(len, identities)) == len(set().union(*identities))
    for f in range(10):
        assert pairs.same[pairs.fold == f].sum() == 50 == (~pairs.same[pairs.fold == f]).sum()
    again = make_pairs(labels, 1000, 10, seed=3)
    np.testing.assert_array_equal(pairs.indices, again.indices)
    assert not np.array_equal(pairs.indices, make_pairs(labels, 1000, 10, seed=4).indices)


def test_few_identities_share_folds():
    pairs = make_pairs(np.repeat([0, 1, 2], 30), 400, 10, seed=0)
    assert not pairs.folds_disjoint
    assert len(pairs.same) == 400 and pairs.same.sum() == 200
    assert [pairs.same[pairs.fold == f].sum() for f in range(10)] == [20] * 10


def test_fewer_pairs_than_asked_for_stay_balanced():
    pairs = make_pairs(np.array([0, 0, 0, 1, 1, 1, 2]), 100, 2, seed=0)
    assert pairs.same.sum() == 6 == (~pairs.same).sum()  # two identities of three images: 3 pairs each


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 0, 0], "two identities"), ([0, 1, 2], "two identities"), ([0, 0, 1], "two pairs")]
)
def test_impossible_pairs(labels, message):
    with pytest.raises(DataError, match=message):
        make_pairs(np.array(labels), 10, 2, seed=0)
