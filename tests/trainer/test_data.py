"""Identities of all data sources: disjoint, distinct, and read as documented."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fused_margin.trainer.data import DataError, glyphs, load_splits
from fused_margin.trainer.data.base import TrainingBatches, data_loader, to_input


@pytest.fixture
def identity_of(glyph_identities):
    return {c: label for label, name in enumerate(glyph_identities[2]) for c in name}


@pytest.mark.parametrize("equal_glyphs", ["AΑА", "BΒВ", "oοо", "pр", "ÄӒ"])
def test_characters_with_equal_glyphs_are_one_identity(identity_of, equal_glyphs):
    assert len({identity_of[c] for c in equal_glyphs}) == 1


@pytest.mark.parametrize("unlike", ["ABCDE", "Oo0", "iıj", "EÉÈ", "bdpq", "ΦФ"])
def test_other_characters_are_different_identities(identity_of, unlike):
    assert len({identity_of[c] for c in unlike}) == len(unlike)


def test_enough_faces_and_no_blank_image(characters):
    images, drawn, names = characters
    assert len(names) > 3000
    assert drawn.sum(dim=1).min() >= glyphs.MIN_FACES
    assert torch.equal(images.flatten(2).any(dim=2), drawn)
    assert " " not in names and "\u00a0" not in names


def test_glyph_identities_have_distinct_images(glyph_identities):
    images, labels, names = glyph_identities
    counts = torch.bincount(labels)
    assert len(counts) == len(names) > 2000
    assert counts.min() >= glyphs.MIN_IMAGES
    rows = torch.cat([labels[:, None].to(torch.uint8), (labels[:, None] // 256).to(torch.uint8), images.flatten(1)], 1)
    assert len(torch.unique(rows, dim=0)) == len(images)  # no duplicate images in an identity


@pytest.mark.parametrize("data", ["glyphs", "digits", "folder"])
def test_identities_are_disjoint(data, glyph_identities, face_folder, monkeypatch):
    monkeypatch.setattr(glyphs, "glyph_identities", lambda size: glyph_identities)
    source = str(face_folder) if data == "folder" else data
    splits = load_splits(source, (16, 16), 1, 0.3, seed=0)
    train, test = splits.train, splits.test
    assert not set(train.identities) & set(test.identities)
    for part in (train, test):
        assert part.labels.unique().tolist() == list(range(part.num_classes))
        batch = part.__getitems__([0, len(part) - 1])
        assert batch.images.shape == (2, 1, 16, 16) and batch.images.dtype == torch.uint8
        assert batch.labels.tolist() == [0, part.num_classes - 1] or data == "digits"
    assert torch.bincount(test.labels).min() >= 2
    other = load_splits(source, (16, 16), 1, 0.3, seed=1)
    assert other.fingerprint() != splits.fingerprint()
    assert load_splits(source, (16, 16), 1, 0.3, seed=0).fingerprint() == splits.fingerprint()


def test_digits_are_the_ten_identities():
    splits = load_splits("digits", (8, 8), 3, 0.3, seed=0)
    assert sorted(splits.train.identities + splits.test.identities) == list("0123456789")
    assert (splits.train.num_classes, splits.test.num_classes) == (7, 3)
    assert len(splits.train) + len(splits.test) == 1797
    assert splits.train.images.shape[1:] == (3, 8, 8)


def test_folder_images_are_read_and_resized(face_folder):
    splits = load_splits(str(face_folder), (10, 20), 3, 0.3, seed=0)
    index = splits.train.labels.tolist().index(1)
    image = splits.train.__getitems__([index]).images[0]
    path = face_folder / splits.train.identities[1] / "0.png"
    expected = np.asarray(Image.open(path).resize((20, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert to_input(torch.tensor([0, 255])).tolist() == [-1, 1]
    assert "person_8" in splits.train.identities  # an identity with one image has no pairs


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_and_named(face_folder, tmp_path, workers):
    root = tmp_path / "faces"
    root.symlink_to(face_folder)
    splits = load_splits(str(root), (8, 8), 1, 0.3, seed=0)
    broken = {root / splits.train.identities[0] / "1.png", root / splits.train.identities[2] / "2.png"}
    contents = {path: path.read_bytes() for path in broken}
    first, second = sorted(broken)
    try:
        first.write_bytes(b"not an image")
        second.write_bytes(contents[second][:60])  # truncated
        sampler = TrainingBatches(len(splits.train), 4, epochs=1, seed=0)
        batches = list(data_loader(splits.train, sampler, workers))
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    assert {named.split(": ")[0] for batch in batches for named in batch.unreadable} == set(map(str, broken))
    assert sum(len(batch.images) for batch in batches) == len(splits.train) - 2
    assert all(len(batch.images) == len(batch.labels) for batch in batches)


def test_only_folders_of_images_are_identities(face_folder, tmp_path):
    root = tmp_path / "faces"
    shutil.copytree(face_folder, root)
    before = load_splits(str(root), (8, 8), 1, 0.3, seed=0)
    assert not before.skipped
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".hidden", "System Volume Information"):
        shutil.copytree(root / "person_0", root / folder)
    (root / "person_1" / "0.png").rename(root / "person_1" / "session.png")
    (root / "person_1" / "0.png").mkdir()  # network drives add such a folder of thumbnails for each image
    (root / "person_1" / "session.png").rename(root / "person_1" / "0.jpg")
    (root / "empty").mkdir()
    for name in ("Thumbs.db", ".DS_Store", "list.txt"):
        (root / name).touch()
        (root / "person_0" / name).touch()
    for name in ("._0.png", "1.jfif", "2.JFIF", "README"):
        (root / "person_2" / name).touch()
    actual = load_splits(str(root), (8, 8), 1, 0.3, seed=0)
    assert actual.fingerprint() == before.fingerprint()
    assert actual.skipped == {
        "hidden or system files and folders": 10,
        "files beside the folders of identities": 1,
        "folders without an image": 1,
        "folders inside the folder of an identity or video": 1,
        "files ending in .txt": 1,
        "files ending in .jfif": 2,
        "files without a suffix": 1,
    }


def test_folder_one_level_too_high_is_reported(face_folder, tmp_path):
    (tmp_path / "faces").symlink_to(face_folder)
    with pytest.raises(DataError, match="no identities in .*; skipped: folders inside the folder .* \\(9\\)"):
        load_splits(str(tmp_path), (8, 8), 1, 0.3, seed=0)


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="no identities"):
        load_splits(str(tmp_path), (8, 8), 1, 0.3, seed=0)
    for name in ("a", "b", "c", "d"):
        (tmp_path / name).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / name / "only.png")
    with pytest.raises(DataError, match="0 of them with two images"):
        load_splits(str(tmp_path), (8, 8), 1, 0.3, seed=0)


def test_order_depends_on_seed_and_step():
    full = list(TrainingBatches(50, 8, epochs=3, seed=5))
    assert len(full) == 21 and {len(b) for b in full} == {7, 8}  # the last batch is not smaller
    for epoch in range(3):
        assert sorted(i for batch in full[7 * epoch : 7 * epoch + 7] for i in batch) == list(range(50))
    assert full[:7] != full[7:14]
    resumed = TrainingBatches(50, 8, epochs=3, seed=5, start_step=10)
    assert list(resumed) == full[10:] and len(resumed) == 11
    assert list(TrainingBatches(50, 8, epochs=3, seed=6)) != full


@pytest.mark.parametrize("fraction", [0.9, 0.95])
def test_fraction_that_leaves_no_classes(fraction):
    with pytest.raises(DataError, match="identities in digits are for verification, which leaves fewer than two"):
        load_splits("digits", (8, 8), 1, fraction, seed=0)
