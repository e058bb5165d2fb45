"""Rates of identification against published toy examples, cases worked by hand, and plain loops over probes."""

import math

import numpy as np
import pytest

from fused_margin.evaluation import (
    enroll,
    identification,
    identify_by_verification,
    identity_scores,
    search_gallery,
)


def probes_with_scores(scores):
    """Unit-length probes whose cosines to the axes are `scores` (P, T); the last column makes up the length."""
    scores = np.asarray(scores, float)
    return np.column_stack([scores, np.sqrt(1 - (scores**2).sum(axis=1))])


def axes(number):
    return np.eye(number, number + 1)


# The example in the tests of bob.measure (test_error.py, test_cmc), Idiap's library of biometric metrics: per probe the
# scores of other identities and those of its own. Its CMC is 0.5, 0.75, 1. The templates are a, a, b, c, d; scores are
# divided by 10, and -2 fills the one place that the example leaves open.
CMC_SCORES = np.array(
    [
        [0.3, 0.3, 0.7, 1.1, 0.5],  # of b
        [1.4, -2.0, 0.2, -1.3, 0.6],  # of b
        [-0.8, 1.8, 0.8, 0.0, 1.5],  # of a, which has two scores
        [2.0, 1.3, 2.4, 1.6, 0.9],  # of b
    ]
)


@pytest.mark.parametrize("max_rank", [4, None])
def test_published_cmc(max_rank):
    gallery = enroll(axes(5), list("aabcd"), "all")
    result = identification(probes_with_scores(CMC_SCORES / 10), list("bbab"), gallery, max_rank=max_rank)
    assert result.rank.tolist() == [2, 3, 1, 1]
    assert result.cmc.tolist() == [0.5, 0.75, 1, 1]
    assert [result.rank_rate(rank) for rank in (1, 2, 3, 4)] == [0.5, 0.75, 1, 1]
    np.testing.assert_allclose(result.mate_score, [0.07, 0.02, 0.18, 0.24], atol=1e-15)


# The open sets in the same tests (test_open_set_rates): three identities are enrolled, and probes 8 and 9 are of others.
# At a threshold of 0.5, the detection and identification rate is 6/7, since probe 7 is not found. The false alarm rate
# is 0 and, with the score of 10 that probe 9 has in the second set, 1/2.
OPEN_SET_LABELS = [1, 1, 2, 2, 2, 3, 3, 4, 5]
OPEN_SET_SCORES = np.array(
    [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, -0.1], [0, 0, 0], [0, 0, 0]]
)


@pytest.mark.parametrize(("last", "false_alarm_rate"), [(0, 0), (10, 1 / 2)])
def test_published_open_set(last, false_alarm_rate):
    scores = OPEN_SET_SCORES.copy()
    scores[8, 2] = last
    result = identification(probes_with_scores(scores / 20), OPEN_SET_LABELS, enroll(axes(3), [1, 2, 3]))
    assert result.is_mated.tolist() == [True] * 7 + [False] * 2
    assert result.dir(0.5 / 20) == pytest.approx(6 / 7) == 1 - result.fnir(0.5 / 20)
    assert result.fpir(0.5 / 20) == false_alarm_rate
    found = result.dir_at_far(0)  # with a false alarm at a score of 10, no mate is above it
    assert found.dir == pytest.approx(6 / 7 if last == 0 else 0)
    assert result.dir_at_far(0.5).dir == pytest.approx(6 / 7)


def test_open_set_by_hand():
    # Mates: rank 1 at 0.9, rank 2 at 0.5 (behind 0.6), rank 1 at 0.3. Best of non-mated probes: 0.7, 0.4, 0.4, 0.2.
    scores = [[0.9, 0.1], [0.6, 0.5], [0.1, 0.3], [0.7, 0.0], [0.1, 0.4], [0.1, 0.4], [0.0, 0.2]]
    result = identification(probes_with_scores(scores), list("abbxyxz"), enroll(axes(2), list("ab")))
    assert result.rank.tolist() == [1, 2, 1, 0, 0, 0, 0]
    assert result.names[result.best].tolist() == list("aababbb")
    np.testing.assert_allclose(result.best_score, [0.9, 0.6, 0.3, 0.7, 0.4, 0.4, 0.2], atol=1e-15)
    assert np.isnan(result.mate_score[3:]).all() and result.mate[3:].tolist() == [-1] * 4
    rates = {  # threshold: FPIR, FNIR at rank 1, FNIR at rank 2
        0.15: (1, 1 / 3, 0),
        0.25: (3 / 4, 1 / 3, 0),
        0.35: (3 / 4, 2 / 3, 1 / 3),
        0.45: (1 / 4, 2 / 3, 1 / 3),
        0.65: (1 / 4, 2 / 3, 2 / 3),
        0.8: (0, 2 / 3, 2 / 3),
        0.95: (0, 1, 1),
    }
    for threshold, (fpir, first, second) in rates.items():
        assert result.fpir(threshold) == pytest.approx(fpir)
        assert result.fnir(threshold) == pytest.approx(first)
        assert result.fnir(threshold, rank=2) == result.fnir(threshold, rank=None) == pytest.approx(second)
    # Two of the non-mated probes tie at 0.4: a quarter passes alone, a half cannot.
    for wanted, measured, above in ((0, 0, 0.7), (0.25, 0.25, 0.4), (0.5, 0.25, 0.4), (0.75, 0.75, 0.2)):
        at = result.threshold_at_fpir(wanted)
        assert at.measured == measured and at.smallest_fpir == 0.25 and at.resolved == (wanted >= 0.25)
        assert at.threshold == pytest.approx(above, abs=1e-15) and result.fpir(at.threshold) == measured
        assert result.fpir(np.nextafter(at.threshold, -1)) > wanted  # the smallest
    assert result.threshold_at_fpir(1).threshold == -math.inf
    assert [result.dir_at_far(far, rank=2).dir for far in (0, 0.25, 1)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert not result.dir_at_far(0.2).resolved and result.dir_at_far(0.25).resolved


def random_result(seed, max_rank):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 12, 90)
    features = rng.normal(size=(12, 5))[label] + 0.7 * rng.normal(size=(90, 5))
    is_enrolled = (label < 8) & (rng.random(90) < 0.5)
    is_enrolled[:8] |= label[:8] < 8
    gallery = enroll(features[is_enrolled].round(1), label[is_enrolled], ["mean", "all"][seed % 2])
    probes, probe_label = features[~is_enrolled].round(1), label[~is_enrolled]
    return gallery, probes, probe_label, identification(probes, probe_label, gallery, max_rank=max_rank)


def candidates(gallery, probe):
    """(score, name) of all identities, the best first, by one dot product per template."""
    best = {}
    for row, index in zip(gallery.templates, gallery.identity, strict=True):
        name = int(gallery.names[index])
        best[name] = max(best.get(name, -2), float(np.dot(probe, row) / np.linalg.norm(probe) / np.linalg.norm(row)))
    return sorted(((score, name) for name, score in best.items()), key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_rank", [3, None])
def test_rates_by_loops(seed, max_rank):
    gallery, probes, labels, result = random_result(seed, max_rank)
    lists = [candidates(gallery, probe) for probe in probes]
    names = set(gallery.names.tolist())
    mated = [(row, label) for row, label in zip(lists, labels.tolist(), strict=True) if label in names]
    others = [row for row, label in zip(lists, labels.tolist(), strict=True) if label not in names]
    assert len(mated) > 10 and len(others) > 10
    place = [[name for _, name in row].index(label) + 1 for row, label in mated]
    limit = max_rank or len(names)
    assert result.max_rank == limit
    assert result.rank[result.is_mated].tolist() == [min(rank, limit + 1) for rank in place]
    assert result.cmc.tolist() == [np.mean([rank <= k for rank in place]) for k in range(1, limit + 1)]
    own = [score for row, label in mated for score, name in row if name == label]
    np.testing.assert_allclose(result.mate_score[result.is_mated], own, rtol=1e-14)

    def rates(threshold, rank):
        hits = [label in [name for score, name in row[:rank] if score >= threshold] for row, label in mated]
        alarms = [any(score >= threshold for score, _ in row) for row in others]
        return sum(alarms) / len(alarms), 1 - sum(hits) / len(hits)

    for rank in (1, 3, None):
        curve = result.operating_curve(rank)
        assert math.isinf(curve.threshold[0]) and (np.diff(curve.threshold) < 0).all()
        for threshold, fpir, fnir in zip(*curve, strict=True):
            between = threshold - 1e-12  # the loops' rounding errors are smaller
            assert rates(between, rank or len(names)) == pytest.approx((fpir, fnir))
            assert (result.fpir(threshold), result.fnir(threshold, rank)) == pytest.approx((fpir, fnir))
        assert curve.fpir[-1] == 1 or curve.fnir[-1] == pytest.approx(1 - result.dir(-math.inf, rank))
        few = result.operating_curve(rank, max_points=5)
        assert len(few.threshold) == 5
        chosen = np.searchsorted(-curve.threshold, -few.threshold)
        assert chosen[0] == 0 and chosen[-1] == len(curve.threshold) - 1
        for given, all_points in zip(few, curve, strict=True):
            np.testing.assert_array_equal(given, all_points[chosen])
    wanted = {*np.linspace(0, 1, 7), 1 / len(others), 0.29}
    for far in wanted:
        at = result.threshold_at_fpir(far)
        assert at.measured == result.fpir(at.threshold) <= far
        assert at.threshold == -math.inf or result.fpir(np.nextafter(at.threshold, -1)) > far
        found = result.dir_at_far(far)
        points = [1 - fnir for _, fpir, fnir in zip(*result.operating_curve(), strict=True) if fpir <= far]
        assert found.dir == pytest.approx(max(points))


def test_ranks_of_ties():
    # b and c have one template; their images find b first. Rank 2 for c, however it is found.
    gallery = enroll(np.array([[0.0, 1.0], [0.6, 0.8], [0.6, 0.8]], np.float32), list("abc"))
    probes = np.array([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]], np.float32)
    for max_rank in (2, 3, None):
        result = identification(probes, list("bcb"), gallery, max_rank=max_rank)
        assert result.rank.tolist() == [1, 2, 2] and result.best.tolist() == [1, 1, 0]


def test_ranks_beyond_the_search(monkeypatch):
    monkeypatch.setattr(identity_scores, "PROBES", 16)
    rng = np.random.default_rng(0)
    gallery = enroll(rng.normal(size=(100, 4)).astype(np.float32), np.arange(100))
    probes, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 110, 50)
    whole = identification(probes, labels, gallery, max_rank=None, workspace_mb=0.01)
    listed = search_gallery(probes, gallery, 100).identity
    for row, label, rank in zip(listed.tolist(), labels, whole.rank, strict=True):
        assert rank == (row.index(label) + 1 if label < 100 else 0)
    for max_rank in (20, 50):
        part = identification(probes, labels, gallery, max_rank=max_rank)
        np.testing.assert_array_equal(part.rank, np.minimum(whole.rank, max_rank + 1))
        np.testing.assert_array_equal(part.cmc, whole.cmc[:max_rank])
        np.testing.assert_array_equal(part.mate_score, whole.mate_score)


def test_max_rank_is_at_most_the_gallery():
    result = identification(axes(2), ["a", "b"], enroll(axes(2), ["a", "b"]))
    assert result.max_rank == 2 and result.cmc.tolist() == [1, 1]


def test_all_mated_or_none():
    gallery = enroll(axes(2), ["a", "b"])
    mated = identification(axes(2), ["a", "b"], gallery)
    assert mated.cmc.tolist() == [1, 1] and mated.fnir(0.5) == 0
    for call in (
        lambda: mated.fpir(0.5), lambda: mated.threshold_at_fpir(0.1), lambda: mated.dir_at_far(0.1),
        mated.operating_curve,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^labels: expected a probe of an identity outside the gallery, got none"):
            call()
    none = identification(axes(2), ["x", "y"], gallery)
    assert none.fpir(0.5) == 1 and none.threshold_at_fpir(0).threshold == np.nextafter(1, 2)
    for call in (
        lambda: none.cmc, lambda: none.rank_rate(1), lambda: none.dir(0.5), lambda: none.fnir(0.5),
        lambda: none.dir_at_far(0.1), none.operating_curve,
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^labels: expected a probe of an identity in the gallery, got none"):
            call()


def test_progress(monkeypatch):
    monkeypatch.setattr(identity_scores, "PROBES", 2)
    gallery, calls = enroll(axes(3), [0, 1, 2]), []
    probes, labels = axes(3)[[0, 1, 2, 0, 1]], [0, 1, 2, 5, 1]
    identification(probes, labels, gallery, progress=lambda *call: calls.append(call))
    identification(probes, labels, gallery, max_rank=None, progress=lambda *call: calls.append(call))
    identify_by_verification(probes, labels, gallery, 0.5, progress=lambda *call: calls.append(call))
    assert calls == [(5, 5), (5, 9), (7, 9), (9, 9), (2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("template", ["mean", "all"])
@pytest.mark.parametrize("workspace_mb", [256, 1e-3])
def test_identification_by_verification(template, workspace_mb, monkeypatch):
    monkeypatch.setattr(identity_scores, "PROBES", 16)
    gallery, probes, labels, _ = random_result(template == "all", 3)
    lists = [candidates(gallery, probe) for probe in probes]
    enrolled = set(gallery.names.tolist())
    for threshold in (-1, 0.5, 0.8, 1.5):
        result = identify_by_verification(probes, labels, gallery, threshold, workspace_mb=workspace_mb)
        count = dict.fromkeys(["correct", "ambiguous", "wrong", "none", "one", "several", "nobody"], 0)
        false_matches = 0
        for row, label in zip(lists, labels.tolist(), strict=True):
            names = {name for score, name in row if score >= threshold}
            false_matches += len(names - {label})
            if label not in enrolled:
                count["nobody" if not names else "one" if len(names) == 1 else "several"] += 1
            elif label in names:
                count["correct" if len(names) == 1 else "ambiguous"] += 1
            else:
                count["wrong" if names else "none"] += 1
        mated = np.count_nonzero(result.is_mated)
        shares = [result.correct, result.ambiguous, result.wrong, result.none]
        shares += [result.non_mated_one, result.non_mated_several, result.non_mated_none]
        totals = [mated] * 4 + [len(labels) - mated] * 3
        assert shares == [n / total for n, total in zip(count.values(), totals, strict=True)]
        assert result.false_match_rate == false_matches / (len(labels) * len(enrolled) - mated)


def test_threshold_means_the_same_to_search_and_verification():
    # At the score of a probe's best candidate it is accepted, and just above it is not, whatever the sums' order.
    gallery, probes, labels, result = random_result(1, 3)
    for row, score in enumerate(result.best_score):
        at, above = (
            identify_by_verification(probes[row : row + 1], labels[row : row + 1], gallery, threshold)
            for threshold in (score, np.nextafter(score, 2))
        )
        assert at.accepted.item() >= 1 and above.accepted.item() == 0


def test_verification_all_mated_or_none():
    gallery = enroll(axes(1), ["a"])
    mated = identify_by_verification(axes(1), ["a"], gallery, 0.5)
    assert mated.correct == 1
    with pytest.raises(ValueError, match="^labels: expected a probe of an identity outside the gallery"):
        mated.non_mated_none  # noqa: B018
    with pytest.raises(ValueError, match="^labels: expected a probe of another identity"):
        mated.false_match_rate  # noqa: B018
    other = identify_by_verification(axes(1), ["b"], gallery, 0.5)
    assert other.non_mated_one == other.false_match_rate == 1
    with pytest.raises(ValueError, match="^labels: expected a probe of an identity in the gallery"):
        other.correct  # noqa: B018


GALLERY = enroll(np.eye(3), ["a", "b", "c"])
RESULT = identification(np.eye(3), ["a", "b", "z"], GALLERY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: identification(np.eye(2), ["a", "b"], GALLERY), r"probes: expected \(rows, 3\) floats"),
        (lambda: identification(np.eye(3), ["a", "b"], GALLERY), r"labels: expected \(3,\) texts or integers"),
        (lambda: identification(np.eye(3), [1, 2, 3], GALLERY), "labels: expected texts, as the names"),
        (lambda: identification(np.eye(3) * np.nan, ["a"] * 3, GALLERY), "probes: expected finite values"),
        (lambda: identification(np.eye(3), ["a"] * 3, GALLERY, max_rank=0), "max_rank: expected a positive integer"),
        (lambda: identification(np.eye(3), ["a"] * 3, GALLERY, max_rank=1.5), "max_rank: expected a positive integer"),
        (lambda: RESULT.rank_rate(4), "rank: expected an integer from 1 to 3, the max_rank of this result, got 4"),
        (lambda: RESULT.dir(0.5, 0), "rank: expected an integer from 1 to 3"),
        (lambda: RESULT.fnir(math.nan), "threshold: expected a number, got NaN"),
        (lambda: RESULT.fpir(math.nan), "threshold: expected a number, got NaN"),
        (lambda: RESULT.threshold_at_fpir(1.5), "fpir: expected a rate from 0 to 1, got 1.5"),
        (lambda: RESULT.dir_at_far(-0.1), "far: expected a rate from 0 to 1, got -0.1"),
        (lambda: RESULT.operating_curve(max_points=1), "max_points: expected at least 2, got 1"),
        (lambda: identify_by_verification(np.eye(2), ["a"] * 2, GALLERY, 0.5), r"probes: expected \(rows, 3\)"),
        (lambda: identify_by_verification(np.eye(3), ["a"] * 3, GALLERY, math.nan), "threshold: expected a number"),
        (lambda: identify_by_verification(np.eye(3), ["a"], GALLERY, 0.5), r"labels: expected \(3,\)"),
        (lambda: identify_by_verification(np.eye(3), ["a"] * 3, GALLERY, 0.5, workspace_mb=-1), "workspace_mb: "),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize("order", ["C", "F"])
def test_ranks_of_templates_that_are_equal_up_to_rounding(order):
    rng = np.random.default_rng(0)
    center = np.repeat(rng.normal(size=(40, 64)), 3, axis=0)
    labels = np.arange(120)
    gallery = enroll(center * rng.uniform(0.5, 2, size=(120, 1)), labels)
    probes = np.require(center + rng.normal(size=center.shape), requirements=order)
    some, every = (identification(probes, labels, gallery, max_rank=most) for most in (20, None))
    for result in (some, every):
        assert ((result.rank == 1) == (result.best == result.mate)).all()
        assert ((result.mate_score == result.best_score) | (result.rank > 1)).all()
        assert (result.mate_score <= result.best_score).all()
    assert (np.minimum(every.rank, 21) == some.rank).all() and (every.best == some.best).all()
    assert (some.rank == 1).any() and (some.rank == 2).any()
