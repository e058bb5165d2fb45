"""Enrolment and search of a gallery, against loops in float64 over one probe and one template at a time."""

import math
import warnings

import numpy as np
import pytest
import torch

from fused_margin.evaluation import Gallery, enroll, identity_scores, nearest_rows, recognize, search_gallery


def cosine(a, b):
    a, b = ([float(x) for x in row] for row in (a, b))
    norms = math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def ranked(probe, gallery):
    """All identities of a gallery as (score, index), the best first."""
    best = [-math.inf] * len(gallery.names)
    for row, index in zip(gallery.templates, gallery.identity, strict=True):
        best[index] = max(best[index], cosine(probe, row))
    return sorted(((score, index) for index, score in enumerate(best)), key=lambda pair: (-pair[0], pair[1]))


def assert_exact(probes, gallery, k, **options):
    found = search_gallery(probes, gallery, k, **options)
    expected = [ranked(probe, gallery)[:k] for probe in probes]
    np.testing.assert_array_equal(found.identity, [[index for _, index in row] for row in expected])
    np.testing.assert_allclose(found.score, [[score for score, _ in row] for row in expected], rtol=0, atol=1e-15)
    assert found.score.dtype == np.float64 and found.identity.dtype == np.int64
    assert (np.diff(found.score, axis=1) <= 0).all()


def images(identities, each, noise, size=6, seed=0, dtype=np.float32):
    """Features near one center per identity, and their labels, in mixed order."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat(np.arange(identities), each))
    center = rng.normal(size=(identities, size))
    return (center[label] + noise * rng.normal(size=(len(label), size))).astype(dtype), label


def test_enroll_mean_and_all():
    # Lengths 5, 13 and 2: unit embeddings (0.6, 0.8), (5/13, 12/13) and (-1, 0).
    features, labels = np.array([[3.0, 4.0], [-2.0, 0.0], [5.0, 12.0]]), ["b", "a", "b"]
    every = enroll(features, labels, "all")
    assert every.names.tolist() == ["a", "b"] and every.identity.tolist() == [0, 1, 1]
    np.testing.assert_allclose(every.templates, [[-1, 0], [0.6, 0.8], [5 / 13, 12 / 13]], rtol=0, atol=1e-15)
    mean = enroll(features, labels)
    total = np.array([0.6 + 5 / 13, 0.8 + 12 / 13])
    assert mean.identity.tolist() == [0, 1]
    np.testing.assert_allclose(mean.templates, [[-1, 0], total / math.hypot(*total)], rtol=0, atol=1e-15)
    np.testing.assert_allclose(mean.sum_norm, [1, math.hypot(*total)], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("given", "stored"), [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]
)
def test_templates_have_the_precision_of_the_features(given, stored):
    gallery = enroll(np.array([[3, 4]], given), [7])
    assert gallery.templates.dtype == stored
    np.testing.assert_array_equal(gallery.templates, np.array([[0.6, 0.8]], stored))
    assert search_gallery(np.array([[4, 3]], np.float16), gallery).score.item() == pytest.approx(0.96, abs=1e-7)


@pytest.mark.parametrize("template", ["mean", "all"])
def test_large_and_small_float64_features(template):
    features = np.array([[3e200, 4e200], [5e-300, -12e-300]])
    gallery = enroll(features, [0, 1], template)
    np.testing.assert_allclose(gallery.templates, [[0.6, 0.8], [5 / 13, -12 / 13]], rtol=1e-15)
    assert_exact(features / np.array([[1e200], [1e-300]]), gallery, 2)
    assert search_gallery(features, gallery).identity.tolist() == [[0], [1]]
    np.testing.assert_allclose(search_gallery(features, gallery, 2).score, [[1, -33 / 65], [1, -33 / 65]], rtol=1e-15)


@pytest.mark.parametrize("scale", [1e-35, 1e-13, 1e35])
def test_short_and_long_float32_probes(scale):
    features, label = images(9, 4, 0.5)
    gallery = enroll(features.astype(np.float32), label)
    probes = np.random.default_rng(1).normal(size=(5, features.shape[1])).astype(np.float32)
    expected, found = search_gallery(probes, gallery, 3), search_gallery(probes * np.float32(scale), gallery, 3)
    assert found.identity.tolist() == expected.identity.tolist()
    np.testing.assert_allclose(found.score, expected.score, rtol=0, atol=1e-6)


@pytest.mark.parametrize("template", ["mean", "all"])
def test_gallery_grows_as_if_enrolled_at_once(template):
    features, label = images(8, 5, 0.5)
    name = np.array(["h", "b", "f", "a", "c", "g", "d", "e"])[label]
    first = np.arange(len(name)) < 17
    # Identities that are enrolled first keep their index; the others follow.
    grown = enroll(features[first], name[first], template).add(features[~first], name[~first])
    assert grown.names.tolist() == sorted(set(name[first])) + sorted(set(name[~first]) - set(name[first]))
    index = grown.index_of(["c", "z", "b"])
    assert index[1] == -1 and grown.names[index[[0, 2]]].tolist() == ["c", "b"]
    at_once = enroll(features, name, template)
    order = np.argsort(grown.names[grown.identity], kind="stable")
    np.testing.assert_array_equal(grown.names[grown.identity][order], at_once.names[at_once.identity])
    np.testing.assert_allclose(grown.templates[order], at_once.templates, rtol=0, atol=1e-6)
    if template == "mean":
        np.testing.assert_allclose(grown.sum_norm[order], at_once.sum_norm, rtol=1e-6)


@pytest.mark.parametrize("template", ["mean", "all"])
def test_remove(template):
    features, label = images(6, 3, 0.5)
    gallery = enroll(features, label, template).remove([4, 0, 4])
    rest = ~np.isin(label, [0, 4])
    expected = enroll(features[rest], label[rest], template)
    for name in ("templates", "identity", "names", "sum_norm"):
        np.testing.assert_array_equal(getattr(gallery, name), getattr(expected, name))


def test_an_image_enrolled_twice():
    features = np.array([[1.0, 0.0], [0.6, 0.8], [1.0, 0.0]])
    gallery = enroll(features, ["a", "b", "a"], "all")
    assert gallery.identity.tolist() == [0, 0, 1]
    assert search_gallery(np.array([[1.0, 0.1]]), gallery, 2).identity.tolist() == [[0, 1]]
    np.testing.assert_allclose(enroll(features, ["a", "b", "a"]).templates, [[1, 0], [0.6, 0.8]], atol=1e-15)


@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("template", ["mean", "all"])
def test_search_is_exact(template, dtype, k):
    features, label = images(12, 4, 1.0, dtype=dtype)
    assert_exact(features[::3] * 2, enroll(features, label, template), k)


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("workspace_mb", [256, 1e-3])
def test_identities_with_more_templates_than_the_search_finds(monkeypatch, k, workspace_mb):
    # 40 near images each, so that the 32 nearest are of one identity; blocks end within the gallery.
    features, label = images(5, 40, 0.05)
    gallery = enroll(features, label, "all")
    monkeypatch.setattr(identity_scores, "PROBES", 7)
    assert_exact(features[:10], gallery, k, workspace_mb=workspace_mb)


def test_more_identities_than_the_search_finds():
    features, label = images(40, 1, 0)
    assert_exact(features[:5], enroll(features, label), 40, workspace_mb=1e-3)


def test_mixed_precision():
    features, label = images(9, 3, 1.0)
    probes = images(9, 1, 1.0, seed=1, dtype=np.float64)[0]
    assert_exact(probes, enroll(features, label), 3)
    assert_exact(probes.astype(np.float32), enroll(features.astype(np.float64), label), 3)


@pytest.mark.parametrize("each", [1, 40])
def test_lowest_identity_wins_a_tie(each):
    # Four identities with the same templates, and one farther one before them. Zero rows tie with each other.
    shared = np.random.default_rng(0).normal(size=(each, 7)).astype(np.float32)
    features = np.concatenate([np.zeros((each, 7), np.float32), *[shared] * 4])
    gallery = enroll(features, np.repeat(np.arange(5), each), "all")
    probes = np.stack([shared[0], -shared[-1], np.zeros(7, np.float32)])
    found = search_gallery(probes, gallery, 5)
    assert found.identity[0].tolist() == [1, 2, 3, 4, 0] and found.identity[2].tolist() == [0, 1, 2, 3, 4]
    assert len(set(found.score[0, :4])) == 1 and found.score[2].tolist() == [0.0] * 5
    if each == 1:
        assert found.identity[1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("copies", [3, 35])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_errors_decide_no_order(copies, dtype):
    # Copies of different lengths, whose unit-length templates differ in their last bits.
    rng = np.random.default_rng(0)
    center = rng.normal(size=(90 // copies, 64))
    features = np.repeat(center, copies, axis=0) * rng.uniform(0.5, 2, size=(len(center) * copies, 1))
    probes = (center + rng.normal(size=center.shape)).astype(dtype)
    label = rng.permutation(len(features))
    gallery = enroll(features.astype(dtype), label)
    alone = [Gallery(row[None], np.zeros(1, int), np.zeros(1, int), "all") for row in gallery.templates]
    score = np.hstack([search_gallery(probes, single).score for single in alone])
    expected = np.argsort(-score, axis=1, kind="stable")  # of equal scores the lowest index
    for k in (1, 2, 3, 10, 28, 40) if copies == 3 else (2, 40):
        found = search_gallery(probes, gallery, k)
        if copies == 3 or k > nearest_rows.MAX_ROWS:  # the search does not find all copies of one
            np.testing.assert_array_equal(found.identity, expected[:, :k])
            np.testing.assert_allclose(
                found.score, np.take_along_axis(score, expected[:, :k], axis=1), rtol=0, atol=1e-15
            )
        assert (np.diff(found.score, axis=1) <= 0).all()
        assert (found.score[:, 0] == np.take_along_axis(score, found.identity[:, :1], axis=1)[:, 0]).all()


def test_column_major_arrays():
    features, label = images(60, 1, 1.0, size=64)
    gallery = enroll(features, label)
    for dtype in (np.float32, np.float64):
        probes = images(60, 1, 1.0, size=64, seed=1, dtype=dtype)[0]
        for k in (1, 40):
            expected = search_gallery(probes, gallery, k)
            for given in (np.asfortranarray(probes), np.repeat(probes, 2, axis=1)[:, ::2]):
                found = search_gallery(given, gallery, k)
                assert (found.score == expected.score).all() and (found.identity == expected.identity).all()
            single = np.vstack([search_gallery(row[None], gallery, k).score for row in np.asfortranarray(probes)])
            assert (single[:, 0] == expected.score[:, 0]).all()


def test_scores_are_cosines():
    features = images(50, 1, 0, size=33)[0]
    score = search_gallery(features, enroll(features, np.arange(50))).score
    assert score.max() == 1 and score.min() > 1 - 1e-6  # of templates that are rounded


def test_one_identity():
    gallery = enroll(np.array([[0.0, 2.0]]), ["only"])
    found = search_gallery(np.array([[1.0, 0.0], [3.0, 4.0]]), gallery)
    np.testing.assert_allclose(found.score, [[0], [0.8]], atol=1e-15)
    assert found.identity.tolist() == [[0], [0]]


def test_result_does_not_depend_on_blocks(monkeypatch):
    features, label = images(30, 8, 1.0)
    gallery = enroll(features, label, "all")
    whole = search_gallery(features, gallery, 10)
    monkeypatch.setattr(nearest_rows, "BLOCK_PROBES", 32)
    monkeypatch.setattr(identity_scores, "PROBES", 16)
    parts = search_gallery(features, gallery, 10, workspace_mb=0.01)
    np.testing.assert_array_equal(parts.identity, whole.identity)
    np.testing.assert_array_equal(parts.score, whole.score)


def test_score_blocks_keep_to_the_workspace():
    features, label = images(300, 10, 1.0, size=64)
    gallery = enroll(features, label, "all")
    unit = np.eye(64)
    for workspace_mb in (1, 4):
        blocks = list(identity_scores.score_blocks(unit, gallery, "cpu", workspace_mb))
        assert [block.begin for block in blocks] == np.cumsum([0, *[b.scores.shape[1] for b in blocks]])[:-1].tolist()
        assert sum(block.scores.shape[1] for block in blocks) == 300 and len(blocks) > 1
        for block in blocks:
            rows = len(block.cosines)
            assert 8 * rows * (2 * 64 + 64) + block.scores.nbytes <= workspace_mb * 2**20


def test_memory_maps(tmp_path):
    features, label = images(20, 3, 1.0)
    gallery = enroll(features, label, "all")
    for name, array in (("templates", gallery.templates), ("probes", features)):
        np.save(tmp_path / f"{name}.npy", array)
    mapped = Gallery(np.load(tmp_path / "templates.npy", mmap_mode="r"), gallery.identity, gallery.names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of arrays that cannot be written
        found = search_gallery(np.load(tmp_path / "probes.npy", mmap_mode="r"), mapped, 20)
    np.testing.assert_array_equal(found.identity, search_gallery(features, gallery, 20).identity)


def test_progress(monkeypatch):
    monkeypatch.setattr(nearest_rows, "BLOCK_PROBES", 25)
    monkeypatch.setattr(identity_scores, "PROBES", 40)
    features, label = images(3, 40, 0.01)
    calls = []
    search_gallery(features[:60], enroll(features, label), 2, progress=lambda *call: calls.append(call))
    assert calls == [(25, 60), (50, 60), (60, 60)]
    calls.clear()  # the 32 nearest templates are of one identity, so that all probes are searched again
    search_gallery(features[:60], enroll(features, label, "all"), 2, progress=lambda *call: calls.append(call))
    assert calls == [(25, 60), (50, 60), (60, 60), (100, 120), (120, 120)]


def test_recognize():
    gallery = enroll(np.eye(3), np.array([30, 10, 20]))
    found = recognize(np.array([[0.6, 0.8, 0.0], [0.0, 0.0, -1.0]]), gallery, 0.8, k=2)
    assert found.names.tolist() == [[10, 30], [10, 30]]  # of equal scores, 10 is the first name
    np.testing.assert_allclose(found.scores, [[0.8, 0.6], [0, 0]], atol=1e-15)
    assert found.is_known.tolist() == [True, False]  # 0.8 is at the threshold


GALLERY = enroll(np.eye(3), ["a", "b", "c"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: enroll(np.zeros((0, 3)), []), r"features: expected \(rows, D\) floats, one row or more"),
        (lambda: enroll(np.eye(3, dtype=int), [0, 1, 2]), "features: .* int64"),
        (lambda: enroll(np.array([[1.0, np.nan]]), [0]), "features: expected finite values, .* 1 row"),
        (lambda: enroll(np.eye(3), ["a", "b"]), r"labels: expected \(3,\) texts or integers"),
        (lambda: enroll(np.eye(3), [0.5, 1.0, 2.0]), r"labels: .* float64"),
        (lambda: enroll(np.eye(3), [True, False, True]), r"labels: .* bool"),
        (lambda: enroll(np.eye(3), ["a", "b", "c"], "median"), "template: expected one of 'mean', 'all'"),
        (lambda: GALLERY.add(np.eye(4), ["a"] * 4), r"features: expected \(rows, 3\) floats"),
        (lambda: GALLERY.add(np.eye(3), [1, 2, 3]), "labels: expected texts, as the names"),
        (lambda: GALLERY.remove("z"), r"names: expected enrolled identities, got \['z'\]"),
        (lambda: GALLERY.remove(["a", "b", "c"]), "names: expected an identity to remain, got all 3"),
        (lambda: search_gallery(np.eye(2), GALLERY), r"probes: expected \(rows, 3\) floats"),
        (lambda: search_gallery(np.zeros((0, 3)), GALLERY), "probes: .* one row or more"),
        (lambda: search_gallery(np.full((2, 3), np.inf), GALLERY), "probes: expected finite values, .* 2 rows"),
        (lambda: search_gallery(np.eye(3), GALLERY, 4), "k: expected an integer from 1 to 3, .*, got 4"),
        (lambda: search_gallery(np.eye(3), GALLERY, 0), "k: expected an integer from 1"),
        (lambda: search_gallery(np.eye(3), GALLERY, 1.5), "k: expected an integer from 1"),
        (lambda: search_gallery(np.eye(3), GALLERY, workspace_mb=0), "workspace_mb: expected a positive number"),
        (lambda: search_gallery(np.eye(3), GALLERY, workspace_mb=math.inf), "workspace_mb: expected a positive number"),
        (lambda: recognize(np.eye(3), GALLERY, math.nan), "threshold: expected a number, got NaN"),
        (lambda: Gallery(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int)), "templates: .* one row or more"),
        (lambda: Gallery(np.eye(2) * 2, np.arange(2), np.arange(2)), "templates: .* length 2 in row 0"),
        (lambda: Gallery(np.eye(2) * np.nan, np.arange(2), np.arange(2)), "templates: .* length nan in row 0"),
        (lambda: Gallery(np.eye(2, dtype=np.float16), np.arange(2), np.arange(2)), "templates: .* float16"),
        (lambda: Gallery(np.eye(2), np.array([1, 0]), np.arange(2)), "identity: expected ascending indices"),
        (lambda: Gallery(np.eye(2), np.array([0, 2]), np.arange(3)), "identity: .* each at least once"),
        (lambda: Gallery(np.eye(2), np.array([0, 0]), np.arange(2)), "identity: .* each at least once"),
        (lambda: Gallery(np.eye(2), np.arange(2), np.array(["a", "a"])), "names: expected different names"),
        (lambda: Gallery(np.eye(2), np.arange(2), np.arange(2), "mean"), r"sum_norm: expected shape \(2,\)"),
        (lambda: Gallery(np.eye(2), np.zeros(2, int), np.arange(1), "mean"), "templates: expected one per name"),
        (lambda: enroll(np.eye(2), np.array([0, 2**63], np.uint64)), "labels: .* uint64"),
        (lambda: enroll(np.eye(2), np.array([0, "a"], object)), "labels: .* object"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Gallery(np.eye(2), [0, 1], np.arange(2)), "identity: expected a NumPy array, got list"),
        (
            lambda: Gallery(np.eye(2), np.arange(2), np.arange(2), "mean", [1.0, 1.0]),
            "sum_norm: expected a NumPy array",
        ),
        (lambda: recognize(np.eye(3), GALLERY, "0.5"), "threshold: expected a number, got '0.5'"),
        (lambda: recognize(np.eye(3), GALLERY, None), "threshold: expected a number, got None"),
    ],
)
def test_wrong_types(call, message):
    with pytest.raises(TypeError, match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    "labels", [np.array([7, 9], np.uint64), np.array([7, 9], object), np.array(["7", "9"], object)]
)
def test_labels_of_other_types(labels):
    assert enroll(np.eye(2), labels).names.tolist() == labels.tolist()


@pytest.mark.parametrize("features", [torch.eye(3), [[1.0, 0.0, 0.0]]])
def test_features_must_be_an_array(features):
    with pytest.raises(TypeError, match=f"^probes: expected a NumPy array, got {type(features).__name__}$"):
        search_gallery(features, GALLERY)
