"""Verification sets with published lists of pairs: LFW and YouTube Faces."""

import os

import numpy as np
import pytest
from written_files import image_set, picture, put

from fused_margin.evaluation import DataError
from fused_margin.evaluation.pair_lists import is_lfw_list, read_lfw, read_ytf
from fused_margin.evaluation.protocols import lfw as lfw_protocol

# Two folds of two pairs of each kind; names contain underscores, and one is a prefix of another.
PAIRS = """2\t2
Ann_Lee\t1\t2
Ann_Lee_Jr\t3\t10
Ann_Lee\t1\tBo\t1
Ann_Lee_Jr\t3\tBo_van_der_Ee\t1
Bo\t1\t2
Bo\t2\t12
Bo\t1\tAnn_Lee_Jr\t10
Bo_van_der_Ee\t1\tAnn_Lee\t2
"""

PHOTOGRAPHS = ["Ann_Lee 1", "Ann_Lee 2", "Ann_Lee_Jr 3", "Ann_Lee_Jr 10", "Bo 1", "Bo 2", "Bo 12", "Bo_van_der_Ee 1"]


@pytest.fixture
def lfw(tmp_path):
    for value, photograph in enumerate(PHOTOGRAPHS):
        name, number = photograph.split()
        suffix = ".png" if value == 3 else ".jpg"
        put(tmp_path / name / f"{name}_{int(number):04d}{suffix}", picture(value))
    put(tmp_path / "pairs.txt", PAIRS.encode())
    return tmp_path


def test_lfw(lfw):
    benchmark = read_lfw(lfw)
    assert benchmark.pairs.shape == (8, 2) and benchmark.item.tolist() == list(range(8))
    assert benchmark.same.dtype == bool and benchmark.same.tolist() == [True, True, False, False] * 2
    assert benchmark.fold.tolist() == [0] * 4 + [1] * 4
    stems = [[os.path.basename(benchmark.images[i])[:-4] for i in pair] for pair in benchmark.pairs]
    assert stems[1] == ["Ann_Lee_Jr_0003", "Ann_Lee_Jr_0010"] and stems[3] == ["Ann_Lee_Jr_0003", "Bo_van_der_Ee_0001"]
    assert stems[5] == ["Bo_0002", "Bo_0012"] and stems[7] == ["Bo_van_der_Ee_0001", "Ann_Lee_0002"]
    assert sorted(benchmark.images) == sorted(str(path) for path in lfw.glob("*/*.*g"))  # each image once

    images = image_set(benchmark, 3)
    batch = images.__getitems__(list(range(8)))
    for row, value in enumerate(batch.images[:, 0, 0, 0].tolist()):
        name, number = PHOTOGRAPHS[value].split()
        assert f"{name}_{int(number):04d}" in benchmark.images[row]


def test_lfw_with_one_fold_and_with_a_list_elsewhere(lfw):
    lines = PAIRS.splitlines()
    put(lfw / "lists" / "dev.txt", "\n".join(["2", *lines[1:5]]).replace("\t", "  ").encode())  # as in pairsDevTest.txt
    benchmark = read_lfw(lfw, lfw / "lists" / "dev.txt")
    assert benchmark.fold.tolist() == [0, 1] * 2 and benchmark.same.sum() == 2 and not benchmark.has_folds
    put(lfw / "lists" / "dev.txt", "\n".join(["1", lines[1], lines[3]]).encode())
    with pytest.raises(DataError, match="dev.txt: its first line says one pair of each kind, which cannot"):
        read_lfw(lfw, lfw / "lists" / "dev.txt")


def test_pairs_without_folds_are_divided_by_kind(lfw):
    """pairsDevTest.txt lists its 500 genuine pairs first."""
    lines = ["Ann_Lee 1 2"] * 23 + ["Ann_Lee 1 Bo 1"] * 23
    put(lfw / "pairs.txt", "\n".join(["23", *lines]).encode())
    benchmark = read_lfw(lfw)
    assert np.unique(benchmark.fold).tolist() == list(range(10))
    for kind in (benchmark.same, ~benchmark.same):
        assert (np.diff(benchmark.fold[kind]) >= 0).all()  # in their order
        assert set(np.bincount(benchmark.fold[kind])) == {2, 3}
    features = np.random.default_rng(0).normal(size=(len(benchmark.images), 4)).astype(np.float32)
    assert len(lfw_protocol(features, features, benchmark.pairs, benchmark.same, benchmark.fold).folds.accuracy) == 10


@pytest.mark.parametrize("folder", ["lfw", "lfw_funneled", "lfw-deepfunneled"])
def test_lfw_folder_beside_its_list(lfw, folder):
    """The list is beside the unpacked folder."""
    expected = read_lfw(lfw)
    (lfw / folder).mkdir()
    for name in {photograph.split()[0] for photograph in PHOTOGRAPHS}:
        (lfw / name).rename(lfw / folder / name)
    result = read_lfw(lfw)
    assert [os.path.relpath(image, lfw / folder) for image in result.images] == [
        os.path.relpath(image, lfw) for image in expected.images
    ]
    (lfw / ("lfw" if folder != "lfw" else "lfw_funneled")).mkdir()
    with pytest.raises(DataError, match="has lfw and lfw.*: move pairs.txt into the one to be evaluated"):
        read_lfw(lfw)


def test_lfw_names_missing_files(lfw):
    for name in ("Bo/Bo_0012.jpg", "Ann_Lee_Jr/Ann_Lee_Jr_0010.png"):
        (lfw / name).unlink()
    with pytest.raises(
        DataError, match="2 of the 8 images or videos listed in .*pairs.txt have no file in .*: "
    ) as error:
        read_lfw(lfw)
    assert str(error.value).endswith("Ann_Lee_Jr/Ann_Lee_Jr_0010, Bo/Bo_0012")
    lines = [f"Nobody\t{i}\t{i + 1}" for i in range(1, 31)] + [f"Nobody\t{i}\tBo\t1" for i in range(1, 31)]
    put(lfw / "pairs.txt", "\n".join(["1\t30", *lines]).encode())
    with pytest.raises(DataError, match="31 of the 32 .* Nobody/Nobody_0010 and 21 more"):
        read_lfw(lfw)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("2\t2\n", "", "line 1: expected the numbers of folds and pairs, got 'Ann_Lee 1 2'"),
        ("2\t2\n", "2\t0\n", "line 1: expected the numbers of folds and pairs"),
        ("2\t2\n", "3\t2\n", "has 4 pairs of one identity and 4 of two; its first line says 6 of each"),
        ("Bo\t1\t2\n", "", "has 3 pairs of one identity and 4 of two"),
        ("Bo\t1\t2\n", "Bo\t1\ttwo\n", "line 6: expected `name number number`"),
        ("Bo\t1\t2\n", "Bo\t1\n", "line 6: expected `name number number`"),
        ("Bo\t1\t2\n", "Bo\n", "line 6: expected `name number number`"),
        ("Bo\t1\t2\n", "Bo\t1\tBo\t2\t3\n", "line 6: expected `name number number`"),
        (PAIRS, "", "line 1: expected the numbers of folds and pairs, got ''"),
    ],
)
def test_lfw_lines_in_another_format(lfw, old, new, why):
    put(lfw / "pairs.txt", PAIRS.replace(old, new, 1).encode())
    with pytest.raises(DataError, match=f"pairs.txt.*{why}"):
        read_lfw(lfw)


def test_list_in_utf16_is_an_error(lfw):
    put(lfw / "pairs.txt", PAIRS.encode("utf-16"))
    with pytest.raises(DataError, match="pairs.txt is not UTF-8 text"):
        read_lfw(lfw)
    assert not is_lfw_list(lfw / "pairs.txt")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_skipped_and_reported_by_row(lfw, workers):
    trainer_data = pytest.importorskip("fused_margin.trainer.data.base", exc_type=ImportError)
    put(lfw / "Bo" / "Bo_0002.jpg", b"no image")
    benchmark = read_lfw(lfw)
    images = image_set(benchmark, 1)
    batches = list(trainer_data.data_loader(images, [[0, 1, 2], [3, 4, 5], [6, 7]], workers))
    assert [named.split(": ")[0] for batch in batches for named in batch.unreadable] == [
        str(lfw / "Bo" / "Bo_0002.jpg")
    ]
    read = [row for batch in batches for row in batch.labels.tolist()]
    assert len(read) == 7 and benchmark.images.index(str(lfw / "Bo" / "Bo_0002.jpg")) not in read


@pytest.fixture
def ytf(tmp_path):
    for value, (video, frames) in enumerate([("Ann_Lee/0", 3), ("Ann_Lee/3", 1), ("Bo/1", 2), ("Bo_Ek/0", 4)]):
        for frame in range(frames):
            put(tmp_path / video / f"{value}.{frame}.jpg", picture(10 * value + frame))
        put(tmp_path / video / "notes.txt", b"")
    put(
        tmp_path / "splits.txt",
        b"split number, first name, second name, is same\n"
        b"1, Ann_Lee/0, Ann_Lee/3, 1\n1, Ann_Lee/0, Bo/1, 0\n\n2,Bo_Ek/0,Ann_Lee/3,0\n2 , Bo/1 , Bo/1 , 1\n",
    )
    return tmp_path


def test_ytf(ytf):
    benchmark = read_ytf(ytf)
    assert benchmark.pairs.tolist() == [[0, 1], [0, 2], [3, 1], [2, 2]]
    assert benchmark.same.tolist() == [True, False, False, True] and benchmark.fold.tolist() == [0, 0, 1, 1]
    assert benchmark.item.tolist() == [0] * 3 + [1] + [2] * 2 + [3] * 4
    batch = image_set(benchmark, 1).__getitems__(list(range(10)))
    assert batch.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 20, 21, 30, 31, 32, 33]
    (ytf / "splits.txt").rename(ytf / "other.txt")
    assert read_ytf(ytf, ytf / "other.txt").pairs.shape == (4, 2)


PUBLISHED = """split number, pair number in split, first name, second name, is same:
1, 1, Ann_Lee/0, Ann_Lee/3, 1
1, 2, Ann_Lee/0, Bo/1, 0
2, 1, Bo_Ek/0, Ann_Lee/3, 0
2, 2, Bo/1, Bo/1, 1
"""


@pytest.mark.parametrize("heading", [True, False])
@pytest.mark.parametrize("folder", ["", "aligned_images_DB"])
def test_ytf_as_published(ytf, heading, folder):
    """Lines have the pair's number, and the frames are in the folder of the archive."""
    expected = read_ytf(ytf)
    put(ytf / "splits.txt", PUBLISHED[0 if heading else PUBLISHED.index("\n") + 1 :].encode())
    put(ytf / "Bo" / "1" / "._2.0.jpg", b"left by a Mac")
    if folder:
        (ytf / folder).mkdir()
        for name in ("Ann_Lee", "Bo", "Bo_Ek"):
            (ytf / name).rename(ytf / folder / name)
    result = read_ytf(ytf)
    assert [os.path.relpath(image, ytf / folder) for image in result.images] == [
        os.path.relpath(image, ytf) for image in expected.images
    ]
    for name in ("pairs", "same", "fold", "item"):
        np.testing.assert_array_equal(getattr(result, name), getattr(expected, name))
    assert result.skipped == {"files ending in .txt": 4, "hidden or system files and folders": 1}


def test_ytf_errors(ytf):
    for frame in (ytf / "Bo" / "1").iterdir():
        frame.unlink()
    (ytf / "Ann_Lee" / "0").rename(ytf / "Ann_Lee" / "9")
    with pytest.raises(DataError, match=r"2 of the 4 .* have no file in .*: Ann_Lee/0, Bo/1$"):
        read_ytf(ytf)
    for line in (
        "1, Ann_Lee/3, Bo/1",
        "one, Ann_Lee/3, Bo/1, 0",
        "1, Ann_Lee/3, Bo/1, yes",
        "1, first, Ann_Lee/3, Bo/1, 0",
        "1, 1, Ann_Lee/3, Bo/1, 0, 0",
    ):
        put(ytf / "splits.txt", f"split number, ...\n{line}\n".encode())
        with pytest.raises(DataError, match="splits.txt, line 2: expected `split number, pair number, first name"):
            read_ytf(ytf)
    put(ytf / "splits.txt", b"split number, first name, second name, is same\n")
    with pytest.raises(DataError, match="lists no pairs"):
        read_ytf(ytf)
