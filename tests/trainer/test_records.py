"""InsightFace's record files, written in the format of dmlc-core and mxnet: reading, splits, and errors."""

import io
import json
import os
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fused_margin import cli
from fused_margin.trainer.data import DataError, load_splits, records
from fused_margin.trainer.data.base import TrainingBatches, data_loader
from fused_margin.trainer.data.records import RecordFile

MAGIC = struct.pack("<I", 0xCED7230A)


def framed(payload):
    """A payload as dmlc-core writes it, split at every magic number at a multiple of four bytes."""
    cuts = [i for i in range(0, len(payload) - len(payload) % 4, 4) if payload[i : i + 4] == MAGIC]
    starts, ends = [0, *(cut + 4 for cut in cuts)], [*cuts, len(payload)]
    flags = [0] if not cuts else [1, *[2] * (len(cuts) - 1), 3]
    parts = [payload[start:end] for start, end in zip(starts, ends, strict=True)]
    return b"".join(
        MAGIC + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4)
        for flag, part in zip(flags, parts, strict=True)
    )


def packed(labels, number, content=b""):
    """mxnet's pack(): one label is in the header, several follow it."""
    if isinstance(labels, (int, float)):
        return struct.pack("<IfQQ", 0, labels, number, 0) + content
    return struct.pack("<IfQQ", len(labels), 0, number, 0) + struct.pack(f"<{len(labels)}f", *labels) + content


def write(folder, payloads):
    """Write train.rec and train.idx for numbered payloads; returns the offset of each."""
    folder.mkdir(exist_ok=True)
    offsets = {}
    with open(folder / "train.rec", "wb") as file:
        for number, payload in payloads.items():
            offsets[number] = file.tell()
            file.write(framed(payload))
    (folder / "train.idx").write_text("".join(f"{number}\t{offset}\n" for number, offset in offsets.items()))
    return offsets


def encoded(value, side=12, kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (value, 255 - value, value // 2)).save(buffer, kind, quality=95)
    return buffer.getvalue()


def faces(counts, header=True, label=float):
    """Payloads of a file with these numbers of images per identity, numbered as by InsightFace's face2rec2."""
    images = [(identity, n) for identity, count in enumerate(counts) for n in range(count)]
    payloads = {}
    for number, (identity, n) in enumerate(images, 1):
        payloads[number] = packed(label(identity), number, encoded(20 * identity + n))
    if not header:
        return payloads
    first = len(images) + 1
    starts = 1 + np.cumsum([0, *counts])
    for identity, count in enumerate(counts):
        payloads[first + identity] = packed([starts[identity], starts[identity] + count], first + identity)
    return {0: packed([first, first + len(counts)], 0), **payloads}


COUNTS = [4, 3, 1, 5, 0, 2, 4]


def colors(part):
    """The red values of images by identity; each value identifies an image."""
    batch = part.__getitems__(list(range(len(part))))
    assert not batch.unreadable
    by_name = {}
    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
        by_name.setdefault(part.identities[label], []).append(round(float(image[0].float().mean())))
    return by_name


@pytest.mark.parametrize("layout", ["header", "labels", "label arrays"])
def test_identities_and_their_images(tmp_path, layout):
    label = (lambda identity: [identity, 0.0]) if layout == "label arrays" else float
    write(tmp_path / "faces", faces(COUNTS, header=layout == "header", label=label))
    splits = load_splits(str(tmp_path / "faces"), (12, 12), 3, 0.3, seed=0)
    assert str(tmp_path / "faces" / "train.rec") in splits.description
    images = {**colors(splits.train), **colors(splits.test)}
    assert set(images) == {"0", "1", "2", "3", "5", "6"}  # 4 has no image
    for name, values in images.items():
        assert len(values) == COUNTS[int(name)]
        assert np.allclose(values, 20 * int(name) + np.arange(len(values)), atol=3)
    assert "2" in splits.train.identities  # an identity with one image has no pairs
    for part in (splits.train, splits.test):
        assert part.labels.unique().tolist() == list(range(part.num_classes))
    gray = load_splits(str(tmp_path / "faces"), (8, 6), 1, 0.3, seed=0).train.__getitems__([0, 1])
    assert gray.images.shape == (2, 1, 8, 6) and gray.images.dtype == torch.uint8


def test_numbers_that_float32_cannot_represent_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "EXACT", 20)  # the header names record 20
    write(tmp_path / "faces", faces(COUNTS))
    splits = load_splits(str(tmp_path / "faces"), (12, 12), 3, 0.3, seed=0)
    images = {**colors(splits.train), **colors(splits.test)}
    assert {name: len(values) for name, values in images.items()} == {"0": 4, "1": 3, "2": 1, "3": 5, "5": 2, "6": 4}
    write(tmp_path / "faces", {1: packed(20.0, 1, b"image"), 2: packed(1.0, 2, b"image")})
    with pytest.raises(DataError, match="byte 0: its labels are not whole numbers below 20: "):
        load_splits(str(tmp_path / "faces"), (12, 12), 3, 0.3, seed=0)


def test_order_of_the_index_does_not_matter(tmp_path):
    folder = tmp_path / "faces"
    write(folder, faces(COUNTS))
    expected = colors(load_splits(str(folder), (12, 12), 3, 0.3, seed=0).train)
    lines = (folder / "train.idx").read_text().splitlines()
    (folder / "train.idx").write_text("\n".join(reversed(lines)))
    assert colors(load_splits(str(folder), (12, 12), 3, 0.3, seed=0).train) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x",
        b"xyz" * 5,
        MAGIC,
        MAGIC * 3,
        b"abcd" + MAGIC + b"efgh" + MAGIC + b"i",
        b"ab" + MAGIC + b"cd",  # not at a multiple of four, so not split
        b"abcd" + MAGIC[:3],
    ],
)
def test_payload_round_trip(tmp_path, content):
    payloads = {0: packed(1.0, 0, content), 1: packed([5.0, 6.0, 7.0], 1, content), 2: packed(2.0, 2, b"after")}
    offsets = write(tmp_path, payloads)
    file = RecordFile(tmp_path / "train.rec")
    for number, labels in ((2, [2]), (1, [5, 6, 7]), (0, [1])):
        record = file.read(offsets[number])
        assert record.labels.tolist() == labels and record.content == (b"after" if number == 2 else content)
        assert record.flag == (0 if len(labels) == 1 else len(labels))
        head = file.read(offsets[number], enough=30)
        assert head.labels.tolist() == labels and record.content.startswith(head.content)
        assert bool(head.content) == bool(record.content)


def test_many_labels(tmp_path):
    labels = [float(value) for value in range(100)]
    offsets = write(tmp_path, {0: packed(labels, 0, b"image")})
    record = RecordFile(tmp_path / "train.rec").read(offsets[0], enough=128)
    assert record.labels.tolist() == labels and record.content == b"image"


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_images_are_skipped_and_named(tmp_path, workers):
    payloads = faces(COUNTS)
    payloads[1] = packed(0.0, 1, encoded(0)[:100])
    payloads[6] = packed(1.0, 6, b"")
    offsets = write(tmp_path / "faces", payloads)
    splits = load_splits(str(tmp_path / "faces"), (8, 8), 1, 0.3, seed=0)
    unreadable, read = [], 0
    for part in (splits.train, splits.test):
        for batch in data_loader(part, TrainingBatches(len(part), 4, epochs=1, seed=0), workers):
            assert len(batch.images) == len(batch.labels)
            unreadable += batch.unreadable
            read += len(batch.labels)
    assert {named.split(": ")[0] for named in unreadable} == {
        f"{tmp_path}/faces/train.rec, byte {offsets[n]}" for n in (1, 6)
    }
    assert read == sum(COUNTS) - 2


def test_one_file_handle_per_process(tmp_path):
    write(tmp_path / "faces", faces(COUNTS))
    train = load_splits(str(tmp_path / "faces"), (12, 12), 3, 0.3, seed=0).train
    expected = train.__getitems__(list(range(len(train)))).images
    batches = [[0, 1], [2, 3], [4, 5], [6, 7]] * 20
    position = os.lseek(train.records._file.fileno(), 0, os.SEEK_CUR)
    for method, workers in (("fork", 2), ("spawn", 1)):
        loader = data_loader(train, batches, workers)
        loader.multiprocessing_context = method
        for indices, batch in zip(batches, loader, strict=True):
            assert torch.equal(batch.images, expected[indices])
    # A file handle inherited by fork shares its position with the parent's.
    assert os.lseek(train.records._file.fileno(), 0, os.SEEK_CUR) == position
    handle = train.records._file
    train.__getitems__([0])
    assert train.records._file is handle  # the handle stays open
    assert pickle.loads(pickle.dumps(train)).records._file is None
    assert os.getpid() == train.records._process


def damage(path, offset, content):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_broken_record_is_named_with_its_byte_offset(tmp_path):
    folder, path = tmp_path / "faces", tmp_path / "faces" / "train.rec"
    for content, why in (
        (b"\0\0\0\0", "it has 0x00000000 where 0xced7230a is expected"),
        (MAGIC + struct.pack("<I", 2 << 29 | 40), "part 1 of it has the continuation flag 2"),
        (MAGIC + struct.pack("<I", 5 << 29 | 40), "part 1 of it has the continuation flag 5"),
        (MAGIC + struct.pack("<I", 20), "20 bytes are too few for its header"),
        (MAGIC + struct.pack("<II", 40, 90), "it ends within its 90 labels"),
        (MAGIC + struct.pack("<I", 2**29 - 1), "the file ends within it"),
        (MAGIC + struct.pack("<I", 1 << 29 | 40), "it has .* where 0xced7230a is expected"),
    ):
        offsets = write(folder, faces(COUNTS))
        splits = load_splits(str(folder), (8, 8), 1, 0.3, seed=0)
        damaged = int(splits.train.offsets[2])
        assert damaged in offsets.values()
        damage(path, damaged, content)
        splits.train.__getitems__([0, 1])
        with pytest.raises(DataError, match=f"{path}: broken record at byte {damaged}: {why}"):
            splits.train.__getitems__([1, 2])
    with pytest.raises(DataError, match=f"broken record at byte {damaged}"):  # also in a worker
        list(data_loader(splits.train, [[2]], workers=1))


def test_broken_files_are_errors_before_training(tmp_path):
    folder = tmp_path / "faces"

    def read():
        load_splits(str(folder), (8, 8), 1, 0.3, seed=0)

    offsets = write(folder, faces(COUNTS))
    last = max(offsets.values())
    for size in (last + 30, last + 3, last, last // 2):  # an incomplete download
        os.truncate(folder / "train.rec", size)
        with pytest.raises(DataError, match=f"train.rec: broken record at byte {last}: the file ends within it"):
            read()

    first = sum(COUNTS) + 1
    for identity, why in (
        (packed([1, first + 1], 0), r"byte \d+: \[1, 21\] is no range of images"),
        (packed([3, 2], 0), r"\[3, 2\] is no range of images"),
        (packed(3.0, 0), r"\[3\] is no range of images"),
        (packed([1.5, 3], 0), "its labels are not whole numbers"),
        (packed([float("nan"), 3], 0), "its labels are not whole numbers"),
    ):
        write(folder, {**faces(COUNTS), first + 1: identity})
        with pytest.raises(DataError, match=why):
            read()

    write(folder, {**faces(COUNTS), 0: packed([first + 5, first], 0)})
    with pytest.raises(DataError, match="its first record names the identities 25 to 19"):
        read()
    payloads = faces(COUNTS)
    del payloads[7]
    write(folder, payloads)
    with pytest.raises(DataError, match="train.idx has no position of record 7"):
        read()
    write(folder, {0: packed([1, 2], 0), 1: packed([1, 1], 1)})
    with pytest.raises(DataError, match="no identity with images"):
        read()
    write(folder, {1: packed(1.5, 1, b"image")})
    with pytest.raises(DataError, match="its labels are not whole numbers"):
        read()
    write(folder, faces([3, 1, 1, 1, 1]))
    with pytest.raises(DataError, match="has 5 identities, 1 of them with two images"):
        read()


def test_broken_indices(tmp_path):
    folder = tmp_path / "faces"
    write(folder, faces(COUNTS))
    for content, why in (
        ("", "train.idx is empty"),
        ("0\t0\nfive\t6\n", "train.idx: expected a record's number and its byte per line: .*'five'"),
        ("0\t0\t0\n", "train.idx: expected a record's number and its byte per line"),
        ("0\t-4\n", "train.idx: a record begins at byte -4"),
        ("0\t4\n", "train.rec: broken record at byte 4: it has"),
    ):
        (folder / "train.idx").write_text(content)
        with pytest.raises(DataError, match=why):
            load_splits(str(folder), (8, 8), 1, 0.3, seed=0)
    (folder / "train.idx").unlink()
    with pytest.raises(DataError, match="train.idx is missing"):
        load_splits(str(folder), (8, 8), 1, 0.3, seed=0)


@pytest.mark.slow
def test_training_from_records(tmp_path, tiny_options, capsys):
    payloads = faces([6] * 6)
    payloads[1] = packed(0.0, 1, b"no image")
    offsets = write(tmp_path / "faces", payloads)
    options = [*tiny_options, "--data", str(tmp_path / "faces"), "--epochs", "1", "--evaluation.pairs", "20"]
    assert cli.main(["train", *options, "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (unreadable,) = report["data"]["unreadable"]
    assert unreadable.startswith(f"{tmp_path}/faces/train.rec, byte {offsets[1]}: ")
    damage(tmp_path / "faces" / "train.rec", offsets[9], b"????")
    capsys.readouterr()
    assert cli.main(["train", *options, "--output", str(tmp_path / "other")]) == 1
    assert f"broken record at byte {offsets[9]}" in capsys.readouterr().err
