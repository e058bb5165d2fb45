"""InsightFace's .bin files of verification pairs: their formats, damaged and malicious pickles."""

import codecs
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest
from written_files import Command, image_set, picture

from fused_margin.evaluation import DataError
from fused_margin.evaluation.pair_lists import read_bin
from fused_margin.evaluation.safe_pickle import PLACEHOLDERS, load_plain

IMAGES = [picture(value, "JPEG") for value in range(0, 240, 10)]

FLAGS = [value % 3 == 0 for value in range(12)]


def python2(images, flags):
    """A pickle of protocol 2 as written by Python 2, with its str, which is bytes, as (SHORT_)BINSTRING."""
    strings = b"".join(b"T" + struct.pack("<i", len(image)) + image for image in images)
    return b"\x80\x02](" + strings + b"e](" + b"".join(b"\x88" if flag else b"\x89" for flag in flags) + b"e\x86."


def test_python2(tmp_path):
    """The handwritten pickle has the expected opcodes and values."""
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
    if kind == "numpy before 2.0":  # one byte less, also in the frame's length after its opcode
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


def test_corrupt_image_in_a_bin(tmp_path):
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(([b"", *IMAGES[1:]], FLAGS)))
    batch = image_set(read_bin(path), 1).__getitems__([0, 1])
    (unreadable,) = batch.unreadable
    assert unreadable.startswith(f"{path}, image 0: ") and batch.labels.tolist() == [1]


def pickle_with_state(target, state):
    """A pickle that sets the state of a named global: GLOBAL, state, BUILD."""
    return b"\x80\x02c" + target + b"\n" + pickle.dumps(state, 2)[2:-1] + b"b."


HOSTILE = {
    "command": (pickle.dumps(([Command(os.system, ("touch called",))], [True])), r"asks for (posix|nt)\.system"),
    "eval": (pickle.dumps((Command(eval, ("open('called', 'w')",)), [True])), r"asks for builtins\.eval"),
    "open": (pickle.dumps(Command(open, ("called", "w"))), r"asks for _?io\.open"),
    "numpy's loader": (pickle.dumps(Command(np.load, ("called",))), r"asks for numpy\S*\.load"),
    "another codec": (pickle.dumps(([Command(codecs.encode, ("x", "rot13"))], [True]), 2), "encoded as 'rot13'"),
    "dotted name": (b"\x80\x04\x8c\x05numpy\x8c\x0bos.path.sep\x93.", r"asks for numpy\.os\.path\.sep"),
    "attribute of a name": (b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.", r"asks for numpy\.dtype\.__init__"),
    "state of a class": (pickle_with_state(b"numpy\ndtype", (None, {"plain": 1})), "__setstate__"),
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
def test_pickles_cannot_run_code(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    before = {name: dict(vars(stand_in)) for name, stand_in in PLACEHOLDERS.items()}
    content, why = HOSTILE[kind]
    (tmp_path / "lfw.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"cannot read .*lfw.bin: .*{why}"):
        read_bin(tmp_path / "lfw.bin")
    assert os.listdir() == ["lfw.bin"]
    assert {name: dict(vars(stand_in)) for name, stand_in in PLACEHOLDERS.items()} == before


def test_damaged_pickles_are_errors(tmp_path):
    """Random damage gives either content or DataError."""
    rng = np.random.default_rng(0)
    path = tmp_path / "lfw.bin"
    small = [IMAGES[0][:20]] * 20
    sources = [pickle.dumps((as_arrays(small), np.array(FLAGS[:10])), p) for p in (2, 5)] + [python2(small, FLAGS[:10])]
    for round_ in range(300):
        content = bytearray(sources[round_ % 3])
        if round_ % 2:
            del content[rng.integers(len(content)) :]
        # Opcodes whose operand is a length or a memo index are unchanged, because they may allocate gigabytes.
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
def test_bins_with_other_content(tmp_path, content, why):
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"lfw.bin.*{why}"):
        read_bin(path)
