"""Verification sets as people have them: LFW, YouTube Faces, .bin pickles that may be hostile, MegaFace features."""

import codecs
import io
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from PIL import Image

from fused_margin.evaluation import DataError
from fused_margin.evaluation.features import read_features, read_megaface
from fused_margin.evaluation.pair_lists import is_lfw_list, read_bin, read_lfw, read_ytf
from fused_margin.evaluation.protocols import lfw as lfw_protocol
from fused_margin.evaluation.safe_pickle import STAND_INS, load_plain


def picture(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def image_set(benchmark, channels):
    """The images as the trainer reads them."""
    trainer = pytest.importorskip("fused_margin.trainer.data.verification_images", exc_type=ImportError)
    return trainer.VerificationImages(benchmark, (8, 8), channels)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# Two folds of two pairs of either kind, with names that have underscores and one that is another's beginning.
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
    assert sorted(benchmark.images) == sorted(str(path) for path in lfw.glob("*/*.*g"))  # each once

    images = image_set(benchmark, 3)
    batch = images.__getitems__(list(range(8)))
    for row, value in enumerate(batch.images[:, 0, 0, 0].tolist()):
        name, number = PHOTOGRAPHS[value].split()
        assert f"{name}_{int(number):04d}" in benchmark.images[row]


def test_lfw_of_one_fold_and_elsewhere(lfw):
    lines = PAIRS.splitlines()
    put(lfw / "lists" / "dev.txt", "\n".join(["2", *lines[1:5]]).replace("\t", "  ").encode())  # as pairsDevTest.txt
    benchmark = read_lfw(lfw, lfw / "lists" / "dev.txt")
    assert benchmark.fold.tolist() == [0, 1] * 2 and benchmark.same.sum() == 2 and not benchmark.has_folds
    put(lfw / "lists" / "dev.txt", "\n".join(["1", lines[1], lines[3]]).encode())
    with pytest.raises(DataError, match="dev.txt: its first line says one pair of each kind, which cannot"):
        read_lfw(lfw, lfw / "lists" / "dev.txt")


def test_pairs_without_folds_are_divided_by_kind(lfw):
    """pairsDevTest.txt has its 500 pairs of one identity first."""
    lines = ["Ann_Lee 1 2"] * 23 + ["Ann_Lee 1 Bo 1"] * 23
    put(lfw / "pairs.txt", "\n".join(["23", *lines]).encode())
    benchmark = read_lfw(lfw)
    assert np.unique(benchmark.fold).tolist() == list(range(10))
    for kind in (benchmark.same, ~benchmark.same):
        assert (np.diff(benchmark.fold[kind]) >= 0).all()  # by their order
        assert set(np.bincount(benchmark.fold[kind])) == {2, 3}
    features = np.random.default_rng(0).normal(size=(len(benchmark.images), 4)).astype(np.float32)
    assert len(lfw_protocol(features, features, benchmark.pairs, benchmark.same, benchmark.fold).folds.accuracy) == 10


@pytest.mark.parametrize("folder", ["lfw", "lfw_funneled", "lfw-deepfunneled"])
def test_lfw_beside_its_list(lfw, folder):
    """As the archive unpacks, the list beside the folder."""
    expected = read_lfw(lfw)
    (lfw / folder).mkdir()
    for name in {photograph.split()[0] for photograph in PHOTOGRAPHS}:
        (lfw / name).rename(lfw / folder / name)
    found = read_lfw(lfw)
    assert [os.path.relpath(image, lfw / folder) for image in found.images] == [
        os.path.relpath(image, lfw) for image in expected.images
    ]
    (lfw / ("lfw" if folder != "lfw" else "lfw_funneled")).mkdir()
    with pytest.raises(DataError, match="has lfw and lfw.*: move pairs.txt into the one to be evaluated"):
        read_lfw(lfw)


def test_lfw_names_what_is_missing(lfw):
    for name in ("Bo/Bo_0012.jpg", "Ann_Lee_Jr/Ann_Lee_Jr_0010.png"):
        (lfw / name).unlink()
    with pytest.raises(DataError, match="2 of the 8 that .*pairs.txt names have no image in .*: ") as error:
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
def test_lfw_lines_of_another_format(lfw, old, new, why):
    put(lfw / "pairs.txt", PAIRS.replace(old, new, 1).encode())
    with pytest.raises(DataError, match=f"pairs.txt.*{why}"):
        read_lfw(lfw)


def test_a_list_in_utf16_is_named(lfw):
    put(lfw / "pairs.txt", PAIRS.encode("utf-16"))
    with pytest.raises(DataError, match="pairs.txt is not UTF-8 text"):
        read_lfw(lfw)
    assert not is_lfw_list(lfw / "pairs.txt")


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_left_out_and_known_by_their_row(lfw, workers):
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
    """With the number of the pair, and with the frames where the archive has them."""
    expected = read_ytf(ytf)
    put(ytf / "splits.txt", PUBLISHED[0 if heading else PUBLISHED.index("\n") + 1 :].encode())
    put(ytf / "Bo" / "1" / "._2.0.jpg", b"left by a Mac")
    if folder:
        (ytf / folder).mkdir()
        for name in ("Ann_Lee", "Bo", "Bo_Ek"):
            (ytf / name).rename(ytf / folder / name)
    found = read_ytf(ytf)
    assert [os.path.relpath(image, ytf / folder) for image in found.images] == [
        os.path.relpath(image, ytf) for image in expected.images
    ]
    for name in ("pairs", "same", "fold", "item"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.skipped == {"files ending in .txt": 4, "hidden or system files and folders": 1}


def test_ytf_broken(ytf):
    for frame in (ytf / "Bo" / "1").iterdir():
        frame.unlink()
    (ytf / "Ann_Lee" / "0").rename(ytf / "Ann_Lee" / "9")
    with pytest.raises(DataError, match=r"2 of the 4 .* have no image in .*: Ann_Lee/0, Bo/1$"):
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


IMAGES = [picture(value, "JPEG") for value in range(0, 240, 10)]
FLAGS = [value % 3 == 0 for value in range(12)]


def python2(images, flags):
    """What Python 2's pickle wrote with protocol 2: its str, which is bytes, as (SHORT_)BINSTRING."""
    strings = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    return b"\x80\x02](" + strings + b"e](" + b"".join(b"\x88" if flag else b"\x89" for flag in flags) + b"e\x86."


def test_python2(tmp_path):
    """The pickle made by hand is what it claims to be."""
    assert pickle.loads(python2(IMAGES, FLAGS), encoding="bytes") == (IMAGES, FLAGS)
    assert "BINSTRING" in {opcode.name for opcode, _, _ in pickletools.genops(python2(IMAGES, FLAGS))}


def as_arrays(images):
    return [np.frombuffer(image, np.uint8) for image in images]


def as_objects(values):
    array = np.empty(len(values), object)
    array[:] = values
    return array


WRITTEN = {
    "Python 2": python2(IMAGES, FLAGS),
    **{f"protocol {p}": pickle.dumps((IMAGES, FLAGS), p) for p in range(6)},
    **{f"arrays, protocol {p}": pickle.dumps((as_arrays(IMAGES), np.array(FLAGS)), p) for p in (2, 4, 5)},
    **{f"flags of numpy, protocol {p}": pickle.dumps((IMAGES, list(np.array(FLAGS))), p) for p in (2, 4, 5)},
    "array of objects": pickle.dumps((as_objects(IMAGES), as_objects(FLAGS)), 4),
    "integers": pickle.dumps([IMAGES, np.array(FLAGS, np.int64)], 4),
    "bytes as flags": pickle.dumps([IMAGES, np.array(FLAGS, np.uint8)], 4),
    "read as Latin-1": pickle.dumps(([image.decode("latin1") for image in IMAGES], FLAGS), 4),
    "bytearrays": pickle.dumps(([bytearray(image) for image in IMAGES], FLAGS), 5),
    "numpy before 2.0": pickle.dumps((as_arrays(IMAGES), np.array(FLAGS)), 4).replace(
        b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray"
    ),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_bin(tmp_path, kind):
    content = WRITTEN[kind]
    if kind == "numpy before 2.0":  # a byte less: the frame's length, after its opcode, too
        assert b"numpy.core" in content
        length = struct.unpack("<Q", content[3:11])[0]
        content = content[:3] + struct.pack("<Q", length - 1) + content[11:]
    path = tmp_path / "lfw.bin"
    path.write_bytes(content)
    benchmark = read_bin(path)
    assert benchmark.images == IMAGES
    assert benchmark.same.tolist() == FLAGS and benchmark.same.dtype == bool
    assert benchmark.pairs.tolist() == [[2 * i, 2 * i + 1] for i in range(12)]
    assert benchmark.fold.tolist() == [0, 0, 1, 1, *range(2, 10)]  # ten, unshuffled
    batch = image_set(benchmark, 1).__getitems__([3, 20])
    assert batch.labels.tolist() == [3, 20] and abs(batch.images.float().mean((1, 2, 3)) - 10 * batch.labels).max() < 2


def test_corrupt_image_of_a_bin(tmp_path):
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(([b"", *IMAGES[1:]], FLAGS)))
    batch = image_set(read_bin(path), 1).__getitems__([0, 1])
    (unreadable,) = batch.unreadable
    assert unreadable.startswith(f"{path}, image 0: ") and batch.labels.tolist() == [1]


class Command:
    """Pickles to a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def built(target, state):
    """A pickle that puts `state` on what a name stands for: GLOBAL, state, BUILD."""
    return b"\x80\x02c" + target + b"\n" + pickle.dumps(state, 2)[2:-1] + b"b."


HOSTILE = {
    "command": (pickle.dumps(([Command(os.system, ("touch called",))], [True])), r"asks for (posix|nt)\.system"),
    "eval": (pickle.dumps((Command(eval, ("open('called', 'w')",)), [True])), r"asks for builtins\.eval"),
    "open": (pickle.dumps(Command(open, ("called", "w"))), r"asks for _?io\.open"),
    "numpy's loader": (pickle.dumps(Command(np.load, ("called",))), r"asks for numpy\S*\.load"),
    "another codec": (pickle.dumps(([Command(codecs.encode, ("x", "rot13"))], [True]), 2), "encoded as 'rot13'"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0bos.path.sep\x93.", r"asks for numpy\.os\.path\.sep"),
    "attribute of a name": (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", r"asks for numpy\.dtype\.__init__"),
    "state of a class": (built(b"numpy\ndtype", (None, {"plain": 1})), "__setstate__"),
    "state of a list": (b"\x80\x02](K\x01e}b.", ""),
    "extension": (b"\x80\x02\x82\x01.", "extension"),
    "persistent": (b"Pcalled\n.", "persistent"),
    "class": (pickle.dumps((DataError, [True])), r"asks for fused_margin\.\S*DataError"),
    "only a name": (b"\x80\x02cnumpy\ndtype\n.", "it holds a type"),
    "only a dtype": (pickle.dumps(np.dtype(bool)), "it holds a dtype"),
    "big-endian": (pickle.dumps((IMAGES, np.array(FLAGS, ">i8")), 4), "it holds an array of i8"),
    "array of text": (pickle.dumps((IMAGES, np.array(["a"] * 12)), 4), "it holds an array of U1"),
    "float": (pickle.dumps((IMAGES, [1.0] * 12)), "it holds a float"),
    "dictionary": (pickle.dumps({"images": IMAGES}), "it holds a dict"),
    "short array": (pickle.dumps((as_arrays(IMAGES), np.array(FLAGS, np.int32)), 4)[:-20] + b".", ""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_pickle_can_run_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    before = {name: dict(vars(stand_in)) for name, stand_in in STAND_INS.items()}
    content, why = HOSTILE[kind]
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*lfw.bin: .*{why}"):
        read_bin(tmp_path / "lfw.bin")
    assert os.listdir() == ["lfw.bin"]
    assert {name: dict(vars(stand_in)) for name, stand_in in STAND_INS.items()} == before


def test_damaged_pickles_are_errors(tmp_path):
    """Random damage gives content or DataError, nothing else."""
    rng = np.random.default_rng(0)
    path = tmp_path / "lfw.bin"
    small = [IMAGES[0][:20]] * 20
    sources = [pickle.dumps((as_arrays(small), np.array(FLAGS[:10])), p) for p in (2, 5)] + [python2(small, FLAGS[:10])]
    for round_ in range(300):
        content = bytearray(sources[round_ % 3])
        if round_ % 2:
            del content[rng.integers(len(content)) :]
        # Not the opcodes whose operand is a length or a place in the memo, which may ask for gigabytes.
        for place in rng.integers(0, len(content) or 1, 3 if content else 0):
            content[place] = rng.choice(list(b"()]}aebtRsu012.NK\x85\x86\x87\x88\x89"))
        path.write_bytes(content)
        try:
            load_plain(path)
        except DataError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ((IMAGES, FLAGS[:-1]), "has 24 images and 11 flags"),
        ((IMAGES[:4], FLAGS[:2]), "expected at least 10, one per fold"),
        (([], []), "expected at least 10, one per fold"),
        ((IMAGES, [2] * 12), "flags that are true or false"),
        ((IMAGES[:-1] + [7], FLAGS), "expected encoded images"),
        ((IMAGES, FLAGS, FLAGS), "expected a pickle of a list of images and one of flags"),
        ((b"images", FLAGS), "expected a pickle of a list of images and one of flags"),
        (7, "expected a pickle of a list of images and one of flags"),
    ],
)
def test_bins_of_another_content(tmp_path, content, why):
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"lfw.bin.*{why}"):
        read_bin(path)


def matrix(values, stride=None, kind=5):
    """MegaFace's file of a matrix; rows padded to `stride` bytes."""
    values = np.atleast_2d(np.asarray(values, "<f4"))
    stride = stride or 4 * values.shape[1]
    rows = b"".join(row.tobytes().ljust(stride, b"\xff") for row in values)
    return struct.pack("<4i", *values.shape, stride, kind) + rows


VECTORS = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def test_features_of_every_kind(tmp_path):
    np.save(tmp_path / "f.npy", VECTORS.astype(np.float64))
    np.savez(tmp_path / "f.npz", features=VECTORS, labels=np.array(list("aabbcc")))
    put(tmp_path / "f.bin", matrix(VECTORS))
    put(tmp_path / "wide.bin", matrix(VECTORS, stride=32))
    for name in ("f.npy", "f.npz", "f.bin", "wide.bin"):
        features = read_features(tmp_path / name)
        np.testing.assert_array_equal(features.vectors, VECTORS)
        assert features.vectors.dtype == np.float32
        assert (features.identities is None) == (name != "f.npz")
    # One image's features, as InsightFace writes them: as many rows as dimensions, one column.
    put(tmp_path / "column.bin", matrix(VECTORS[0][:, None]))
    np.testing.assert_array_equal(read_features(tmp_path / "column.bin").vectors, VECTORS[:1])


def test_megaface(tmp_path):
    for row, name in enumerate(["b/1.png_x.bin", "b/2.png_x.bin", "a c/1.bin", "b/d/1.bin"]):
        put(tmp_path / "probes" / name, matrix(VECTORS[row][:, None]))
    np.save(tmp_path / "probes" / "a c" / "2.npy", VECTORS[4])
    put(tmp_path / "probes" / "readme.txt", b"")
    for folder in (".ipynb_checkpoints", "__MACOSX/b", "b/.cache"):
        put(tmp_path / "probes" / folder / "1.bin", matrix(VECTORS[0][:, None]))
    np.save(tmp_path / "distractors.npy", VECTORS)
    found = read_megaface(tmp_path / "probes", tmp_path / "distractors.npy")
    np.testing.assert_array_equal(found.probes, VECTORS[[2, 4, 0, 1, 3]])
    assert found.identity.tolist() == [0, 0, 1, 1, 2] and found.identity.dtype == np.int64
    np.testing.assert_array_equal(found.distractors, VECTORS)
    assert found.skipped == {"files ending in .txt": 1, "hidden or system files and folders": 3}
    np.savez(tmp_path / "probes.npz", features=VECTORS, labels=np.array([7, 7, 3, 3, 9, 9]))
    assert read_megaface(tmp_path / "probes.npz", tmp_path / "probes").identity.tolist() == [1, 1, 0, 0, 2, 2]

    with pytest.raises(DataError, match="distractors.npy has no identities of its features"):
        read_megaface(tmp_path / "distractors.npy", tmp_path / "probes.npz")
    put(tmp_path / "probes" / "9.bin", matrix(VECTORS[0][:, None]))
    with pytest.raises(DataError, match="probes has features outside the folders of identities"):
        read_megaface(tmp_path / "probes", tmp_path / "distractors.npy")
    (tmp_path / "probes" / "9.bin").unlink()
    np.save(tmp_path / "other.npy", VECTORS[:, :4])
    with pytest.raises(DataError, match="has features of 5 dimensions, .*other.npy of 4"):
        read_megaface(tmp_path / "probes.npz", tmp_path / "other.npy")
    put(tmp_path / "probes" / "z" / "1.bin", matrix(VECTORS[0][:3, None]))
    with pytest.raises(DataError, match="z/1.bin has features of 3 dimensions, .* of 5"):
        read_features(tmp_path / "probes")


def test_broken_features(tmp_path):
    def saved(name, write, *arrays, **named):
        with open(tmp_path / name, "wb") as file:
            write(file, *arrays, **named)

    saved("integers.npy", np.save, VECTORS.astype(int))
    saved("cube.npy", np.save, VECTORS[None])
    saved("empty.npy", np.save, VECTORS[:0])
    saved("nan.npy", np.save, np.where(VECTORS == VECTORS[2, 3], np.nan, VECTORS))
    saved("objects.npy", np.save, np.array([Command(os.system, ("touch called",))], object), allow_pickle=True)
    saved("labels.npz", np.savez, features=VECTORS, labels=np.arange(5))
    saved("names.npz", np.savez, embeddings=VECTORS)
    put(tmp_path / "cut.npz", (tmp_path / "names.npz").read_bytes()[:-30])
    put(tmp_path / "cut.bin", matrix(VECTORS)[:-1])
    put(tmp_path / "long.bin", matrix(VECTORS) + b"\0")
    put(tmp_path / "short.bin", b"1234")
    put(tmp_path / "doubles.bin", matrix(VECTORS, kind=6))
    put(tmp_path / "stride.bin", struct.pack("<4i", 6, 5, 16, 5) + bytes(96))
    put(tmp_path / "negative.bin", struct.pack("<4i", -6, -5, 20, 5))
    (tmp_path / "folder").mkdir()
    for name, why in {
        "integers.npy": r"expected \(vectors, D\) floats, got \(6, 5\) int64",
        "cube.npy": r"expected \(vectors, D\) floats, got \(1, 6, 5\)",
        "empty.npy": r"expected \(vectors, D\) floats, got \(0, 5\)",
        "nan.npy": "NaN or infinity in 1 of its 6 vectors",
        "objects.npy": "allow_pickle",
        "labels.npz": r"expected 6 labels, one per vector, got \(5,\)",
        "names.npz": "has the arrays embeddings: expected `features`",
        "cut.npz": "not a zip file",
        "cut.bin": "has 119 bytes of values where 6 rows of 20 bytes are expected",
        "long.bin": "has 121 bytes of values where 6 rows",
        "short.bin": "it has 4 bytes",
        "doubles.bin": r"expected a matrix of float32 \(type 5\), got 6 rows, 5 columns, 20 bytes .* type 6",
        "stride.bin": "16 bytes per row",
        "negative.bin": "-6 rows",
        "folder": "expected files ending in .npy, .npz, .bin",
        "absent.txt": "is not a file of features",
    }.items():
        with pytest.raises(DataError, match=f"{name}.*{why}"):
            read_features(tmp_path / name)
    assert not os.path.exists("called")
