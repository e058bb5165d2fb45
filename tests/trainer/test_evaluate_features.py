"""`fused-margin evaluate --features` on files of features: numbers, files, errors."""

import numpy as np
import pytest
import torch
from evaluations import clusters, evaluate, fails, own_folder, write  # noqa: F401
from report_pages import read_page

import fused_margin as fm
from fused_margin import evaluation
from fused_margin.evaluation import protocols

pytestmark = pytest.mark.usefixtures("blank_pictures", "own_folder")


def test_pairs_in_a_file_by_hand():
    # Cosines 1, 0.6, 0.8, 0, repeated; a threshold between 0.6 and 0.8 separates all but one pair of each fold.
    features = np.array([[1, 0], [2, 0], [3, 4], [8, 6], [0, 1]], np.float32)
    pairs = np.array([[0, 1], [0, 2], [0, 3], [0, 4]] * 2)
    same = np.array([True, True, False, False, True, False, True, False])
    report = evaluate(*write(features=features, pairs=pairs, same=same, fold=np.repeat([0, 1], 4)), "--far", 0.25)
    # Fold 1 gives 0.7, with two errors in fold 0; fold 0 is best above 0.8, at 0.9, or below 0.6, at 0.3: the
    # higher one is used, with one error in fold 1.
    assert report["result"]["fold_threshold"] == pytest.approx([0.7, 0.9])
    assert report["result"]["fold_accuracy"] == [0.5, 0.75]
    assert report["result"]["accuracy"] == 0.625 and report["result"]["accuracy_std"] == 0.125
    # Genuine 1, 1, 0.8, 0.6; impostor 0.8, 0.6, 0, 0: 13 of 16 are ordered correctly, and two ties count half.
    assert report["scores"]["auc"] == pytest.approx(14 / 16)
    assert report["scores"]["tar_at_far"] == 0.75 and report["scores"]["far_resolved"]
    assert report["scores"]["threshold_at_far"] == pytest.approx(0.6)
    assert report["separability"] is None


def test_arrays_of_a_file_reach_the_protocols():
    given = clusters()
    features, mirrored, labels = given.values()
    pairs = np.array([[i, (i + step) % 72] for step in (1, 7) for i in range(72)])
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    order = np.random.default_rng(1).permutation(len(pairs))
    pairs, same = pairs[order], same[order]
    weight = np.random.default_rng(2).normal(size=(40, 8)).astype(np.float32)
    file = write(features=features, mirrored=mirrored, pairs=pairs, same=same, class_weight=weight)
    for variant in protocols.LFW_FLIP:
        report = evaluate(*file, "--protocol", "lfw", "--variant", variant)
        expected = protocols.lfw(features, mirrored, pairs, same, variant=variant)
        assert report["result"]["fold_accuracy"] == expected.folds.accuracy.tolist()
    joined = {"none": features, "sum": features + mirrored, "concat": np.hstack([features, mirrored])}
    for flip, expected in joined.items():
        report = evaluate(*file, "--flip", flip, "--folds", 5)
        fold = np.repeat(np.arange(5), [29, 29, 29, 29, 28])
        expected = protocols.cosine_pairs(expected, pairs, same, fold)
        assert report["result"]["fold_accuracy"] == expected.folds.accuracy.tolist()
    assert tuple(report["separability"].values()) == pytest.approx(fm.functional.separability(torch.tensor(weight)))

    video = np.random.default_rng(3).permutation(72) // 2
    pairs, same = pairs[(pairs < 36).all(axis=1)], same[(pairs < 36).all(axis=1)]
    report = evaluate(*write(features=features, video=video, pairs=pairs, same=same), "--protocol", "ytf")
    expected = protocols.ytf(features, video, pairs, same)
    assert report["result"]["fold_accuracy"] == expected.folds.accuracy.tolist()


@pytest.mark.slow
def test_learned_metric_beside_the_cosine(pictures, capsys):
    features, _, labels = clusters(identities=30, noise=0.2).values()
    features[:, 3:] = np.random.default_rng(5).normal(size=features[:, 3:].shape)  # carries no information
    file = write(features=features, labels=labels)
    options = *file, "--num-pairs", 400, "--folds", 5
    cosine, learned = evaluate(*options, drawn=True), evaluate(*options, "--metric", "weighted-l1", drawn=True)
    assert "pairs-weighted-l1: accuracy" in capsys.readouterr().out
    assert (cosine["metric"], learned["metric"]) == ("cosine", "weighted-l1")
    assert learned["result"]["threshold_unit"] == "log odds" and "heads" not in cosine["result"]
    assert learned["result"]["accuracy"] > cosine["result"]["accuracy"] + 0.1
    assert learned["scores"]["equal_error_rate"] < cosine["scores"]["equal_error_rate"]
    for name in ("auc", "tar_at_far", "threshold_at_far", "genuine", "impostors"):
        assert np.isfinite(learned["scores"][name])

    drawn = evaluation.make_pairs(labels, 400, 5, 0)
    expected = protocols.weighted_l1_pairs(features, drawn.indices, drawn.same, drawn.fold)
    assert "negative weights" in read_page("out/pairs-weighted-l1.html").text
    result = learned["result"]
    assert result["fold_accuracy"] == expected.folds.accuracy.tolist()
    assert result["fold_threshold"] == expected.folds.threshold.tolist()
    assert result["heads"]["fitted_pairs"] == [np.count_nonzero(drawn.fold != number) for number in range(5)]
    assert result["heads"]["regularisation_c"] == [head.regularisation for head in expected.heads]
    assert learned["scores"]["auc"] == pytest.approx(evaluation.summarize_pairs(expected.scores, drawn.same, 1e-3).auc)

    pairs, same = drawn.indices[:200], drawn.same[:200]
    file = write(features=features, video=np.arange(len(features)), pairs=pairs, same=same)
    report = evaluate(*file, "--protocol", "ytf", "--metric", "weighted-l1", drawn=True)
    expected = protocols.weighted_l1_pairs(features, pairs, same)
    assert report["result"]["fold_accuracy"] == expected.folds.accuracy.tolist()


@pytest.mark.parametrize("options", [["--num-pairs", 60, "--folds", 2], ["--protocol", "megaface"]])
def test_identities_have_names_or_numbers(options):
    given = clusters()
    names = np.array([f"person {label:02d}" for label in given["labels"]])
    numbered = evaluate(*write(**given), *options)
    named = evaluate(*write(**{**given, "labels": names}), *options)
    assert named["result"] == numbered["result"] and named["scores"] == numbered["scores"]


def test_megaface_with_given_distractors():
    given, others = clusters(), clusters(20)
    arrays = {"distractors": others["features"] + 1, "mirrored_distractors": others["mirrored"] + 1}
    report = evaluate(*write(**given, **arrays), "--protocol", "megaface", "--far", 1e-2, "--flip", "concat")
    probes, distractors = np.hstack([given["features"], given["mirrored"]]), np.hstack(list(arrays.values()))
    expected = evaluation.megaface(probes, given["labels"], distractors, far=1e-2)
    assert [row["rate"] for row in report["result"]["rank1"]] == expected.rank1.tolist()
    assert report["result"]["searches"] == 12 * 6 * 5
    scores = report["scores"]
    assert scores["tar_at_far"] == expected.tar.tar and scores["far_resolved"]
    # Only the impostor scores of the curve are rounded to 1e-4.
    probes, distractors = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (probes, distractors))
    impostor = np.sort((probes @ distractors.T).ravel())
    below = np.searchsorted(impostor, expected.genuine) / len(impostor)
    assert scores["auc"] == pytest.approx(below.mean(), abs=1e-4)


def test_invalid_files(capsys, tmp_path):
    given = clusters()
    nan = np.where(given["features"] > 2, np.nan, given["features"])
    for arrays, options, message in (
        ({"labels": given["labels"]}, "", "has no array `features`"),
        ({**given, "label": given["labels"]}, "", "holds label; known arrays are features, mirrored"),
        ({"features": given["features"]}, "", "needs the array labels"),
        (
            {**given, "pairs": np.array([[0, 1]] * 20), "same": np.arange(20) % 2 == 0, "video": given["labels"]},
            "",
            "video: with this array, `pairs` are video indices, which --protocol ytf evaluates",
        ),
        (given, "--protocol ytf", "needs the arrays pairs, same"),
        ({**given, "mirrored": nan}, "--protocol lfw --num-pairs 60", "mirrored: expected finite values"),
        ({**given, "features": nan}, "--num-pairs 60", "features.npz: features: expected finite values"),
        ({**given, "labels": given["labels"][1:]}, "", "labels: expected (72,) texts or integers"),
        ({**given, "labels": given["labels"] * 0}, "--protocol megaface", "megaface needs distractors"),
        ({**given, "features": given["features"].astype(str)}, "--num-pairs 60", "features: expected"),
        ({**given, "class_weight": nan}, "--num-pairs 60", "class_weight: expected finite values"),
        (
            given,
            "--num-pairs 4 --folds 2 --metric weighted-l1",
            "same: expected at least 3 genuine and 3 impostor pairs",
        ),
        (given, "--num-pairs 10", "num-pairs must be at least two per fold"),
        ({**given, "features": np.array([{}])}, "", "is not a file of arrays"),
    ):
        assert message in fails(capsys, 1, *write(**arrays), *options.split())
    assert "No such file" in fails(capsys, 1, "--features", "nowhere.npz")
    np.save("features.npy", given["features"])
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "half.npz").write_bytes((tmp_path / "features.npz").read_bytes()[:200])
    for name in ("features.npy", "text.npz", "empty.npz", "half.npz"):
        assert "is not a file of arrays" in fails(capsys, 1, "--features", name)
    assert not list(tmp_path.glob("*.json"))


def test_megaface_files(capsys):
    rng = np.random.default_rng(0)
    np.savez("probes.npz", features=rng.normal(size=(6, 4)), labels=np.array(["a", "a", "b", "b", "c", "c"]))
    np.save("distractors.npy", rng.normal(size=(50, 4)))
    arguments = "--features", "probes.npz", "--distractors", "distractors.npy"
    report = evaluate(*arguments, "--protocol", "megaface")
    assert report["result"]["distractors"] == 50 and report["result"]["probe_identities"] == 3
    assert "distractors" in fails(capsys, 2, *arguments)
