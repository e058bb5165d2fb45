"""Protocols against cases computed by hand, plain loops, and properties that hold for any features."""

import math

import numpy as np
import pytest
import torch
from labeled_pairs import pairs_of

from fused_margin.evaluation import megaface
from fused_margin.evaluation.protocols import cosine_pairs, join_mirror, lfw, ytf

VARIANTS = ("insightface", "regularface")


def people(identities, images, size, noise, seed=0):
    """Features (identities * images, size) near one center per identity, features of mirrored images, and labels."""
    rng = np.random.default_rng(seed)
    center = np.repeat(rng.normal(size=(identities, size)) + 0.5, images, axis=0)
    features, mirrored = (center + noise * rng.normal(size=center.shape) for _ in range(2))
    return features, mirrored, np.repeat(np.arange(identities), images)


def rotated(features, seed=5):
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(features.shape[1],) * 2))
    return features @ rotation


def test_insightface_lfw_by_hand():
    # Sums of image and mirror image: image 0 is along x, the others have cosines 12/13, 15/17, 8/17, 5/13 and 0 to
    # it, so that squared distances are 2/13, 4/17, 18/17, 16/13 and 2.
    joined = np.array([[5, 0], [24, 10], [15, 8], [8, 15], [5, 12], [0, 3]], float)
    mirrored = np.array([[2, -1], [30, 3], [0, 9], [1, 1], [-7, 2], [4, 4]], float)
    pairs = np.array([[0, 1], [0, 3], [0, 4], [0, 5], [0, 1], [0, 4], [0, 2], [0, 3]])
    same = np.array([True, True, False, False, True, True, False, False])
    fold = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    result = lfw(joined - mirrored, mirrored, pairs, same, fold)
    # Fold 1 is best from 0.16 on (3 of 4 right), fold 0 from 1.06 on (all right).
    np.testing.assert_allclose(result.folds.threshold, [0.16, 1.06])
    np.testing.assert_array_equal(result.folds.accuracy, [3 / 4, 1 / 4])
    assert result.folds.accuracy.std() == 0.25
    np.testing.assert_allclose(result.scores[:4], [12 / 13, 8 / 17, 5 / 13, 0], atol=1e-15)
    # FAR goes from 0 to 1/2 between 0.235 and 0.236 on fold 1, between 1.230 and 1.231 on fold 0;
    # 1e-3 is 1/500 of this step.
    np.testing.assert_allclose(result.tar.threshold, [0.235002, 1.230002], rtol=1e-9)
    np.testing.assert_array_equal(result.tar.tar, [1 / 2, 1 / 2])
    np.testing.assert_array_equal(result.tar.far, [0, 1])
    assert not result.tar.resolved  # two impostors cannot resolve 1e-3


def test_regularface_lfw_by_hand():
    # Minus (1, 1), the mean of fold 1: (1, 0) and (3, 0), cosine 1; (0, 3) and (0, -2), cosine -1.
    first = [[2, 1], [4, 1], [1, 4], [1, -1]]
    # Minus (2, 5/4), the mean of fold 0: (3, 4) and (4, 3), cosine 24/25; (-8, -6) and (-3, -2), 36 / sqrt(1300).
    second = [[5, 5.25], [6, 4.25], [-6, -4.75], [-1, -0.75]]
    joined = np.array(first + second)
    result = lfw(
        joined[:, :1],
        joined[:, 1:],
        np.arange(8).reshape(4, 2),
        np.array([True, False, True, False]),
        np.array([0, 0, 1, 1]),
        "regularface",
    )
    np.testing.assert_allclose(result.scores, [1, -1, 24 / 25, 36 / math.sqrt(1300)])
    np.testing.assert_array_equal(result.folds.accuracy, [1, 1 / 2])
    # Fold 1 minus its own mean: genuine 0.97150, impostor 0.99951. One of the two is correct at the steps from
    # -1 to 0.9714 or 0.9715 and from 0.9996 to 1. Fold 0 minus its own mean: all correct from -0.7200 to 0.1240.
    assert result.folds.threshold[0] == pytest.approx(-0.0140, abs=1e-4)
    assert result.folds.threshold[1] == pytest.approx((-0.72 + 0.124) / 2, abs=1e-4)
    assert result.tar is None


def test_ytf_by_hand():
    # Means of the frames: video 2 (3, 4), video 5 (1, 0), video 0 (0, 2), video 9 (-1, 0).
    features = np.array([[6, 0], [1, 0], [0, 8], [0, 1], [0, 3], [-1, 0], [1, 0]], np.float32)
    video = np.array([2, 5, 2, 0, 0, 9, 5])
    pairs = np.array([[2, 5], [0, 9], [0, 2], [5, 9]])
    result = ytf(features, video, pairs, np.array([True, False, True, False]), np.array([0, 0, 1, 1]))
    np.testing.assert_allclose(result.scores, [0.6, 0, 0.8, -1], atol=1e-7)
    # The threshold of fold 0 is halfway from 0.8 to -1 and accepts an impostor, that of fold 1 halfway from 0.6 to 0.
    np.testing.assert_allclose(result.folds.threshold, [-0.1, 0.3], atol=1e-7)
    np.testing.assert_array_equal(result.folds.accuracy, [1 / 2, 1])


def test_megaface_by_hand():
    probes = np.array([[1, 0], [3, 4], [-1, 0], [-2, 0], [0, -1]], float)
    identity = np.array([7, 7, 3, 3, 5])
    distractors = np.array([[0, 1], [5, 12], [4, 3]], float)
    # Genuine: 0.6 (identity 7), 1 (identity 3). Best distractor of the first two probes: of one distractor 0 and 0.8,
    # of two 5/13 and 63/65, of three 0.8 and 63/65; for identity 3 none is above 0.
    result = megaface(probes, identity, distractors, sizes=[1, 2, 3], far=0)
    np.testing.assert_array_equal(result.sizes, [1, 2, 3])
    np.testing.assert_array_equal(result.rank1, [3 / 4, 3 / 4, 2 / 4])
    np.testing.assert_allclose(np.sort(result.genuine), [0.6, 1])
    np.testing.assert_array_equal(result.nearest, [2, 1, 0, 0, 2])
    np.testing.assert_allclose(result.nearest_cosine, [0.8, 63 / 65, 0, 0, -0.6], atol=1e-12)
    # The highest of the 15 impostor scores: 63/65, 24/25, 0.8, 0.8, 5/13.
    assert result.tar.tar == 0.5 and result.tar.threshold == pytest.approx(63 / 65)
    assert result.tar.smallest_far == 1 / 15 and not result.tar.resolved
    two = megaface(probes, identity, distractors, far=2 / 15).tar
    assert two.tar == 0.5 and two.threshold == pytest.approx(0.8) and two.resolved
    four = megaface(probes, identity, distractors, far=4 / 15).tar
    assert four.tar == 1 and four.threshold == pytest.approx(5 / 13)


def test_distractor_tied_with_the_mate_is_a_miss():
    axes = np.eye(3)
    result = megaface(axes[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), axes[[2, 0]], sizes=[1, 2])
    np.testing.assert_array_equal(result.rank1, [1, 1 / 2])


def test_megaface_matches_plain_loop_for_any_block_size():
    features, _, labels = people(12, 5, 8, 0.9)
    distractors = np.random.default_rng(2).normal(size=(150, 8))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    others = distractors / np.linalg.norm(distractors, axis=1, keepdims=True)
    hits, searches = dict.fromkeys((10, 70, 150), 0), 0
    for i in range(60):
        for j in range(60):
            if i != j and labels[i] == labels[j]:
                searches += 1
                for size in hits:
                    hits[size] += all(unit[i] @ unit[j] > unit[i] @ other for other in others[:size])
    genuine = [unit[i] @ unit[j] for i in range(60) for j in range(i) if labels[i] == labels[j]]
    impostor = sorted((mine @ other for mine in unit for other in others), reverse=True)
    allowed = 45  # 0.005 of 60 * 150
    expected = np.mean([score > impostor[allowed] for score in genuine])
    assert 0 < expected < 1
    for block in (1, 60 * 7, 2**24):
        result = megaface(features, labels, distractors, [10, 70, 150], far=0.005, block_scores=block)
        np.testing.assert_allclose(result.rank1, [n / searches for n in hits.values()])
        assert result.tar.tar == expected and result.tar.threshold == pytest.approx(impostor[allowed])
        np.testing.assert_allclose(np.sort(result.genuine), np.sort(genuine))
        edges = np.linspace(-1, 1, len(result.impostor) + 1)
        assert np.abs(result.impostor_count - np.histogram(impostor, edges)[0]).sum() <= 4  # at a boundary
        assert result.impostor_count.sum() == len(impostor)
        np.testing.assert_array_equal(result.nearest, (unit @ others.T).argmax(axis=1))
        np.testing.assert_allclose(result.nearest_cosine, (unit @ others.T).max(axis=1))
        assert np.diff(result.impostor) == pytest.approx(np.diff(edges)[0])
    # float32 products may change the order of near ties only.
    single = megaface(features.astype(np.float32), labels, distractors.astype(np.float32), [10, 70, 150], far=0.005)
    np.testing.assert_allclose(single.rank1, result.rank1, atol=2 / searches)
    assert single.tar.threshold == pytest.approx(impostor[allowed], abs=1e-6)


def test_megaface_sizes_are_powers_of_ten():
    probes, identity = np.eye(2)[[0, 0]], np.array([4, 4])
    rng = np.random.default_rng(0)
    for count, sizes in ((1, [1]), (10, [10]), (11, [10, 11]), (1000, [10, 100, 1000])):
        np.testing.assert_array_equal(megaface(probes, identity, rng.normal(size=(count, 2))).sizes, sizes)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_megaface_on_a_gpu():
    features, _, labels = people(30, 4, 32, 0.7)
    distractors = np.random.default_rng(2).normal(size=(5000, 32))
    host, device = (
        megaface(features, labels, distractors, far=1e-3, device=d, block_scores=2**16) for d in ("cpu", "cuda")
    )
    np.testing.assert_array_equal(host.rank1, device.rank1)
    assert host.tar.tar == device.tar.tar and host.impostor_count.sum() == device.impostor_count.sum()


def test_insightface_lfw_matches_plain_loop():
    features, mirrored, labels = people(40, 4, 16, 1.4)
    pairs, same = pairs_of(labels, 200)
    result = lfw(features, mirrored, pairs, same)
    rows = features + mirrored
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    distance = [sum((rows[a] - rows[b]) ** 2) for a, b in pairs]
    np.testing.assert_allclose(1 - np.array(distance) / 2, result.scores, atol=1e-12)
    for number in range(10):
        part = range(20 * number, 20 * number + 20)
        rest = [i for i in range(200) if i not in part]
        best, best_right = 0.0, -1
        for step in range(400):
            right = sum((distance[i] < step * 0.01) == same[i] for i in rest)
            if right > best_right:
                best, best_right = step * 0.01, right
        assert result.folds.threshold[number] == pytest.approx(best)
        assert result.folds.accuracy[number] == np.mean([(distance[i] < best) == same[i] for i in part])
        impostor = [distance[i] for i in rest if not same[i]]
        step = next(s for s in range(4000) if np.mean([d < s * 0.001 for d in impostor]) > 1e-3)
        above = np.mean([d < step * 0.001 for d in impostor])
        limit = (step - 1 + 1e-3 / above) * 0.001
        assert result.tar.threshold[number] == pytest.approx(limit)
        assert result.tar.tar[number] == np.mean([distance[i] < limit for i in part if same[i]])
        assert result.tar.far[number] == np.mean([distance[i] < limit for i in part if not same[i]])
    assert 0.6 < result.folds.accuracy.mean() < 1


def test_regularface_lfw_matches_plain_loop():
    features, mirrored, labels = people(20, 4, 4, 1.0)
    pairs, same = pairs_of(labels, 60)
    fold = np.arange(60) % 3  # arbitrary folds, not only consecutive ones
    result = lfw(features, mirrored, pairs, same, fold, "regularface")
    rows = np.hstack([features, mirrored])
    for number in range(3):
        rest = np.flatnonzero(fold != number)
        mean = sum(rows[a] + rows[b] for a, b in pairs[rest]) / (2 * len(rest))
        centerd = [row - mean for row in rows]
        cosine = np.array(
            [centerd[a] @ centerd[b] / np.linalg.norm(centerd[a]) / np.linalg.norm(centerd[b]) for a, b in pairs]
        )
        grid = np.arange(-10_000, 10_001) / 10_000
        genuine, impostor = cosine[rest][same[rest]], cosine[rest][~same[rest]]
        right = (genuine > grid[:, None]).sum(axis=1) + (impostor < grid[:, None]).sum(axis=1)
        best = right.max()
        threshold = np.mean([t for t, r in zip(grid, right, strict=True) if r == best])
        assert result.folds.threshold[number] == pytest.approx(threshold)
        part = fold == number
        assert result.folds.accuracy[number] == np.mean((cosine[part] > threshold) == same[part])
        np.testing.assert_allclose(result.scores[part], cosine[part], atol=1e-12)
    assert 0.6 < result.folds.accuracy.mean() < 1


@pytest.mark.parametrize("noise", [0.01, 1e4])
def test_perfect_features_and_noise(noise):
    features, mirrored, labels = people(60, 20, 32, noise)
    pairs, same = pairs_of(labels, 6000)
    accuracies = [lfw(features, mirrored, pairs, same, variant=v).folds.accuracy.mean() for v in VARIANTS]
    accuracies.append(cosine_pairs(features, pairs, same).folds.accuracy.mean())
    accuracies.append(ytf(features, np.arange(1200), pairs, same).folds.accuracy.mean())
    # The mate is the nearest of eleven by chance.
    rank1 = megaface(features, labels, np.random.default_rng(0).normal(size=(10, 32))).rank1[0]
    if noise < 1:
        assert accuracies == [1, 1, 1, 1] and rank1 == 1
    else:
        assert accuracies == pytest.approx([0.5] * 4, abs=0.03)
        assert rank1 == pytest.approx(1 / 11, abs=0.03)


def test_rotation_does_not_change_scores():
    features, mirrored, labels = people(40, 5, 16, 0.9)
    pairs, same = pairs_of(labels, 400)
    distractors = np.random.default_rng(3).normal(size=(300, 16))
    video = np.random.default_rng(4).permutation(200) % 100
    clips, clips_same = pairs_of(np.arange(100) % 20, 200)
    for ours, theirs in (
        *((lfw(features, mirrored, pairs, same, variant=v), v) for v in VARIANTS),
        (cosine_pairs(features, pairs, same), "pairs"),
        (ytf(features, video, clips, clips_same), "ytf"),
    ):
        if theirs in VARIANTS:
            again = lfw(rotated(features), rotated(mirrored), pairs, same, variant=theirs)
        elif theirs == "pairs":
            again = cosine_pairs(rotated(features), pairs, same)
        else:
            again = ytf(rotated(features), video, clips, clips_same)
        np.testing.assert_allclose(ours.scores, again.scores, atol=1e-12)
        np.testing.assert_array_equal(ours.folds.accuracy, again.folds.accuracy)
    ours = megaface(features, labels, distractors, far=1e-2)
    again = megaface(rotated(features), labels, rotated(distractors), far=1e-2)
    np.testing.assert_array_equal(ours.rank1, again.rank1)
    assert ours.tar.tar == again.tar.tar


def test_cosine_protocols_ignore_feature_norms():
    features, _, labels = people(20, 5, 8, 0.9)
    pairs, same = pairs_of(labels, 100)
    longer = features * np.random.default_rng(0).uniform(0.1, 10, (100, 1))
    np.testing.assert_allclose(cosine_pairs(longer, pairs, same).scores, cosine_pairs(features, pairs, same).scores)
    distractors = np.random.default_rng(3).normal(size=(50, 8))
    np.testing.assert_array_equal(
        megaface(longer, labels, distractors * 9).rank1, megaface(features, labels, distractors).rank1
    )


def test_join_mirror():
    features, mirrored = np.array([[1.0, 2.0]]), np.array([[10.0, 20.0]])
    assert join_mirror(features, None, "none") is features
    np.testing.assert_array_equal(join_mirror(features, mirrored, "sum"), [[11, 22]])
    np.testing.assert_array_equal(join_mirror(features, mirrored, "concat"), [[1, 2, 10, 20]])
    with pytest.raises(ValueError, match="mirrored: expected features of the mirror images to sum, got none"):
        join_mirror(features, None, "sum")
    with pytest.raises(ValueError, match=r"mirrored: expected the features' shape \(1, 2\), got \(1, 1\)"):
        join_mirror(features, mirrored[:, :1], "concat")


def test_half_precision_and_unchanged_torch_settings():
    features, mirrored, labels = people(20, 5, 8, 0.5)
    pairs, same = pairs_of(labels, 100)
    half = lfw(features.astype(np.float16), mirrored.astype(np.float16), pairs, same)
    np.testing.assert_allclose(half.scores, lfw(features, mirrored, pairs, same).scores, atol=5e-3)
    rank1 = megaface(features.astype(np.float16), labels, features[::-1].astype(np.float16)).rank1
    assert np.isfinite(rank1).all() and torch.is_grad_enabled()


GOOD = {
    "features": np.eye(6),
    "mirrored": np.eye(6),
    "pairs": np.array([[i % 6, (i + 1) % 6] for i in range(20)]),
    "same": np.arange(20) % 2 == 0,
    "fold": np.repeat([0, 1], 10),
}
ROW_OF_NAN = np.where(np.arange(6)[:, None] == 3, np.nan, np.eye(6))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("features", ROW_OF_NAN, "features: expected finite values, got NaN or infinity in 1 row$"),
        ("mirrored", ROW_OF_NAN, "mirrored: expected finite values"),
        ("mirrored", np.eye(5), r"mirrored: expected the features' shape \(6, 6\), got \(5, 5\)"),
        ("features", np.empty((0, 6)), r"features: expected \(rows, D\) floats, one row or more, got \(0, 6\)"),
        ("features", np.eye(6, dtype=int), "features: expected .* got .* int64"),
        ("features", np.ones(6), r"features: expected .* got \(6,\)"),
        ("pairs", np.empty((0, 2), int), r"pairs: expected \(rows, 2\) integers, one row or more"),
        ("pairs", np.full((20, 2), 6), "pairs: expected rows 0 to 5, got 6 to 6"),
        ("pairs", np.full((20, 2), -1), "pairs: expected rows 0 to 5, got -1 to -1"),
        ("pairs", np.zeros((20, 2)), r"pairs: expected \(rows, 2\) integers, .* float64"),
        ("same", np.ones(20, int), r"same: expected \(20,\) bool"),
        ("same", np.ones(20, bool), "same: expected genuine and impostor pairs outside fold 0"),
        ("fold", np.zeros(20, int), "fold: expected two folds or more, got 1"),
        ("fold", np.arange(19), r"fold: expected \(20,\) integers"),
    ],
)
def test_invalid_lfw_arrays(variant, name, value, message):
    with pytest.raises(ValueError, match=message):
        lfw(**{**GOOD, name: value}, variant=variant)


def test_other_invalid_arguments():
    arrays = {name: GOOD[name] for name in ("features", "pairs", "same", "fold")}
    with pytest.raises(ValueError, match="variant: expected insightface or regularface, got 'arcface'"):
        lfw(**GOOD, variant="arcface")
    with pytest.raises(ValueError, match="same: expected genuine and impostor pairs in fold 0, got one kind"):
        lfw(**{**GOOD, "fold": np.repeat([0, 1, 2], [1, 9, 10])})
    with pytest.raises(ValueError, match="pairs: expected at least 10, one per fold, got 9"):
        cosine_pairs(GOOD["features"], GOOD["pairs"][:9], GOOD["same"][:9])
    with pytest.raises(ValueError, match="video: expected a frame of every video in pairs, got none of video 5"):
        ytf(**arrays, video=np.array([0, 1, 2, 3, 4, 4]))
    with pytest.raises(ValueError, match=r"video: expected \(6\) integers"):
        ytf(**arrays, video=np.arange(5))
    with pytest.raises(ValueError, match="features: expected finite"):
        ytf(**{**arrays, "features": ROW_OF_NAN}, video=np.arange(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": ROW_OF_NAN}, "probes: expected finite"),
        ({"distractors": ROW_OF_NAN}, "distractors: expected finite"),
        ({"distractors": np.eye(5)}, r"distractors: expected \(rows, 6\) floats"),
        ({"distractors": np.empty((0, 6))}, r"distractors: expected \(rows, 6\) floats, one row or more"),
        ({"identity": np.arange(6)}, "identity: expected an identity with at least two probes, got none"),
        ({"identity": np.zeros(5, int)}, r"identity: expected \(6\) integers"),
        ({"sizes": [0]}, r"sizes: expected galleries of 1 to 6 distractors, got \[0\]"),
        ({"sizes": [7]}, "sizes: expected galleries of 1 to 6"),
        ({"sizes": []}, "sizes: expected galleries of 1 to 6"),
        ({"far": -1e-6}, "far: expected a rate from 0 to 1"),
    ],
)
def test_invalid_megaface_arrays(change, message):
    arguments = {"probes": np.eye(6), "identity": np.zeros(6, int), "distractors": np.eye(6)}
    with pytest.raises(ValueError, match=message):
        megaface(**{**arguments, **change})


def test_unknown_choices():
    features = np.eye(4)
    with pytest.raises(ValueError, match="flip: expected one of 'none', 'sum', 'concat', got 'x'"):
        join_mirror(features, features, "x")
    with pytest.raises(ValueError, match="metric: expected one of 'cosine', 'weighted-l1', got 'x'"):
        ytf(features, np.arange(4), np.array([[0, 1], [2, 3]]), np.array([True, False]), metric="x")
