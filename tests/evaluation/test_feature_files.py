"""Files of features in the formats of MegaFace, NumPy and InsightFace."""

import os
import struct

import numpy as np
import pytest
from written_files import Command, put

from fused_margin.evaluation import DataError
from fused_margin.evaluation.features import read_features, read_megaface


def matrix(values, stride=None, kind=5):
    """A matrix in MegaFace's file format; rows are padded to `stride` bytes."""
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
    # InsightFace writes the features of one image as a single column.
    put(tmp_path / "column.bin", matrix(VECTORS[0][:, None]))
    np.testing.assert_array_equal(read_features(tmp_path / "column.bin").vectors, VECTORS[:1])


@pytest.mark.parametrize("scale", [1e60, 1e-60])
def test_float64_features_beyond_the_range_of_float32(tmp_path, scale):
    np.save(tmp_path / "f.npy", VECTORS.astype(np.float64) * scale)
    vectors = read_features(tmp_path / "f.npy").vectors
    np.testing.assert_array_equal(vectors, VECTORS.astype(np.float64) * scale)


def test_megaface(tmp_path):
    for row, name in enumerate(["b/1.png_x.bin", "b/2.png_x.bin", "a c/1.bin", "b/d/1.bin"]):
        put(tmp_path / "probes" / name, matrix(VECTORS[row][:, None]))
    np.save(tmp_path / "probes" / "a c" / "2.npy", VECTORS[4])
    put(tmp_path / "probes" / "readme.txt", b"")
    for folder in (".ipynb_checkpoints", "__MACOSX/b", "b/.cache"):
        put(tmp_path / "probes" / folder / "1.bin", matrix(VECTORS[0][:, None]))
    np.save(tmp_path / "distractors.npy", VECTORS)
    result = read_megaface(tmp_path / "probes", tmp_path / "distractors.npy")
    np.testing.assert_array_equal(result.probes, VECTORS[[2, 4, 0, 1, 3]])
    assert result.identity.tolist() == [0, 0, 1, 1, 2] and result.identity.dtype == np.int64
    np.testing.assert_array_equal(result.distractors, VECTORS)
    assert result.skipped == {"files ending in .txt": 1, "hidden or system files and folders": 3}
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
    saved("flipped.npz", np.savez_compressed, features=VECTORS)
    compressed = bytearray((tmp_path / "flipped.npz").read_bytes())
    compressed[80:120] = bytes(255 - byte for byte in compressed[80:120])
    put(tmp_path / "flipped.npz", bytes(compressed))
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
        "flipped.npz": "is not a file of arrays .*decompress",
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
