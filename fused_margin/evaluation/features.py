"""Feature files: the arrays of a protocol in one .npz, or MegaFace-style probes and distractors."""

from __future__ import annotations

import dataclasses
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DataError
from .files import HIDDEN, is_hidden, skip_reason

# MegaFace's matrices are OpenCV's: rows, columns, bytes per row, type; then the values.
MATRIX = struct.Struct("<4i")
FLOAT32 = 5  # OpenCV's CV_32FC1


@dataclass(frozen=True)
class FeatureSet:
    """Features and labels of an evaluation, by their names in an .npz file. Each protocol needs some of them.

    Attributes:
        features: (num_rows, D) of images, video frames or probes, not normalized.
        mirrored: (num_rows, D) of the mirror images.
        labels: (num_rows,) identities.
        pairs: (num_pairs, 2) rows, or video indices.
        same: (num_pairs,) bool, True for pairs of one identity.
        fold: (num_pairs,) fold indices.
        video: (num_rows,) video indices.
        distractors: (num_distractors, D).
        mirrored_distractors: (num_distractors, D) of the mirror images.
        class_weight: (num_classes, D).

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import FeatureSet
        >>> arrays = FeatureSet(features=np.eye(2), labels=np.array([0, 1]))
        >>> features, labels = arrays.require("features", "labels")
        >>> labels.tolist()
        [0, 1]
    """

    features: np.ndarray
    mirrored: np.ndarray | None = None
    labels: np.ndarray | None = None
    pairs: np.ndarray | None = None
    same: np.ndarray | None = None
    fold: np.ndarray | None = None
    video: np.ndarray | None = None
    distractors: np.ndarray | None = None
    mirrored_distractors: np.ndarray | None = None
    class_weight: np.ndarray | None = None

    def require(self, *names: str) -> list[np.ndarray]:
        """The arrays of these names.

        Raises:
            DataError: an array is missing.

        Examples:
            >>> import numpy as np
            >>> from fused_margin.evaluation import FeatureSet
            >>> FeatureSet(features=np.eye(2)).require("features")[0].shape
            (2, 2)
        """
        if missing := [name for name in names if getattr(self, name) is None]:
            arrays = "array" if len(missing) == 1 else "arrays"
            raise DataError(f"this protocol needs the {arrays} {', '.join(missing)} of a FeatureSet (an .npz file)")
        return [getattr(self, name) for name in names]


def read_arrays(path: Path) -> FeatureSet:
    """Read the arrays of an .npz file, without executing code from it.

    Args:
        path: the file. Its arrays have the names of the attributes of :class:`FeatureSet`.

    Raises:
        DataError: it is not an .npz file, or has an array of another name.
        OSError: it cannot be opened.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from fused_margin.evaluation import read_arrays
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "features.npz"
        ...     np.savez(path, features=np.eye(2), labels=np.array([0, 1]))
        ...     arrays = read_arrays(path)
        >>> arrays.features.shape, arrays.labels.tolist()
        ((2, 2), [0, 1])
    """
    arrays = _load_numpy(path)
    if isinstance(arrays, np.ndarray):
        raise DataError(f"{path} is not a file of arrays (.npz): it has one array without a name")
    names = [field.name for field in dataclasses.fields(FeatureSet)]
    if unknown := sorted(set(arrays) - set(names)):
        raise DataError(f"{path} holds {', '.join(unknown)}; known arrays are {', '.join(names)}")
    if "features" not in arrays:
        raise DataError(f"{path} has no array `features`")
    return FeatureSet(**arrays)


class Features(NamedTuple):
    """Feature vectors and, if known, their identities: the result of :func:`read_features`.

    Attributes:
        vectors: (num_vectors, D) float32, or float64 if values are too large or too small for float32.
        identities: (num_vectors,) text or integers, or None.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import Features
        >>> vectors, identities = Features(np.eye(2, dtype=np.float32), np.array(["Ann", "Bob"]))
        >>> vectors.shape
        (2, 2)
    """

    vectors: np.ndarray
    identities: np.ndarray | None


@dataclass(frozen=True)
class MegafaceSet:
    """Features of probes with identities, and of distractors: the result of :func:`read_megaface`.

    Attributes:
        probes: (num_probes, D), of a type of :class:`Features`.
        identity: (num_probes,) int64 identity indices.
        distractors: (num_distractors, D).
        skipped: number of skipped files by kind.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import MegafaceSet, megaface
        >>> data = MegafaceSet(np.eye(2)[[0, 0, 1]], np.array([0, 0, 1]), np.ones((3, 2)))
        >>> megaface(data.probes, data.identity, data.distractors).rank1.tolist()
        [1.0]
    """

    probes: np.ndarray
    identity: np.ndarray
    distractors: np.ndarray
    skipped: Mapping[str, int] = field(default_factory=dict)


def read_megaface(probes: Path, distractors: Path) -> MegafaceSet:
    """Read the features of probes and distractors.

    Args:
        probes: a file or folder, in the formats of :func:`read_features`, with identities.
        distractors: a file or folder.

    Raises:
        DataError: a file is damaged, the probes have no identities, or the dimensions differ.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from fused_margin.evaluation import read_megaface
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     probes, distractors = Path(folder) / "probes.npz", Path(folder) / "distractors.npy"
        ...     np.savez(probes, features=np.ones((3, 4)), labels=np.array([7, 7, 9]))
        ...     np.save(distractors, np.zeros((5, 4)))
        ...     data = read_megaface(probes, distractors)
        >>> data.identity.tolist(), data.distractors.shape
        ([0, 0, 1], (5, 4))
    """
    skipped: Counter[str] = Counter()
    probe, distractor = read_features(probes, skipped), read_features(distractors, skipped)
    _, identity = np.unique(require_identities(probe.identities, probes), return_inverse=True)
    check_same_width(probe.vectors, probes, distractor.vectors, distractors)
    return MegafaceSet(probe.vectors, identity.astype(np.int64), distractor.vectors, skipped)


def require_identities(identities: np.ndarray | None, path: Path) -> np.ndarray:
    """The identities (num_vectors,) of the features at a path. Raises DataError if there are none."""
    if identities is None:
        raise DataError(
            f"{path} has no identities of its features: expected a folder, FOLDER/identity/..., or an .npz "
            "with arrays `features` and `labels`"
        )
    if path.is_dir() and "." in identities:
        raise DataError(f"{path} has features outside the folders of identities: expected FOLDER/identity/...")
    return identities


def check_same_width(first: np.ndarray, first_path: Path, second: np.ndarray, second_path: Path) -> None:
    """Raise DataError unless the features (rows, D) at two paths have the same number of dimensions."""
    if first.shape[1:] != second.shape[1:]:
        raise DataError(f"{first_path} has features of {first.shape[1]} dimensions, {second_path} of {second.shape[1]}")


def read_features(path: Path, skipped: Counter[str] | None = None) -> Features:
    """Read a feature file, or all feature files in a folder and its subfolders, sorted by name.

    .npy has (num_vectors, D), or one vector (D,). .npz has ``features`` and, if known, ``labels``. .bin is MegaFace's
    float32 matrix, in which a single column is one vector. In a folder, the identity of a file is its subfolder.

    Args:
        path: the file or folder.
        skipped: counts hidden and system files and files of other kinds.

    Raises:
        DataError: a file is damaged, a value is not finite, or the dimensions differ.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from fused_margin.evaluation import read_features
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("Ann", "Bob"):
        ...         (Path(folder) / name).mkdir()
        ...         np.save(Path(folder) / name / "features.npy", np.ones((3, 4)))
        ...     features = read_features(Path(folder))
        >>> features.vectors.shape, features.identities.tolist()
        ((6, 4), ['Ann', 'Ann', 'Ann', 'Bob', 'Bob', 'Bob'])
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
    files = []
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        if any(map(is_hidden, file.relative_to(folder).parts)):
            skipped[HIDDEN] += 1
        elif file.suffix.lower() in READERS:
            files.append(file)
        else:
            skipped[skip_reason(file.name)] += 1
    return files


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
    largest = np.abs(vectors).max(axis=1)
    fits = ((largest > 2.0**-64) & (largest < 2.0**64) | (largest == 0)).all()
    return Features(vectors.astype(np.float32 if fits else np.float64, copy=False), identities)


def _read_numpy(path: Path) -> Features:
    arrays = _load_numpy(path)
    if isinstance(arrays, np.ndarray):
        return Features(arrays, None)
    if "features" not in arrays:
        raise DataError(f"{path} has the arrays {', '.join(arrays)}: expected `features`, and `labels` if known")
    return Features(arrays["features"], arrays.get("labels"))


def _load_numpy(path: Path) -> np.ndarray | dict[str, np.ndarray]:
    """The array of an .npy file or the arrays of an .npz file, without executing code from it."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return dict(loaded)
    except (
        AttributeError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        # numpy takes any file that it does not know for a pickle, and explains how to load it unsafely.
        reason = "it has another format" if "If you trust the file" in str(error) else error
        raise DataError(f"{path} is not a file of arrays (.npy, .npz): {reason}") from error


def _read_matrix(path: Path) -> Features:
    with open(path, "rb") as file:
        head = file.read(MATRIX.size)
        if len(head) < MATRIX.size:
            raise DataError(f"{path} is not a matrix: it has {len(head)} bytes")
        rows, columns, stride, kind = MATRIX.unpack(head)
        if kind != FLOAT32 or min(rows, columns) < 1 or stride < 4 * columns or stride % 4:
            raise DataError(
                f"{path}: expected a matrix of float32 (type {FLOAT32}), got {rows} rows, {columns} columns, "
                f"{stride} bytes per row, type {kind}"
            )
        if (size := path.stat().st_size - MATRIX.size) != rows * stride:
            raise DataError(f"{path} has {size} bytes of values where {rows} rows of {stride} bytes are expected")
        values = np.fromfile(file, "<f4", rows * stride // 4).reshape(rows, stride // 4)[:, :columns]
    return Features(values.T if columns == 1 else values, None)


READERS: dict[str, Callable[[Path], Features]] = {".npy": _read_numpy, ".npz": _read_numpy, ".bin": _read_matrix}
