"""The lists of MegaFace's development kit: their format, missing files, and results in their galleries."""

import json
import struct

import numpy as np
import pytest
from written_files import put

from fused_margin.evaluation import (
    DataError,
    MegafaceGallery,
    megaface_galleries,
    read_listed_features,
    read_megaface_lists,
)

RNG = np.random.default_rng(0)
PROBES = [f"{name}/{name}_{number}.png" for name in ("Ada_L", "Bo B", "Cy") for number in range(3)]
DISTRACTORS = [f"{number}/photo_0.jpg" for number in range(8)]
GALLERIES = {(2, 1): [0, 1], (2, 2): [5, 7], (2, 10): [2, 6], (6, 1): [3, 0, 5, 1, 2, 7]}  # number 4 is in none


def write_lists(folder, probe_list="facescrub_features_list.json"):
    folder.mkdir(parents=True, exist_ok=True)
    identities = [path.split("/")[0] for path in PROBES]
    (folder / probe_list).write_text(json.dumps({"path": PROBES, "id": identities}))
    for (size, number), rows in GALLERIES.items():
        listed = {"path": [DISTRACTORS[row] for row in rows]}
        (folder / f"megaface_features_list.json_{size}_{number}").write_text(json.dumps(listed))


def column(vector):
    """A feature file of the development kit: OpenCV's matrix with one column."""
    return struct.pack("<4i", len(vector), 1, 4, 5) + np.asarray(vector, "<f4").tobytes()


@pytest.fixture
def vectors(tmp_path):
    """Lists, and a feature file of each image of the lists."""
    write_lists(tmp_path / "devkit" / "templatelists")
    probes, distractors = RNG.normal(size=(9, 4)), RNG.normal(size=(8, 4))
    for root, paths, rows in (("scrub", PROBES, probes), ("mega", DISTRACTORS, distractors)):
        for path, row in zip(paths, rows, strict=True):
            put(tmp_path / root / f"{path}_vgg.bin", column(row))
    return probes.astype(np.float32), distractors.astype(np.float32)


def test_features_in_the_order_of_the_lists(tmp_path, vectors):
    probes, distractors = vectors
    lists = read_megaface_lists(tmp_path / "devkit")  # finds its templatelists
    assert lists.source == str(tmp_path / "devkit/templatelists/facescrub_features_list.json")
    assert list(lists.names) == ["Ada_L", "Bo B", "Cy"] and lists.identity.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    data = read_listed_features(lists, tmp_path / "scrub", tmp_path / "mega", "_vgg.bin")
    np.testing.assert_array_equal(data.probes, probes)
    assert data.distractors.shape == (7, 4)  # each once
    assert [gallery[:2] for gallery in lists.galleries] == [(2, 1), (2, 2), (2, 10), (6, 1)]
    for gallery in lists.galleries:
        np.testing.assert_array_equal(data.distractors[gallery.rows], distractors[GALLERIES[gallery[:2]]])
    write_lists(tmp_path / "others", "fgnet_features_list.json")
    assert read_megaface_lists(tmp_path / "others" / "fgnet_features_list.json").probes == lists.probes


def test_missing_files_are_counted_and_listed(tmp_path, vectors):
    lists = read_megaface_lists(tmp_path / "devkit" / "templatelists")
    for number in (1, 5):
        (tmp_path / "mega" / f"{number}/photo_0.jpg_vgg.bin").unlink()
    with pytest.raises(DataError, match="2 of the 7 distractors listed in .*list.json have no file in .*mega: ") as e:
        read_listed_features(lists, tmp_path / "scrub", tmp_path / "mega", "_vgg.bin")
    assert {"5/photo_0.jpg_vgg.bin", "1/photo_0.jpg_vgg.bin"} <= set(str(e.value).replace(",", "").split())
    with pytest.raises(DataError, match=r"9 of the 9 probes .*: Ada_L/Ada_L_0.png_other.bin, "):
        read_listed_features(lists, tmp_path / "scrub", tmp_path / "mega", "_other.bin")


def test_damaged_lists_and_features(tmp_path, vectors):
    folder = tmp_path / "devkit" / "templatelists"
    with pytest.raises(DataError, match="no facescrub_features_list.json in .*scrub: expected the templatelists"):
        read_megaface_lists(tmp_path / "scrub")
    lists = read_megaface_lists(folder)
    put(tmp_path / "mega" / "7/photo_0.jpg_vgg.bin", column(np.ones(3)))
    with pytest.raises(DataError, match="7/photo_0.jpg_vgg.bin has 3 dimensions, the first probe has 4"):
        read_listed_features(lists, tmp_path / "scrub", tmp_path / "mega", "_vgg.bin")
    two_rows = struct.pack("<4i", 2, 4, 16, 5) + np.ones((2, 4), "<f4").tobytes()
    put(tmp_path / "scrub" / f"{PROBES[4]}_vgg.bin", two_rows)
    with pytest.raises(DataError, match="Bo B_1.png_vgg.bin: expected one vector, got 2"):
        read_listed_features(lists, tmp_path / "scrub", tmp_path / "mega", "_vgg.bin")

    for text, message in (
        ("{", "is not a list of MegaFace's development kit"),
        ('{"path": ["a"]}', "lists 1 distractors, and its name says 6: rename it"),
        ('{"paths": ["a"]}', 'expected a JSON object with a list "path" of text'),
        ('{"path": []}', 'expected a JSON object with a list "path" of text'),
        ("[1]", 'expected a JSON object with a list "path" of text'),
    ):
        (folder / "megaface_features_list.json_6_1").write_text(text)
        with pytest.raises(DataError, match=f"list.json_6_1.* {message}"):
            read_megaface_lists(folder)
    for path in folder.glob("megaface*"):
        path.unlink()
    with pytest.raises(DataError, match="no list of distractors in .*templatelists"):
        read_megaface_lists(folder)
    (folder / "facescrub_features_list.json").write_text('{"path": ["a", "b"], "id": [1]}')
    with pytest.raises(DataError, match="has 2 paths and 1 identities"):
        read_megaface_lists(folder)


def test_results_are_means_over_the_sets_of_a_size():
    identity = np.repeat(np.arange(6), 3)
    probes = RNG.normal(size=(6, 8))[identity] + 0.9 * RNG.normal(size=(18, 8))
    distractors = RNG.normal(size=(40, 8))
    galleries = [MegafaceGallery(s, n, RNG.permutation(40)[:s]) for s, n in ((20, 2), (5, 1), (20, 1), (5, 3))]
    results = megaface_galleries(probes, identity, distractors, galleries, far=0.05)

    unit, others = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (probes, distractors))
    pairs = [(i, j) for i in range(18) for j in range(18) if i != j and identity[i] == identity[j]]
    rank1, tar = [], []
    for gallery in galleries:
        scores = unit @ others[gallery.rows].T
        hits = [unit[i] @ unit[j] > scores[i].max() for i, j in pairs]
        rank1.append(np.mean(hits))
        threshold = np.sort(scores.ravel())[::-1][int(0.05 * scores.size)]
        tar.append(np.mean([unit[i] @ unit[j] > threshold for i, j in pairs]))
    np.testing.assert_allclose(results.rank1, rank1)
    np.testing.assert_allclose(results.tar, tar)
    assert len(set(rank1)) == 4  # so that a mean over other galleries would differ
    mean = results.mean
    assert mean.sizes.tolist() == [5, 20]
    np.testing.assert_allclose(mean.rank1, [(rank1[1] + rank1[3]) / 2, (rank1[0] + rank1[2]) / 2])
    assert mean.tar.tar == pytest.approx((tar[0] + tar[2]) / 2)
    assert mean.impostor_count.sum() == pytest.approx(18 * 20)
    rows = galleries[2].rows  # the first set of the largest size
    np.testing.assert_array_equal(mean.nearest, rows[(unit @ others[rows].T).argmax(axis=1)])

    with pytest.raises(ValueError, match="galleries: expected at least one"):
        megaface_galleries(probes, identity, distractors, [])
    for gallery, message in (
        (MegafaceGallery(2, 1, np.array([0, 99])), "the rows of set 1 of size 2: expected rows of the 40 distractors"),
        (MegafaceGallery(2, 1, np.array([0, -1])), "expected rows of the 40 distractors, got -1 to 0"),
        (MegafaceGallery(5, 3, np.array([0, 1])), r"the rows of set 3 of size 5: expected \(5\) integers"),
    ):
        with pytest.raises(ValueError, match=message):
            megaface_galleries(probes, identity, distractors, [*galleries, gallery])
