"""Image lists: valid lines, errors in others, and training from a list."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from fused_margin import cli
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data import DataError, find_reader, load_splits
from fused_margin.trainer.data.base import TrainingBatches, data_loader
from fused_margin.trainer.data.folder import folder_splits
from fused_margin.trainer.data.lists import list_splits, read_list
from fused_margin.trainer.data.records import record_splits


@pytest.fixture
def listed(face_folder, tmp_path):
    """The images of the face folder as a list beside a link to it, with unordered labels."""
    (tmp_path / "faces").symlink_to(face_folder)
    files = sorted(face_folder.rglob("*.png"))
    lines = [f"faces/{file.relative_to(face_folder)} {90 - int(file.parent.name[-1])}" for file in files]
    path = tmp_path / "faces.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_lines(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "list.lst"
    path.write_bytes(
        "\ufeffa.png 7\r\n\r\n my photo é.png\tAnna B \nsub/c.png\t 7\nd.png\t8".encode() + b"\n\xff.png 8\n"
    )
    files, labels, names = read_list(path)
    assert [f.decode("latin1") for f in files] == ["a.png", "my photo Ã©.png", "sub/c.png", "d.png", "\xff.png"]
    assert labels.tolist() == [0, 1, 0, 2, 2] and names == ["7", "Anna B", "8"]


def test_lines_without_images_are_not_identities(tmp_path):
    for name in ("a.png", "#b.png", "noname"):
        Image.new("L", (8, 8)).save(tmp_path / name, "PNG")
    path = tmp_path / "list.txt"
    path.write_text(
        "# faces of 2019\n#comment made\npath label\na.png 7\n# total 3\n#b.png 8\nnoname 9\n"
        "__MACOSX/._a.png 7\n.ipynb_checkpoints/a-checkpoint.png 5\n.cache/c.png 7\n"
    )
    skipped = Counter()
    files, labels, names = read_list(path, skipped)
    assert files.tolist() == [b"a.png", b"#b.png", b"noname", b".cache/c.png"]
    assert labels.tolist() == [0, 1, 2, 0] and names == ["7", "8", "9"]
    assert skipped == {"comment lines": 3, "heading lines": 1, "lines of system files": 2}
    path.write_text("a.png 7\ntotal 500\n")
    with pytest.raises(DataError, match="list.txt, line 2: there is no file 'total', and it has no suffix"):
        read_list(path)


def test_files_with_other_suffixes_are_not_identities(tmp_path):
    path = tmp_path / "list.txt"
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    path.write_text("file.name person.id\na.png 7\nnotes.txt y\nb/c.GIF z\nd.gif 7\nThumbs.db 7\ne.JPG 8\n")
    skipped = Counter()
    files, labels, names = read_list(path, skipped)
    assert files.tolist() == [b"a.png", b"e.JPG"] and labels.tolist() == [0, 1] and names == ["7", "8"]
    assert skipped == {
        "heading lines": 1,
        "files ending in .txt": 1,
        "files ending in .gif": 2,
        "lines of system files": 1,
    }
    (tmp_path / "first.jfif").touch()
    path.write_text("first.jfif 7\n")
    with pytest.raises(DataError, match=r"list.txt lists no images; skipped: files ending in .jfif \(1\)"):
        read_list(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_list_in_another_encoding_is_an_error(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("a.png 7\nb.png 8\n".encode(encoding))
    with pytest.raises(DataError, match="list.txt is not UTF-8 text"):
        read_list(path)
    path.write_bytes("\ufeff\u5f20.png".encode("utf-16-be"))  # the first character has no zero byte
    with pytest.raises(DataError, match="list.txt is not UTF-8 text"):
        read_list(path)


def test_mxnet_lines(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "faces.lst"
    path.write_text("5\t3.000000\ta.png\n7\t11\tmy photo.png\n2\t3.000000\tb/c.png\n")
    files, labels, names = read_list(path)
    assert files.tolist() == [b"a.png", b"my photo.png", b"b/c.png"]
    assert labels.tolist() == [0, 1, 0] and names == ["3", "11"]


@pytest.mark.parametrize(
    "line",
    [
        "a.png",
        "a b.png 3",
        "a.png\t",
        "a.png\t1\t2",
        "1 a.png 0.5 0.5",
        "1\t0.5\ta.png",
        "1\t3\t4\ta.png",
        "1\ta.png\t3",
    ],
)
def test_line_in_another_format_is_an_error(tmp_path, line):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "list.txt"
    path.write_text(f"a.png 1\n{line}\n")
    with pytest.raises(DataError, match="list.txt, line 2: expected a path and a label, with a tab"):
        read_list(path)


def test_list_without_images(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        read_list(path)
    path.write_text("".join(f"elsewhere/{number}.png {number % 4}\n" for number in range(1000)))
    with pytest.raises(
        DataError, match=r"none of 100 listed images .*elsewhere/0\.png: paths in .* relative to its folder"
    ):
        read_list(path)


def test_splits_match_those_of_the_folder(listed, face_folder):
    splits = load_splits(str(listed), (10, 8), 3, 0.3, seed=0)
    assert sorted(splits.train.identities + splits.test.identities) == [str(90 - i) for i in reversed(range(9))]
    assert "82" in splits.train.identities  # an identity with one image has no pairs
    assert len(splits.train) + len(splits.test) == 33
    for part in (splits.train, splits.test):
        assert part.labels.unique().tolist() == list(range(part.num_classes))
        for index in (0, len(part) - 1):
            name, path = part.source(index)
            person = path.parent.name
            assert part.identities[part.labels[index]] == str(90 - int(person[-1])) and name == str(path)
            expected = Image.open(path).resize((8, 10), Image.Resampling.BILINEAR)
            image = part.__getitems__([index]).images[0]
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


@pytest.mark.parametrize("workers", [0, 1])
def test_absent_and_corrupt_images_are_skipped_and_named(listed, tmp_path, workers):
    (tmp_path / "corrupt.png").write_text("not an image")
    with open(listed, "a") as file:
        file.write("corrupt.png 90\nabsent.png 89\n")
    splits = load_splits(str(listed), (8, 8), 1, 0.3, seed=0)
    unreadable, read = {}, 0
    for part in (splits.train, splits.test):
        for batch in data_loader(part, TrainingBatches(len(part), 4, epochs=1, seed=0), workers):
            unreadable.update(named.split(": ", 1) for named in batch.unreadable)
            read += len(batch.labels)
    assert unreadable.keys() == {str(tmp_path / "corrupt.png"), str(tmp_path / "absent.png")} and read == 33
    assert "no image" in unreadable[str(tmp_path / "corrupt.png")]
    assert unreadable[str(tmp_path / "absent.png")] == "No such file or directory"


def test_kind_of_data_at_a_path_is_recognized(listed, face_folder, tmp_path):
    assert find_reader(str(listed)) is list_splits
    assert find_reader(str(face_folder)) is folder_splits
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.rec").touch()
    assert find_reader(str(tmp_path / "packed")) is record_splits
    (tmp_path / "faces.zip").touch()
    for path, what in ((tmp_path / "faces.zip", "is no folder and no list"), (tmp_path / "absent", "no folder")):
        for reader in (find_reader, TrainConfig):
            with pytest.raises(ValueError) as error:
                reader(str(path))
            assert what in str(error.value) and str(path) in str(error.value)
            for accepted in (
                "glyphs",
                "digits",
                "FOLDER/identity/image.jpg",
                "train.rec and train.idx",
                ".txt or .lst",
            ):
                assert accepted in str(error.value)


def test_training_from_list(listed, tmp_path, tiny_options, capsys):
    (tmp_path / "corrupt.png").write_text("not an image")
    with open(listed, "a") as file:
        file.write("corrupt.png 90\n# the last\n")
    options = [*tiny_options, "--data", str(listed), "--epochs", "1", "--evaluation.pairs", "20"]
    assert cli.main(["train", *options, "--output", str(tmp_path / "run")]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (unreadable,) = report["data"]["unreadable"]
    assert unreadable.startswith(f"{tmp_path / 'corrupt.png'}: it is damaged, no image")
    assert report["data"]["skipped"] == {"comment lines": 1}
    printed = capsys.readouterr().out
    assert f"skipped 1 unreadable image:\n  {unreadable}\n" in printed and "skipped: comment lines (1)" in printed
