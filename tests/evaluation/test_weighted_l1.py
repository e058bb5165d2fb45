"""The learned weighted L1 distance: its weights, agreement with scikit-learn's fit, and no leakage between folds."""

import numpy as np
import pytest
import torch
from labeled_pairs import pairs_of
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.evaluation import kfold_accuracy, weighted_l1
from fused_margin.evaluation.protocols import cosine_pairs, weighted_l1_pairs, ytf
from fused_margin.evaluation.weighted_l1 import REGULARISATION, WeightedL1Head, fit_head

INFORMATIVE = (1, 4)  # dimensions that are equal in all images of an identity


def people(identities=120, images=4, size=8, seed=0):
    """Features of unit norm (n, size) with two informative dimensions and noise in the others, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(identities), images)
    features = rng.normal(size=(len(labels), size))
    features[:, INFORMATIVE] = rng.normal(size=(identities, 2))[labels]
    noise = [dimension for dimension in range(size) if dimension not in INFORMATIVE]
    # Both parts have fixed norms, so that normalization does not change the informative dimensions.
    for part, length in ((INFORMATIVE, 1.0), (noise, 2.0)):
        features[:, part] *= length / np.linalg.norm(features[:, part], axis=1, keepdims=True)
    return features, labels


def test_scores_by_hand():
    head = WeightedL1Head(np.array([2.0, -1.0, 0.5]), 3.0, regularisation=1.0, num_pairs=0)
    features = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 2.0], [1.0, 1.0, 0.0]])
    # |1 - 0| 2 - |0 - 3| 1 + 0 = -1; 0 - 1 + 2 / 2 = 0; 2 - 2 + 2 / 2 = 1.
    np.testing.assert_array_equal(head.scores(features, np.array([[0, 1], [2, 0], [1, 2]])), [4, 3, 2])


def test_informative_dimensions_are_learned_and_beat_the_cosine():
    features, labels = people()
    pairs, same = pairs_of(labels, 600)
    learned, cosine = weighted_l1_pairs(features, pairs, same), cosine_pairs(features, pairs, same)
    assert learned.folds.accuracy.mean() > 0.95
    assert cosine.folds.accuracy.mean() < 0.75
    assert len(learned.heads) == 10
    for head in learned.heads:
        assert head.num_pairs == 540 and head.regularisation in REGULARISATION
        noise = np.abs(np.delete(head.alpha, INFORMATIVE))
        assert head.alpha[list(INFORMATIVE)].min() > 4 * noise.max()  # distant pairs are impostors


def test_distance_of_a_trained_loss():
    """The head has the log odds of the loss, and verifies identities that the loss was not trained on."""
    features, labels = people(60)
    torch.manual_seed(0)
    loss_fn = fm.SiameseL1Loss(features.shape[1])
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.2)
    seen = torch.from_numpy(features[labels < 30]), torch.from_numpy(labels[labels < 30])
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(*seen).backward()
        optimizer.step()
    head = WeightedL1Head.of_loss(loss_fn)
    assert head.alpha.dtype == np.float64 and head.regularisation is None and head.num_pairs is None
    pairs, same = pairs_of(labels, 400)
    unseen = (labels[pairs] >= 30).all(1)
    pairs, same, unit = pairs[unseen], same[unseen], normalize(features)
    scores = head.scores(unit, pairs)
    genuine = int(np.flatnonzero(same)[0])
    two = torch.from_numpy(features[pairs[genuine]])
    expected = F.softplus(torch.tensor(-scores[genuine])) / 2  # half of the loss is that of the genuine pairs
    torch.testing.assert_close(loss_fn(two, torch.tensor([0, 0])).detach(), expected)
    assert kfold_accuracy(scores, same, np.arange(len(same)) % 5).accuracy.mean() > 0.9
    assert cosine_pairs(features, pairs, same, np.arange(len(same)) % 5).folds.accuracy.mean() < 0.8


@pytest.mark.parametrize("unit", [True, False])
def test_pairs_by_the_distance_of_a_trained_loss(unit):
    """The folds choose thresholds only; features are scaled to unit length if the loss does."""
    features, labels = people(30)
    features = features * np.random.default_rng(0).uniform(0.5, 2.0, (len(features), 1))
    pairs, same = pairs_of(labels, 200)
    fold = np.random.default_rng(2).permutation(200) % 4
    loss_fn = fm.SiameseL1Loss(features.shape[1], normalize=unit)
    with torch.no_grad():
        loss_fn.alpha.copy_(torch.linspace(-0.5, 3.0, 8))
    given = normalize(features) if unit else features
    alpha, bias = loss_fn.alpha.double().detach().numpy(), 2.0
    scores = np.array([bias - sum(alpha * np.abs(given[i] - given[j])) for i, j in pairs])
    head = WeightedL1Head.of_loss(loss_fn)
    result = weighted_l1_pairs(features, pairs, same, fold, head)
    np.testing.assert_allclose(result.scores, scores, rtol=1e-12)
    expected = kfold_accuracy(scores, same, fold)
    np.testing.assert_array_equal(result.folds.accuracy, expected.accuracy)
    np.testing.assert_allclose(result.folds.threshold, expected.threshold, rtol=1e-12)
    assert result.heads == ()
    frames = np.repeat(features, 2, axis=0)
    videos = ytf(frames, np.arange(len(frames)) // 2, pairs, same, fold, "weighted-l1", head)
    np.testing.assert_allclose(videos.scores, scores, rtol=1e-9)


def test_distance_of_other_features_is_refused():
    features, labels = people(30)
    pairs, same = pairs_of(labels, 40)
    head = WeightedL1Head(np.ones(5), 0.0)
    with pytest.raises(ValueError, match="head: expected 8 weights, one per dimension of features, got 5"):
        weighted_l1_pairs(features, pairs, same, head=head)
    with pytest.raises(ValueError, match="head: only with the metric weighted-l1"):
        ytf(features, np.arange(len(features)), pairs, same, head=head)


def test_sign_is_learned():
    """In one dimension, images of an identity have opposite signs, and those of two identities random signs."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3))
    features[1::2, 2] = -features[::2, 2]
    pairs = np.concatenate([np.arange(400).reshape(200, 2), rng.permutation(400).reshape(200, 2)])
    same, fold = np.arange(400) < 200, np.arange(400) % 5
    head = fit_head(features, pairs, same, fold)
    assert head.alpha[2] < 0 and np.argmax(np.abs(head.alpha)) == 2


def test_fit_is_logistic_regression_on_standardized_differences():
    features, labels = people(identities=30)
    pairs, same = pairs_of(labels, 120)
    fold = np.arange(120) % 4
    head = fit_head(features, pairs, same, fold)
    differences = np.abs(features[pairs[:, 0]] - features[pairs[:, 1]])
    standard = (differences - differences.mean(axis=0)) / differences.std(axis=0)
    plain = LogisticRegression(C=head.regularisation, max_iter=1000).fit(standard, same)
    np.testing.assert_allclose(head.scores(features, pairs), plain.decision_function(standard), rtol=1e-9)
    np.testing.assert_allclose(head.alpha, -plain.coef_[0] / differences.std(axis=0), rtol=1e-9)


def test_each_fold_is_scored_only_by_the_others():
    features, labels = people(identities=40)
    pairs, same = pairs_of(labels, 200)
    fold = np.random.default_rng(2).permutation(200) % 3
    before = weighted_l1_pairs(features, pairs, same, fold)
    for number in range(3):
        part, other = fold == number, same.copy()
        other[part] = np.random.default_rng(number).permutation(same[part])
        assert (other != same).any()
        after = weighted_l1_pairs(features, pairs, other, fold)
        np.testing.assert_array_equal(after.scores[part], before.scores[part])
        assert after.folds.threshold[number] == before.folds.threshold[number]
        assert after.folds.accuracy[number] == np.mean(
            (before.scores[part] >= before.folds.threshold[number]) == other[part]
        )
        assert (after.scores[~part] != before.scores[~part]).any()


def test_noise_gives_chance_accuracy():
    features = np.random.default_rng(0).normal(size=(400, 16))
    pairs = np.random.default_rng(1).permutation(400).reshape(200, 2)
    pairs = np.concatenate([pairs, np.random.default_rng(2).permutation(400).reshape(200, 2)])
    accuracy = weighted_l1_pairs(features, pairs, np.arange(400) % 2 == 0).folds.accuracy
    assert accuracy.mean() == pytest.approx(0.5, abs=0.08)  # some dimension would separate the training pairs


def test_scores_ignore_feature_norms():
    features, labels = people(identities=30)
    pairs, same = pairs_of(labels, 100)
    longer = features * np.random.default_rng(0).uniform(0.1, 10, (len(features), 1))
    fold = np.random.default_rng(2).permutation(100) % 4
    ours, theirs = (weighted_l1_pairs(given, pairs, same, fold) for given in (features, longer))
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-6)


def test_scoring_in_blocks_and_fit_on_a_subset(monkeypatch):
    features, labels = people(identities=60)
    pairs, same = pairs_of(labels, 600)
    fold = np.arange(600) % 3
    full = weighted_l1_pairs(features, pairs, same, fold)
    shapes = []
    differences = weighted_l1._differences
    monkeypatch.setattr(weighted_l1, "_differences", lambda *given: shapes.append(len(given[1])) or differences(*given))
    monkeypatch.setattr(weighted_l1, "BLOCK_VALUES", 8 * 50)
    blocks = weighted_l1_pairs(features, pairs, same, fold)
    np.testing.assert_allclose(blocks.scores, full.scores, rtol=1e-12)
    assert shapes.count(400) == 3 and max(n for n in shapes if n != 400) <= 50  # three fits on all pairs of other folds

    few = fit_head(features, pairs, same, fold, max_pairs=200)
    assert few.num_pairs == 200 and few.alpha.tolist() != fit_head(features, pairs, same, fold).alpha.tolist()
    again = fit_head(features, pairs, same, fold, max_pairs=200)
    np.testing.assert_array_equal(few.alpha, again.alpha)
    assert fit_head(features, pairs, same, fold, max_pairs=200, seed=1).alpha.tolist() != few.alpha.tolist()


def test_folds_with_pairs_of_one_kind():
    """If a fold has pairs of one kind only, the inner folds are drawn again."""
    features, labels = people(identities=30)
    pairs, same = pairs_of(labels, 120)
    order = np.argsort(same, kind="stable")
    result = weighted_l1_pairs(features, pairs[order], same[order], np.repeat(np.arange(6), 20))
    assert result.folds.accuracy.mean() > 0.8


@pytest.mark.slow
def test_learned_metric_on_videos():
    features, labels = people(identities=60, images=4)
    video = np.repeat(np.arange(120), 2)  # two frames each
    means = features.reshape(120, 2, -1).mean(axis=1)
    pairs, same = pairs_of(labels[::2], 100)
    result = ytf(features, video, pairs, same, metric="weighted-l1")
    expected = weighted_l1_pairs(normalize(means), pairs, same)
    np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-6)
    assert result.folds.accuracy.tolist() == expected.folds.accuracy.tolist()


def test_too_few_pairs_of_a_kind():
    pairs, same = np.arange(40).reshape(20, 2), np.arange(20) < 2
    with pytest.raises(ValueError, match="same: expected at least 3 genuine and 3 impostor pairs to fit a head, got 1"):
        weighted_l1_pairs(np.eye(40), pairs, same, np.arange(20) % 2)
    with pytest.raises(ValueError, match="features: expected finite"):
        weighted_l1_pairs(np.full((40, 2), np.nan), pairs, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.ones(8)}, "features: expected"),
        ({"pairs": np.zeros((20, 3), int)}, "pairs: expected"),
        ({"pairs": np.zeros((20, 2))}, "pairs: expected .* float64"),
        ({"same": np.ones(20)}, "same: expected"),
        ({"fold": np.zeros(3, int)}, "fold: expected"),
    ],
)
def test_wrong_arrays(change, message):
    arrays = {
        "features": np.eye(40),
        "pairs": np.arange(40).reshape(20, 2),
        "same": np.arange(20) < 10,
        "fold": np.zeros(20, int),
    }
    with pytest.raises(ValueError, match=message):
        fit_head(**arrays | change)
