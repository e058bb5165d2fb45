"""Metrics against cases computed by hand, and properties of the drawn pairs."""

import numpy as np
import pytest

from fused_margin.evaluation import DataError, make_pairs
from fused_margin.evaluation.folds import unshuffled_folds
from fused_margin.evaluation.metrics import (
    equal_error_rate,
    kfold_accuracy,
    roc,
    summarize_pairs,
    tar_at_far,
)


def test_kfold_accuracy_by_hand():
    # 0.45 separates fold 0; 0.75 separates fold 1, whose pair of score 0.7 is an impostor.
    scores = np.array([0.6, 0.5, 0.4, 0.3, 0.9, 0.8, 0.7, 0.1])
    same = np.array([True, True, False, False, True, True, False, False])
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    result = kfold_accuracy(scores, same, fold)
    np.testing.assert_allclose(result.threshold, [0.75, 0.45])  # each threshold is from the other fold
    np.testing.assert_array_equal(result.accuracy, [0.5, 0.75])


def test_threshold_is_not_chosen_on_the_fold_it_scores():
    rng = np.random.default_rng(0)
    same = np.tile([True, False], 300)
    accuracy = kfold_accuracy(rng.normal(size=600), same, np.repeat(np.arange(10), 60)).accuracy
    assert accuracy.mean() < 0.56  # the best threshold on the fold itself would be better than chance on noise


def test_tar_at_far_by_hand():
    genuine, impostor = np.array([0.9, 0.7, 0.6]), np.array([0.8, 0.5, 0.4])
    none = tar_at_far(genuine, impostor, 0.0)
    assert none.tar == pytest.approx(1 / 3) and none.threshold == 0.8  # one of the three pairs is above 0.8
    assert tar_at_far(genuine, impostor, 0.3).tar == pytest.approx(1 / 3)  # one false accept is 1/3 already
    assert tar_at_far(genuine, impostor, 0.34).tar == 1
    assert tar_at_far(genuine, impostor, 1).threshold == -np.inf
    assert summarize_pairs(np.concatenate([genuine, impostor]), np.arange(6) < 3, 0.3).auc == pytest.approx(7 / 9)


def test_far_below_one_false_accept_is_unresolved():
    impostor = np.linspace(0, 0.5, 1000)
    at = {far: tar_at_far(np.array([0.6, 0.4]), impostor, far) for far in (1e-6, 9e-4, 1e-3)}
    assert [result.resolved for result in at.values()] == [False, False, True]
    assert all(result.smallest_far == 1e-3 for result in at.values())
    assert at[1e-6][1:] == at[9e-4][1:]  # no false accept for both


def test_tied_scores_are_on_the_same_side():
    # Two of four impostors have 0.5: FAR = 1/4 allows one, but only both can pass.
    genuine, impostor = np.array([0.5, 0.5, 0.6]), np.array([0.5, 0.5, 0.1, 0.1])
    assert tar_at_far(genuine, impostor, 0.25).tar == pytest.approx(1 / 3)
    assert tar_at_far(genuine, impostor, 0.5).tar == 1
    # All scores are equal: the curve is a straight line with area 1/2.
    alike = summarize_pairs(np.zeros(8), np.arange(8) < 4, 0.5)
    np.testing.assert_array_equal(alike.roc, [[0, 1], [0, 1]])
    assert alike.auc == 0.5 and alike.equal_error_rate == 0.5 and alike.tar.tar == 0


def test_equal_error_rate_by_hand():
    # With decreasing thresholds, FAR is 0, 0, 1/4, 1/4, ... and FRR 3/4, 1/2, 1/2, 1/4: they are equal at 1/4.
    genuine, impostor = np.array([0.9, 0.8, 0.6, 0.3]), np.array([0.7, 0.5, 0.2, 0.1])
    assert equal_error_rate(roc(genuine, impostor)) == pytest.approx(1 / 4)
    # One of each kind at 0.5: the line from (FAR 0, FRR 1/2) to (1/2, 0) has equal rates at 1/4.
    assert equal_error_rate(roc(np.array([0.9, 0.5]), np.array([0.5, 0.1]))) == pytest.approx(1 / 4)


def test_tar_from_the_highest_impostors_equals_that_from_all():
    rng = np.random.default_rng(0)
    genuine, impostor = rng.normal(1, 1, 300), rng.normal(0, 1, 2000)
    for far in (0.0, 1e-3, 0.29, 0.5):
        passing = [threshold for threshold in genuine if np.mean(impostor >= threshold) <= far]
        best = max((np.mean(genuine >= threshold) for threshold in passing), default=0)
        assert tar_at_far(genuine, impostor, far).tar == best
        highest = np.sort(impostor)[-int(far * 2000 + 1.5) :]
        assert tar_at_far(genuine, highest, far, 2000) == tar_at_far(genuine, impostor, far)
    assert tar_at_far(genuine, np.arange(100.0), 0.29).threshold == 70  # 29 of them are higher


def test_impostor_counts_equal_repeated_pairs():
    genuine, impostor, count = np.array([0.9, 0.4, 0.2]), np.array([0.5, 0.3, 0.1]), np.array([2, 0, 3])
    np.testing.assert_allclose(roc(genuine, impostor, count), roc(genuine, np.repeat(impostor, count)))


def test_perfect_inverted_and_random_scores():
    same = np.array([True] * 10 + [False] * 10)
    fold = np.tile(np.arange(5), 4)
    assert kfold_accuracy(same.astype(float), same, fold).accuracy.mean() == 1
    perfect, inverted = summarize_pairs(same * 1.0, same, 1e-3), summarize_pairs(~same * 1.0, same, 1e-3)
    assert (perfect.auc, perfect.equal_error_rate, perfect.tar.tar) == (1, 0, 1)
    assert (inverted.auc, inverted.equal_error_rate, inverted.tar.tar) == (0, 1, 0)
    noise = summarize_pairs(np.random.default_rng(0).normal(size=20_000), np.arange(20_000) % 2 == 0, 0.1)
    assert noise.auc == pytest.approx(0.5, abs=0.02)
    assert noise.equal_error_rate == pytest.approx(0.5, abs=0.02)
    assert noise.tar.tar == pytest.approx(0.1, abs=0.02)


def test_unshuffled_folds():
    np.testing.assert_array_equal(unshuffled_folds(7, 3), [0, 0, 0, 1, 1, 2, 2])
    with pytest.raises(ValueError, match="pairs: expected at least 10, one per fold, got 9"):
        unshuffled_folds(9)


@pytest.mark.parametrize(
    ("scores", "same", "fold", "message"),
    [
        ([0.1, np.nan, 0.2, 0.3], [1, 0, 1, 0], [0, 0, 1, 1], "scores: expected finite"),
        ([], [], [], r"scores: expected scores \(n,\)"),
        ([0.1, 0.2], [1, 0, 1], [0, 1], r"same: expected \(2,\) bool"),
        ([0.1, 0.2], [1, 0], [0], r"fold: expected \(2,\) integers"),
        ([0.1, 0.2], [1, 0], [3, 3], "fold: expected two folds"),
        ([0.1, 0.2, 0.3], [1, 0, 0], [0, 1, 1], "same: expected genuine and impostor pairs outside fold 0"),
    ],
)
def test_invalid_scores(scores, same, fold, message):
    with pytest.raises(ValueError, match=message):
        kfold_accuracy(np.array(scores, float), np.array(same, bool), np.array(fold, int))


def test_one_kind_of_pair_has_no_roc():
    with pytest.raises(ValueError, match=r"impostor: expected scores \(n,\)"):
        roc(np.array([0.1]), np.array([]))
    with pytest.raises(ValueError, match="genuine: expected finite scores, got 1 that are not"):
        tar_at_far(np.array([np.inf, 1.0]), np.array([0.5]), 0.1)
    with pytest.raises(ValueError, match="far: expected a rate from 0 to 1, got 2"):
        tar_at_far(np.array([1.0]), np.array([0.5]), 2)


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
    assert pairs.same.sum() == 6 == (~pairs.same).sum()  # two identities of three images have 3 pairs each


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 0], "two identities"), ([0, 1, 2], "two identities"), ([0, 0, 1], "two genuine pairs")],
)
def test_impossible_pairs(labels, message):
    with pytest.raises(DataError, match=message):
        make_pairs(np.array(labels), 10, 2, seed=0)


def test_invalid_summaries():
    scores, same = np.linspace(0, 1, 6), np.arange(6) % 2
    with pytest.raises(ValueError, match=r"same: expected \(6,\) bool, one per score, got \(6,\) int64"):
        summarize_pairs(scores, same, 1e-3)
    with pytest.raises(ValueError, match="same: expected"):
        summarize_pairs(scores, same[:4] == 1, 1e-3)
    with pytest.raises(ValueError, match="num_impostors: expected at least the 6 given scores, got 0"):
        tar_at_far(scores, scores, 0.1, 0)
