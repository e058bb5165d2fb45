"""The mistakes of an evaluation, compared with its rates and with plain loops."""

import numpy as np
import pytest
from evaluations import clusters

from fused_margin.evaluation import cosine_pairs, lfw, make_pairs, megaface, weighted_l1_pairs
from fused_margin.trainer.evaluate.mistakes import MAX_SHOWN, scored_pairs, worst_misses


@pytest.mark.parametrize("protocol", ["pairs", "lfw-insightface", "lfw-regularface", "pairs-weighted-l1"])
def test_decisions_give_the_accuracy(protocol):
    features, mirrored, labels = clusters(identities=16, noise=1.2).values()
    pairs, same, fold, _ = make_pairs(labels, 160, 4, 0)
    fold = 10 * fold + 3  # any integers
    if protocol.startswith("lfw"):
        result = lfw(features, mirrored, pairs, same, fold, protocol.partition("-")[2])
    else:
        result = (cosine_pairs if protocol == "pairs" else weighted_l1_pairs)(features, pairs, same, fold)
    scored = scored_pairs(result, pairs, same, fold, protocol)
    for number, accuracy in zip(np.unique(fold), result.folds.accuracy, strict=True):
        assert np.mean((scored.accepted == same)[fold == number]) == accuracy
    accepts, rejects = scored.false_accepts, scored.false_rejects
    assert len(accepts) + len(rejects) == np.count_nonzero(scored.accepted != same) > 8
    assert not same[accepts].any() and same[rejects].all()
    assert (np.diff(scored.scores[accepts]) <= 0).all() and (np.diff(scored.scores[rejects]) >= 0).all()
    assert scored.scores[accepts[0]] == scored.scores[scored.accepted & ~same].max()


def test_misses_match_a_plain_loop():
    features, _, labels = clusters(noise=1.0).values()
    order = np.random.default_rng(1).permutation(len(features))
    probes, identity = features[order], labels[order]
    distractors = np.random.default_rng(2).normal(size=(60, 8))
    result = megaface(probes, identity, distractors)
    unit, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (probes, distractors))
    worst = []
    for probe in range(len(probes)):
        found = max(range(60), key=lambda row: unit[probe] @ others[row])
        mate = min(
            (row for row in range(len(probes)) if row != probe and identity[row] == identity[probe]),
            key=lambda row: unit[probe] @ unit[row],
        )
        cosines = unit[probe] @ unit[mate], unit[probe] @ others[found]
        if cosines[0] <= cosines[1]:
            worst.append((cosines[1] - cosines[0], probe, mate, found))
    worst.sort(reverse=True)
    assert len(worst) > MAX_SHOWN
    misses = worst_misses(probes, identity, result)
    assert [(miss.probe, miss.mate, miss.distractor) for miss in misses] == [
        (probe, mate, found) for _, probe, mate, found in worst[:MAX_SHOWN]
    ]
    assert [miss.distractor_cosine - miss.mate_cosine for miss in misses] == pytest.approx(
        [excess for excess, *_ in worst[:MAX_SHOWN]], abs=1e-6
    )


def test_images_of_one_probe_have_no_misses():
    result = megaface(np.eye(3)[[0, 0, 1]], np.array([5, 5, 6]), np.eye(3)[[2, 1]])
    assert worst_misses(np.eye(3)[[0, 0, 1]], np.array([5, 5, 6]), result) == []
