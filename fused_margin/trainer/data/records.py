"""InsightFace's train.rec and train.idx: images packed in a RecordIO file, read without mxnet."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torch import Tensor

from fused_margin.evaluation.errors import DataError

from .base import Splits, split_listed
from .decode import DecodedImages

RECORDS, INDEX = "train.rec", "train.idx"

# Framing of dmlc-core's RecordIO: the magic number, 3 bits of continuation flag and 29 bits of length, and the payload,
# padded to four bytes. If the payload contains the magic number at a multiple of four, the writer splits it there into
# parts, without the magic number.
MAGIC = 0xCED7230A
FRAME = struct.Struct("<II")
WHOLE, FIRST, MIDDLE, LAST = range(4)
# mxnet's IRHeader: flag, label, id, id2. If flag > 0, that many float labels follow.
HEADER = struct.Struct("<IfQQ")
LABEL_BYTES = 128  # enough for the header and about two labels of a face record
EXACT = 2**24  # float32 stores labels and record numbers, and is exact below this number


class Record(NamedTuple):
    """A decoded record."""

    flag: int  # number of labels after the header; 0: the label is in the header
    labels: np.ndarray  # (max(1, flag),) float32
    content: bytes  # the encoded image; empty for an identity


def record_splits(folder: str, image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """List the identities of a record file and split them; an identity with one image is always for training.

    Raises:
        DataError: a record or the index is damaged, or there are too few identities.
    """
    records = RecordFile(Path(folder, RECORDS))
    offsets, labels, names = list_images(records, Path(folder, INDEX))
    train, test = (
        RecordImages(records, offsets[part.rows], part.labels, part.identities, image_size, channels)
        for part in split_listed(folder, labels, names, test_fraction, seed)
    )
    return Splits(train, test, description=f"images of {records.path}", test_distortion=None)


class RecordImages(DecodedImages):
    """Images by the offset of their record."""

    def __init__(
        self,
        records: RecordFile,
        offsets: np.ndarray,
        labels: Tensor,
        identities: Sequence[str],
        image_size: tuple[int, int],
        channels: int,
    ) -> None:
        super().__init__(labels, identities, image_size, channels)
        self.records, self.offsets = records, offsets

    def source(self, index: int) -> tuple[str, BytesIO]:
        return self.name(index), BytesIO(self.records.read(int(self.offsets[index])).content)

    def name(self, index: int) -> str:
        return f"{self.records.path}, byte {self.offsets[index]}"


class RecordFile:
    """Records of a file by their position. Every process opens the file itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._process: int | None = None

    def __reduce__(self) -> tuple[type[RecordFile], tuple[Path]]:
        return RecordFile, (self.path,)  # an open file cannot be pickled

    def read(self, offset: int, enough: int | None = None) -> Record:
        """The record at a byte offset. With `enough`, content after that number of bytes may be omitted.

        Raises:
            DataError: there is no record, or it is damaged.
        """
        payload = self._payload(offset, enough)
        if len(payload) < HEADER.size:
            raise self.broken(offset, f"{len(payload)} bytes are too few for its header")
        flag, label, _, _ = HEADER.unpack_from(payload)
        start = HEADER.size + 4 * flag
        if enough is not None and start >= enough:
            return self.read(offset)
        if start > len(payload):
            raise self.broken(offset, f"it ends within its {flag} labels")
        labels = np.frombuffer(payload, "<f4", flag, HEADER.size) if flag else np.array([label], np.float32)
        return Record(flag, labels, payload[start:])

    def numbers(self, offset: int, labels: np.ndarray) -> list[int]:
        """Labels of the record at `offset`, which must be whole numbers."""
        if not (np.abs(labels) < EXACT).all() or (labels != np.floor(labels)).any():
            raise self.broken(offset, f"its labels are not whole numbers below {EXACT:,}: {labels.tolist()}")
        return labels.astype(np.int64).tolist()

    def _opened(self) -> BinaryIO:
        """The file, opened once in each process, because a forked process shares the file position."""
        if self._file is None or self._process != os.getpid():
            self._file, self._process = open(self.path, "rb"), os.getpid()  # noqa: SIM115  stays open
        return self._file

    def _payload(self, offset: int, enough: int | None) -> bytes:
        file = self._opened()
        file.seek(offset)
        parts: list[bytes] = []
        while True:
            frame = file.read(FRAME.size)
            if len(frame) < FRAME.size:
                raise self.broken(offset, "the file ends within it")
            magic, word = FRAME.unpack(frame)
            flag, length = word >> 29, word & (2**29 - 1)
            if magic != MAGIC:
                raise self.broken(offset, f"it has {magic:#010x} where {MAGIC:#010x} is expected")
            if flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                raise self.broken(offset, f"part {len(parts) // 2 + 1} of it has the continuation flag {flag}")
            wanted = length if enough is None else min(length, enough)
            parts.append(file.read(wanted))
            if len(parts[-1]) < wanted:
                raise self.broken(offset, "the file ends within it")
            if flag in (WHOLE, LAST) or wanted < length:
                return b"".join(parts)
            file.seek(-length % 4, os.SEEK_CUR)
            parts.append(FRAME.pack(MAGIC, 0)[:4])

    def broken(self, offset: int, why: str) -> DataError:
        return DataError(f"{self.path}: broken record at byte {offset}: {why}")


def list_images(records: RecordFile, index: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Offset (num_images,) and label (num_images,) of every image, and the name of each label.

    Record 0 of a face data set has the range of identity records, and each of these the range of its image records.
    Files of mxnet's im2rec have no such records; then the label of every record is read.

    Raises:
        DataError: a record or the index is damaged.
    """
    keys, offsets = _read_index(index)
    records.read(int(offsets.max()))  # the last record, to detect a truncated file
    if keys[0] == 0:
        header = records.read(int(offsets[0]), LABEL_BYTES)
        if header.flag == 2 and not header.content and header.labels.max() < EXACT:
            return _images_of_identities(records, index, keys, offsets, header)
    return _images_by_label(records, offsets)


def _images_of_identities(
    records: RecordFile, index: Path, keys: np.ndarray, offsets: np.ndarray, header: Record
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    def offsets_of(wanted: np.ndarray) -> np.ndarray:
        rows = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        if (absent := keys[rows] != wanted).any():
            raise DataError(f"{index} has no position of record {wanted[absent][0]}")
        return offsets[rows]

    first, end = records.numbers(int(offsets[0]), header.labels)
    if not 0 < first <= end:
        raise DataError(f"{records.path}: its first record names the identities {first} to {end - 1}")
    images, names = [], []
    for number, offset in enumerate(offsets_of(np.arange(first, end)).tolist()):
        identity = records.read(offset, LABEL_BYTES)
        bounds = records.numbers(offset, identity.labels)
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= first:
            raise records.broken(offset, f"{bounds} is no range of images")
        if bounds[0] < bounds[1]:  # cleaned data sets have identities without images
            images.append(np.arange(*bounds))
            names.append(str(number))
    if not images:
        raise DataError(f"{records.path} has no identity with images")
    labels = np.repeat(np.arange(len(names)), [len(members) for members in images])
    return offsets_of(np.concatenate(images)), labels, names


def _images_by_label(records: RecordFile, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
    images, identities = [], []
    for offset in np.sort(offsets).tolist():
        record = records.read(offset, LABEL_BYTES)
        if record.content or not record.flag:  # not an identity or the first record
            images.append(offset)
            identities += records.numbers(offset, record.labels[:1])
    names, labels = np.unique(identities, return_inverse=True)
    return np.array(images), labels, [str(name) for name in names.tolist()]


def _read_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Ascending record numbers, and the byte offset of each record."""
    if not path.is_file():
        raise DataError(f"{path} is missing: it has the positions of the records in {RECORDS}")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty")
    try:
        keys, offsets = np.loadtxt(path, dtype=np.int64, ndmin=2).T
    except ValueError as error:
        raise DataError(f"{path}: expected a record's number and its byte per line: {error}") from error
    if offsets.min() < 0:
        raise DataError(f"{path}: a record begins at byte {offsets.min()}")
    order = np.argsort(keys, kind="stable")
    return keys[order], offsets[order]
