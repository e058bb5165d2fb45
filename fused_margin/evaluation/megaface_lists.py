"""MegaFace's own lists: probes with identities, and galleries of distractors in several sizes and sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .checks import check_integers
from .errors import DataError
from .features import MegafaceSet, read_features
from .files import check_found
from .megaface import MegafaceResult, megaface
from .plurals import counted

PROBE_LIST = "facescrub_features_list.json"
GALLERY_LIST = re.compile(r"megaface_features_list\.json_(\d+)_(\d+)")
TEMPLATE_LISTS = "templatelists"  # folder of the lists in the development kit


class MegafaceGallery(NamedTuple):
    """One of MegaFace's sets of distractors.

    Attributes:
        size: number of distractors.
        number: of the set, from 1. There are several sets of each size.
        rows: (size,) indices of the distractors.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import MegafaceGallery
        >>> MegafaceGallery(size=3, number=1, rows=np.array([0, 4, 2])).rows.tolist()
        [0, 4, 2]
    """

    size: int
    number: int
    rows: np.ndarray


@dataclass(frozen=True)
class MegafaceLists:
    """The lists of MegaFace's development kit: the result of :func:`read_megaface_lists`.

    Attributes:
        source: the list of the probes.
        probes: paths of the probes, relative to their folder.
        identity: (num_probes,) int64 identity indices.
        names: of the identities.
        distractors: paths of all distractors, relative to their folder, each once.
        galleries: by size and number of the set.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import MegafaceGallery, MegafaceLists
        >>> gallery = MegafaceGallery(1, 1, np.array([0]))
        >>> lists = MegafaceLists(
        ...     "lists", ["Ann/1.png", "Ann/2.png"], np.array([0, 0]), ["Ann"], ["7/1.jpg"], [gallery]
        ... )
        >>> len(lists.probes), [gallery.size for gallery in lists.galleries]
        (2, [1])
    """

    source: str
    probes: Sequence[str]
    identity: np.ndarray
    names: Sequence[str]
    distractors: Sequence[str]
    galleries: Sequence[MegafaceGallery]

    def check_files(self, probes: Path, distractors: Path, suffix: str = "") -> None:
        """Check that all listed files exist.

        Args:
            probes: folder of the probes.
            distractors: folder of the distractors.
            suffix: appended to the listed paths.

        Raises:
            DataError: files are missing. The message counts them and lists the first.

        Examples:
            >>> from pathlib import Path
            >>> import numpy as np
            >>> from fused_margin.evaluation import DataError, MegafaceLists
            >>> lists = MegafaceLists("lists", ["Ann/1.png"], np.array([0]), ["Ann"], ["7/1.jpg"], [])
            >>> try:
            ...     lists.check_files(Path("facescrub"), Path("megaface"), "_vgg.bin")
            ... except DataError as error:
            ...     print(error)
            1 of the 1 probes listed in lists have no file in facescrub: Ann/1.png_vgg.bin
        """
        for kind, root, listed in (("probes", probes, self.probes), ("distractors", distractors, self.distractors)):
            missing = [f"{path}{suffix}" for path in listed if not (root / f"{path}{suffix}").is_file()]
            check_found(missing, len(listed), kind, self.source, root)


def read_megaface_lists(lists: Path) -> MegafaceLists:
    """Read the lists of MegaFace's development kit.

    A list is a JSON file with ``path``, a list of paths relative to a folder of images or features. The list of probes
    also has ``id``, their identities. The lists of distractors are ``megaface_features_list.json_<size>_<set>`` beside
    it. Those that exist are read.

    Args:
        lists: the folder of the lists or of the development kit, or the list of other probes than
            ``facescrub_features_list.json``, such as ``fgnet_features_list.json``.

    Raises:
        DataError: there is no such list, it is damaged, or it has another number of paths than its name says.

    Examples:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from fused_margin.evaluation import read_megaface_lists
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = Path(folder)
        ...     probes = {"path": ["Ann/1.png", "Ann/2.png"], "id": ["Ann", "Ann"]}
        ...     _ = (root / "facescrub_features_list.json").write_text(json.dumps(probes))
        ...     for number, paths in ((1, ["7/1.jpg", "8/1.jpg"]), (2, ["9/1.jpg", "7/1.jpg"])):
        ...         path = root / f"megaface_features_list.json_2_{number}"
        ...         _ = path.write_text(json.dumps({"path": paths}))
        ...     data = read_megaface_lists(root)
        >>> data.distractors, [gallery.rows.tolist() for gallery in data.galleries]
        (['7/1.jpg', '8/1.jpg', '9/1.jpg'], [[0, 1], [2, 0]])
    """
    probe_list = lists
    if not lists.is_file():
        places = [folder / PROBE_LIST for folder in (lists, lists / TEMPLATE_LISTS)]
        probe_list = next((path for path in places if path.is_file()), places[0])
        if not probe_list.is_file():
            raise DataError(
                f"no {PROBE_LIST} in {lists}: expected the {TEMPLATE_LISTS} of MegaFace's development kit, or the path "
                "of another list of probes"
            )
    probes, identities = _read_list(probe_list, "path"), _read_list(probe_list, "id")
    if len(probes) != len(identities):
        raise DataError(f"{probe_list} has {len(probes):,} paths and {len(identities):,} identities")
    names, identity = np.unique(identities, return_inverse=True)

    found = [(path, match) for path in probe_list.parent.iterdir() if (match := GALLERY_LIST.fullmatch(path.name))]
    if not found:
        raise DataError(
            f"no list of distractors in {probe_list.parent}: expected megaface_features_list.json_<size>_<set>, such "
            "as megaface_features_list.json_1000000_1"
        )
    numbers: dict[str, int] = {}
    galleries = []
    # The largest gallery numbers the distractors, so that its rows are a slice.
    for size, number, path in sorted(((int(m[1]), int(m[2]), path) for path, m in found), key=lambda g: (-g[0], g[1])):
        paths = _read_list(path, "path")
        if len(paths) != size:
            raise DataError(f"{path} lists {len(paths):,} distractors, and its name says {size:,}: rename it")
        galleries.append(
            MegafaceGallery(size, number, np.array([numbers.setdefault(name, len(numbers)) for name in paths]))
        )
    return MegafaceLists(
        str(probe_list),
        probes,
        identity.astype(np.int64),
        names.tolist(),
        list(numbers),
        sorted(galleries, key=lambda gallery: gallery[:2]),
    )


def _read_list(path: Path, name: str) -> list[str]:
    """The list `name` of a JSON file, as text."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path} is not a list of MegaFace's development kit: {error}") from error
    values = content.get(name) if isinstance(content, dict) else None
    if not isinstance(values, list) or not values or not all(type(value) in (str, int) for value in values):
        raise DataError(f'{path}: expected a JSON object with a list "{name}" of text')
    return [str(value) for value in values]


def read_listed_features(lists: MegafaceLists, probes: Path, distractors: Path, suffix: str = "") -> MegafaceSet:
    """Read the features that the lists of MegaFace's development kit name, one vector per file.

    Args:
        lists: the result of :func:`read_megaface_lists`.
        probes: folder of the probes' features.
        distractors: folder of the distractors' features.
        suffix: appended to the listed paths, as ``_vgg.bin``: ``Ann/1.png`` becomes ``Ann/1.png_vgg.bin``. The files
            have a format of :func:`read_features`.

    Returns:
        The features in the order of the lists. ``distractors[gallery.rows]`` are those of a gallery.

    Raises:
        DataError: files are missing or damaged, or the dimensions differ.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from fused_margin.evaluation import MegafaceLists, read_listed_features
        >>> lists = MegafaceLists("lists", ["Ann/1.png", "Ann/2.png"], np.zeros(2, np.int64), ["Ann"], ["7.jpg"], [])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / "Ann").mkdir()
        ...     for name in ("Ann/1.png", "Ann/2.png", "7.jpg"):
        ...         np.save(Path(folder) / f"{name}_vgg.npy", np.ones(4))
        ...     data = read_listed_features(lists, Path(folder), Path(folder), "_vgg.npy")
        >>> data.probes.shape, data.distractors.shape
        ((2, 4), (1, 4))
    """
    lists.check_files(probes, distractors, suffix)
    first = _read_vector(probes / f"{lists.probes[0]}{suffix}", None)

    def read(root: Path, listed: Sequence[str]) -> np.ndarray:
        vectors = np.empty((len(listed), len(first)), np.float32)
        for row, path in enumerate(listed):
            vectors[row] = _read_vector(root / f"{path}{suffix}", len(first))
        return vectors

    return MegafaceSet(read(probes, lists.probes), lists.identity, read(distractors, lists.distractors))


def _read_vector(path: Path, dimensions: int | None) -> np.ndarray:
    vectors = read_features(path).vectors
    if len(vectors) != 1:
        raise DataError(f"{path}: expected one vector, got {len(vectors):,}")
    if dimensions not in (None, vectors.shape[1]):
        raise DataError(f"{path} has {vectors.shape[1]} dimensions, the first probe has {dimensions}")
    if vectors.dtype != np.float32:
        raise DataError(f"{path} has values that are too large or too small for float32")
    return vectors[0]


class MegafaceGalleryResults(NamedTuple):
    """Results in MegaFace's galleries: the result of :func:`megaface_galleries`.

    Attributes:
        mean: for each size, the mean over its sets. What is not by size is of the largest: the mean of the TAR and of
            the histogram over its sets, and the nearest distractors in the first of its sets.
        rank1: (num_galleries,) share of hits in each gallery.
        tar: (num_galleries,) true accept rate in each gallery.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import MegafaceGallery, megaface_galleries
        >>> results = megaface_galleries(
        ...     np.eye(2)[[0, 0]], np.array([0, 0]), np.eye(2), [MegafaceGallery(1, 1, np.array([1]))], far=1.0
        ... )
        >>> results.rank1.tolist(), results.tar.tolist()
        ([1.0], [1.0])
    """

    mean: MegafaceResult
    rank1: np.ndarray
    tar: np.ndarray


def megaface_galleries(
    probes: np.ndarray,
    identity: np.ndarray,
    distractors: np.ndarray,
    galleries: Sequence[MegafaceGallery],
    far: float = 1e-6,
    device: torch.device | str = "cpu",
) -> MegafaceGalleryResults:
    """MegaFace in given galleries: :func:`megaface` in each, and the mean over the galleries of one size.

    Args:
        probes: (num_probes, D), of any norm.
        identity: (num_probes,) integers.
        distractors: (num_distractors, D), of other identities than the probes.
        galleries: their rows are those of ``distractors``.
        far: false accept rate, 0 to 1.
        device: of the matrix products.

    Raises:
        ValueError: there is no gallery, one has another number of rows than its size or a row out of range, or as for
            :func:`megaface`.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import MegafaceGallery, megaface_galleries
        >>> probes = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.6, 0.8]])
        >>> distractors = np.array([[0.7, 0.7], [-1.0, 0.0]])
        >>> galleries = [MegafaceGallery(1, 1, np.array([0])), MegafaceGallery(1, 2, np.array([1]))]
        >>> results = megaface_galleries(probes, np.array([0, 0, 1, 1]), distractors, galleries, far=0.25)
        >>> results.rank1.tolist(), results.mean.rank1.tolist()
        ([0.75, 1.0], [0.875])
    """
    if not galleries:
        raise ValueError("galleries: expected at least one")
    for size, number, rows in galleries:
        name = f"galleries: the rows of set {number} of size {size}"
        check_integers(name, rows, (size,))
        if rows.min() < 0 or rows.max() >= len(distractors):
            raise ValueError(
                f"{name}: expected rows of the {counted(len(distractors), 'distractor')}, "
                f"got {rows.min()} to {rows.max()}"
            )
    ordered = sorted(range(len(galleries)), key=lambda index: galleries[index][:2])
    largest = galleries[ordered[-1]].size
    rank1, tar = np.zeros(len(galleries)), np.zeros(len(galleries))
    of_largest = []
    for index in ordered:
        size, _, rows = galleries[index]
        consecutive = np.array_equal(rows, np.arange(len(rows)))
        gallery = distractors[: len(rows)] if consecutive else distractors[rows]  # a slice needs no memory
        result = megaface(probes, identity, gallery, [len(rows)], far, device)
        rank1[index], tar[index] = result.rank1[0], result.tar.tar
        if size == largest:
            of_largest.append(result._replace(nearest=rows[result.nearest]))
    sizes = np.array([gallery.size for gallery in galleries])
    different = np.unique(sizes)
    first = of_largest[0]
    mean = first._replace(
        sizes=different,
        rank1=np.array([rank1[sizes == size].mean() for size in different]),
        tar=first.tar._replace(
            tar=float(np.mean([result.tar.tar for result in of_largest])),
            threshold=float(np.mean([result.tar.threshold for result in of_largest])),
        ),
        impostor_count=np.mean([result.impostor_count for result in of_largest], axis=0),
    )
    return MegafaceGalleryResults(mean, rank1, tar)
