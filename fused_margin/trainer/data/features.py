"""MegaFace-style features: probes with identities and distractors, from .npy, .npz or MegaFace's binary matrices."""

from __future__ import annotations

import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .base import DataError
from .listing import HIDDEN, is_hidden

# MegaFace's matrices are OpenCV's: rows, columns, bytes from row to row, type; then the values.
MATRIX = struct.Struct("<4i")
FLOAT32 = 5  # OpenCV's CV_32FC1


class Features(NamedTuple):
    """Feature vectors and, where they are known, the identities they are of."""

    vectors: np.ndarray  # (num_vectors, D) float32
    identities: np.ndarray | None  # (num_vectors,) text or integers


@dataclass(frozen=True)
class MegafaceSet:
    """Probes to be found by their identity among distractors."""

    probes: np.ndarray  # (num_probes, D) float32
    identity: np.ndarray  # (num_probes,) int64, from 0
    distractors: np.ndarray  # (num_distractors, D) float32
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of files of each kind


def read_megaface(probes: Path, distractors: Path) -> MegafaceSet:
    """Read both sets of features; see `read_features` for what they may be.

    Raises:
        DataError: a file is broken, the probes have no identities, or the two do not go together.
    """
    skipped: Counter[str] = Counter()
    probe, distractor = read_features(probes, skipped), read_features(distractors, skipped)
    if probe.identities is None:
        raise DataError(
            f"{probes} does not say whom the features show: expected a folder, FOLDER/identity/..., or an .npz "
            "with arrays `features` and `labels`"
        )
    if probes.is_dir() and "." in probe.identities:
        raise DataError(f"{probes} has features beside the folders of identities: expected FOLDER/identity/...")
    if probe.vectors.shape[1] != distractor.vectors.shape[1]:
        raise DataError(
            f"{probes} has features of {probe.vectors.shape[1]} dimensions, {distractors} of "
            f"{distractor.vectors.shape[1]}"
        )
    _, identity = np.unique(probe.identities, return_inverse=True)
    return MegafaceSet(probe.vectors, identity.astype(np.int64), distractor.vectors, skipped)


def read_features(path: Path, skipped: Counter[str] | None = None) -> Features:
    """Read a file of features, or all in a folder and below, in order of their names.

    .npy: (num_vectors, D), or one vector (D,). .npz: `features` and, where they are known, `labels`.
    .bin: MegaFace's matrix of float32, a single column being one vector. In a folder the identity is
    the file's own folder. Hidden and system files, and files of other kinds, are counted in `skipped`.

    Raises:
        DataError: a file is broken, a value is not finite, or the dimensions differ.
    """
    if not path.is_dir():
        features = _read_file(path)
    else:
        files = _feature_files(path, Counter() if skipped is None else skipped)
        if not files:
            raise DataError(f"no features in {path}: expected files ending in {', '.join(READERS)}")
        parts = [_read_file(file).vectors for file in files]
        for file, part in zip(files, parts, strict=True):
            if part.shape[1] != parts[0].shape[1]:
                raise DataError(f"{file} has features of {part.shape[1]} dimensions, {files[0]} of {parts[0].shape[1]}")
        folders = [str(file.parent.relative_to(path)) for file in files]
        features = Features(np.concatenate(parts), np.repeat(folders, [len(part) for part in parts]))
    return features


def _feature_files(folder: Path, skipped: Counter[str]) -> list[Path]:
    found = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if any(map(is_hidden, file.relative_to(folder).parts)):
            skipped[HIDDEN] += 1
        elif file.suffix.lower() in READERS:
            found.append(file)
        else:
            skipped[f"files ending in {file.suffix.lower()}" if file.suffix else "files without a suffix"] += 1
    return found


def _read_file(path: Path) -> Features:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path} is not a file of features, which ends in {', '.join(READERS)}")
    vectors, identities = reader(path)
    vectors = np.atleast_2d(vectors)
    if vectors.ndim != 2 or not vectors.size or not np.issubdtype(vectors.dtype, np.floating):
        raise DataError(f"{path}: expected (vectors, D) floats, got {vectors.shape} {vectors.dtype}")
    if identities is not None and identities.shape != vectors.shape[:1]:
        raise DataError(f"{path}: expected {len(vectors)} labels, one per vector, got {identities.shape}")
    if not (finite := np.isfinite(vectors).all(axis=1)).all():
        raise DataError(f"{path} has NaN or infinity in {np.count_nonzero(~finite)} of its {len(vectors)} vectors")
    return Features(vectors.astype(np.float32, copy=False), identities)


def _read_numpy(path: Path) -> Features:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return Features(loaded, None)
        with loaded:
            arrays = dict(loaded)
    except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if "features" not in arrays:
        raise DataError(f"{path} has the arrays {', '.join(arrays)}: expected `features`, and `labels` if known")
    return Features(arrays["features"], arrays.get("labels"))


def _read_matrix(path: Path) -> Features:
    with open(path, "rb") as file:
        head = file.read(MATRIX.size)
        if len(head) < MATRIX.size:
            raise DataError(f"{path} is no matrix: it has {len(head)} bytes")
        rows, columns, stride, kind = MATRIX.unpack(head)
        if kind != FLOAT32 or min(rows, columns) < 1 or stride < 4 * columns or stride % 4:
            raise DataError(
                f"{path}: expected a matrix of float32 (type {FLOAT32}), got {rows} rows, {columns} columns, "
                f"{stride} bytes from row to row, type {kind}"
            )
        if (size := path.stat().st_size - MATRIX.size) != rows * stride:
            raise DataError(f"{path} has {size} bytes of values where {rows} rows of {stride} bytes are expected")
        values = np.fromfile(file, "<f4", rows * stride // 4).reshape(rows, stride // 4)[:, :columns]
    return Features(values.T if columns == 1 else values, None)


READERS: dict[str, Callable[[Path], Features]] = {".npy": _read_numpy, ".npz": _read_numpy, ".bin": _read_matrix}
