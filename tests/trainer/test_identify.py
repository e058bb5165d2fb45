"""`fused-margin identify` on images and on features: names, thresholds, files, errors."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import own_folder  # noqa: F401
from PIL import Image
from report_pages import read_page

from fused_margin import cli
from fused_margin.evaluation import enroll, estimate_threshold
from fused_margin.trainer.evaluate.inputs import read_checkpoint
from fused_margin.trainer.identify import inputs, run

pytestmark = pytest.mark.usefixtures("own_folder")
ESCAPED = "<b>x&\"y'{{ 7 }}"  # the name of an identity
BYTES = os.fsdecode(b"caf\xe9")  # not UTF-8


def identify(*arguments):
    """Run the command, check its files against each other, and return the report of the folder `out`."""
    assert cli.main(["identify", "--output", "out", *map(str, arguments)]) == 0
    with open("out/identify.json") as file:
        report = json.load(file, parse_constant=pytest.fail)  # NaN and infinity are not JSON
    with open("out/identify.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["results"]) == report["probes"]["number"]
    for row, record in zip(rows, report["results"], strict=True):
        assert row["probe"] == record["probe"] and bool(int(row["known"])) == record["known"]
        for rank, (name, score) in enumerate(zip(record["names"], record["scores"], strict=True), 1):
            assert row[f"name{rank}"] == name and float(row[f"score{rank}"]) == pytest.approx(score, abs=1e-6)
        assert record["scores"] == sorted(record["scores"], reverse=True)
        assert record["known"] == (record["scores"][0] >= report["threshold"]["value"])
    assert report["probes"]["known"] == sum(record["known"] for record in report["results"])
    page = read_page("out/identify.html")
    assert page.numbers[:3] == [
        report["probes"]["known"],
        report["probes"]["number"] - report["probes"]["known"],
        report["threshold"]["value"],
    ]
    return report


def fails(capsys, code, *arguments):
    """Run the command, which must exit with `code`; returns its output."""
    try:
        returned = cli.main(["identify", *map(str, arguments)])
    except SystemExit as exit_:
        returned = exit_.code
    streams = capsys.readouterr()
    assert returned == code, streams
    assert "Traceback" not in streams.out + streams.err
    return " ".join((streams.out + streams.err).split())


def people(rng, identities=10, images=3):
    """Features in clusters, and the names of their identities."""
    center = rng.normal(size=(identities, 12))
    names = np.repeat([f"person {number}" for number in range(identities)], images)
    return np.repeat(center, images, axis=0) + 0.5 * rng.normal(size=(len(names), 12)), names


@pytest.mark.parametrize("template", ["mean", "all"])
def test_features_by_a_plain_loop(template, capsys):
    rng = np.random.default_rng(0)
    features, names = people(rng)
    probes = np.concatenate([features[::3] + 0.4 * rng.normal(size=(10, 12)), rng.normal(size=(6, 12))])
    np.savez("people.npz", features=features.astype(np.float32), labels=names)
    np.save("probes.npy", probes.astype(np.float32))
    report = identify("people.npz", "probes.npy", "--far", 0.1, "--top", 4, "--template", template)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    for number, record in enumerate(report["results"]):
        assert record["probe"] == f"row {number}"
        scores = {}
        for name in np.unique(names):
            members = unit[names == name]
            if template == "mean":
                members = members.mean(axis=0, keepdims=True)
                members /= np.linalg.norm(members)
            scores[name] = float(max(members @ probes[number]) / np.linalg.norm(probes[number]))
        best = sorted(scores, key=scores.get, reverse=True)[:4]
        assert record["names"] == best
        assert record["scores"] == pytest.approx([scores[name] for name in best], abs=1e-5)
    expected = estimate_threshold(features, names, enroll(features, names, template), 0.1)
    assert report["threshold"]["value"] == pytest.approx(expected.threshold, abs=1e-5)
    assert report["threshold"]["measured"] == expected.measured
    assert 8 <= report["probes"]["known"] <= 12
    printed = capsys.readouterr().out
    assert f"{report['probes']['known']} of 16 probes known" in printed and "person 3 0." in printed
    assert "estimated for FAR 0.1 from 30 images of the gallery\n" in printed
    page = read_page("out/identify.html")
    assert not page.all("img") and not page.mistakes and "row 15" in page.text


def test_thresholds(capsys):
    rng = np.random.default_rng(1)
    features, names = people(rng)
    np.savez("people.npz", features=features, labels=names)
    np.savez("probes.npz", features=features[:5], labels=names[:5])
    report = identify("people.npz", "probes.npz")  # FAR 0.01
    assert not report["threshold"]["resolved"] and report["threshold"]["measured"] == 0
    text = "with fewer than 100 images, it is above all of their scores with other identities"
    assert text in capsys.readouterr().out and text in read_page("out/identify.html").text
    assert report["results"][4]["probe"] == "row 4, person 1"
    for far, needed in ((0.03, 34), (0.02, 50)):  # rounded up
        report = identify("people.npz", "probes.npz", "--far", far)
        assert f"with fewer than {needed} images, it is above" in report["threshold"]["text"]
    report = identify("people.npz", "probes.npz", "--threshold", 1)
    assert report["threshold"] == {
        "value": 1.0,
        "far": None,
        "measured": None,
        "resolved": True,
        "text": "threshold 1.000, as given",
    }
    assert report["probes"]["known"] == 0 and "unknown" in capsys.readouterr().out
    identify("people.npz", "probes.npz", "--threshold", 0.98, "--template", "all", "--top", 2)
    text = read_page("out/identify.html").text
    assert "fused-margin identify people.npz probes.npz --threshold 1.0 --top 2 --template all" in text
    assert identify("people.npz", "probes.npz", "--threshold", -1, "--top", 99)["probes"]["known"] == 5
    with open("out/identify.json") as file:
        assert len(json.load(file)["results"][0]["names"]) == 10  # all identities

    np.savez("one.npz", features=features, labels=np.repeat("Ann", 30))
    assert "choose one with --threshold" in fails(capsys, 1, "one.npz", "probes.npz")
    assert identify("one.npz", "probes.npz", "--threshold", 0.1)["results"][0]["names"] == ["Ann"]


def test_folders_of_features():
    rng = np.random.default_rng(2)
    features, names = people(rng, 4, 2)
    for name in np.unique(names):
        Path("people", name).mkdir(parents=True)
        np.save(Path("people", name, "1.npy"), features[names == name])
    Path("people", "notes.txt").touch()
    np.savez("probes.npz", features=features)
    report = identify("people", "probes.npz", "--threshold", 0.9)
    assert [record["names"][0] for record in report["results"]] == names.tolist()
    assert report["skipped"] == {"files ending in .txt": 1}
    for number in (1, 2):
        assert cli.main(["identify", "people", "probes.npz", "--threshold", "0.9"]) == 0
        assert sorted(os.listdir("probes-identified")) == ["identify.csv", "identify.html", "identify.json"], number


@pytest.fixture
def gallery(face_folder, tmp_path):
    """Six of the identities with two images each, of which two have unusual names; the other images are probes."""
    for number in range(9):
        images = [face_folder / f"person_{number}" / f"{k}.png" for k in range(4 if number < 8 else 1)]
        name = {0: ESCAPED, 1: BYTES}.get(number, f"person_{number}")
        for k, image in enumerate(images):
            target = Path("people", name) if number < 6 and k < 2 else Path("visitors", f"{number}")
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
    return tmp_path


def test_images(digits_run, gallery, monkeypatch, capsys):
    Path("people", BYTES, "broken.jpg").write_bytes(b"no image")
    Path("people", "nobody").mkdir()
    Path("people", "nobody", "broken.jpg").write_bytes(b"no image")
    Path("visitors", "broken.jpg").write_bytes(b"no image")
    Path("visitors", "list.txt").touch()
    report = identify("people", "visitors", "--checkpoint", digits_run, "--far", 0.2, "--top", 2)
    assert report["gallery"]["identities"] == 6 and report["gallery"]["images"] == 12
    assert report["gallery"]["unread_identities"] == ["nobody"]
    probes = [record["probe"] for record in report["results"]]
    assert probes == sorted(probes) and probes[0] == "0/2.png" and len(probes) == 6 * 2 + 2 * 4 + 1
    own = {"0": ESCAPED, "1": BYTES, **{str(number): f"person_{number}" for number in range(2, 6)}}
    found = [record["names"][0] == own.get(record["probe"][0]) for record in report["results"][:12]]
    assert np.mean(found) > 0.7  # even a hardly trained network separates these patterns
    assert len(report["unreadable"]) == 3 and report["skipped"] == {"files ending in .txt": 1}
    printed = capsys.readouterr().out
    assert "skipped 3 unreadable images:" in printed and "people/nobody/broken.jpg: it is damaged" in printed
    assert "not in the gallery, because no image can be read: nobody" in printed
    assert "caf\\udce9" in printed and ESCAPED in printed

    page = read_page("out/identify.html")
    cards = [*page.mistakes["known"], *page.mistakes["unknown"]]
    assert len(cards) == 21 and len(page.all("img")) == 42
    assert len(page.mistakes["known"]) == report["probes"]["known"]
    known = [record for record in report["results"] if record["known"]]
    for record, card in zip(known, page.mistakes["known"], strict=True):
        assert card["numbers"] == pytest.approx(record["scores"])
        assert card["captions"][0] == f"visitors/{record['probe']}"[-len(card["captions"][0]) :]
        assert record["names"][0].replace(BYTES, "caf\\udce9") in card["captions"][1]
    assert ESCAPED in page.text and ESCAPED not in page.source
    assert "nobody" in page.text and "broken.jpg: it is damaged" in page.text

    # The latest run is the default, and one image is a probe too.
    monkeypatch.chdir(digits_run.parents[1])
    one = gallery / "visitors" / "3" / "2.png"
    assert cli.main(["identify", str(gallery / "people"), str(one), "--output", str(gallery / "one")]) == 0
    record = json.loads((gallery / "one" / "identify.json").read_text())["results"][0]
    assert record["probe"] == "2.png" and record["names"][:2] == report["results"][probes.index("3/2.png")]["names"]


def test_scores_are_those_of_the_network(digits_run, gallery):
    """Images are decoded and features are combined as in an evaluation, for both values of flip."""
    network = read_checkpoint(digits_run / "checkpoint.pt", str(gallery / "visitors"), None)
    found = network.features(torch.device("cpu"), mirror=True, workers=0, folds=None, show=print)
    names = [Path(found.shown.name(row)).relative_to(gallery / "visitors").as_posix() for row in range(21)]
    own = read_checkpoint(digits_run / "checkpoint.pt", str(gallery / "people"), None)
    enrolled = own.features(torch.device("cpu"), mirror=True, workers=0, folds=None, show=print)
    for flip in ("none", "concat"):
        rows, probes = (
            np.hstack([part.features.features, part.features.mirrored][: 1 + (flip == "concat")])
            for part in (enrolled, found)
        )
        rows, probes = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, probes))
        best = dict(zip(names, (probes @ rows.T).max(axis=1), strict=True))
        options = "--checkpoint", digits_run, "--flip", flip, "--template", "all", "--threshold", 0.5
        report = identify("people", "visitors", *options)
        assert report["flip"] == flip
        for record in report["results"]:
            assert record["scores"][0] == pytest.approx(best[record["probe"]], abs=1e-5)


def test_long_lists_are_cut(digits_run, gallery, monkeypatch, capsys):
    from fused_margin.trainer.pages import identify as page_module

    monkeypatch.setattr(run, "MAX_PRINTED", 2)
    monkeypatch.setattr(page_module, "MAX_PICTURED", 3)
    monkeypatch.setattr(page_module, "MAX_LISTED", 4)
    identify("people", "visitors", "--checkpoint", digits_run, "--threshold", -1)
    assert "19 more in identify.csv" in capsys.readouterr().out
    page = read_page("out/identify.html")
    assert len(page.mistakes["known"]) == 3 and "The first 3 of 21 probes," in page.text
    assert "17 more are in identify.csv" in page.text and page.text.count("5/2.png") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("nowhere .", "gallery: there is no 'nowhere'"),
        (". nowhere", "probes: there is no 'nowhere'"),
        (". . --threshold 0.5 --far 0.1", "threshold, far: give one of them"),
        (". . --threshold 1.5", "threshold must be a cosine from -1 to 1, got 1.5"),
        (". . --far 0", "far must be between 0 and 1, got 0.0"),
        (". . --top 0", "top must be at least 1, got 0"),
        (". . --workers -1", "workers must not be negative"),
        ("people", "PROBES"),
    ],
)
def test_invalid_options(capsys, options, message):
    assert message in fails(capsys, 2, *options.split())


def test_inputs_that_do_not_allow_it(digits_run, gallery, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    np.savez("people.npz", features=rng.normal(size=(4, 3)), labels=np.array(["a", "a", "b", "b"]))
    np.save("probes.npy", rng.normal(size=(4, 3)))
    np.save("wide.npy", rng.normal(size=(4, 5)))
    Path("empty").mkdir()
    Path("list.txt").write_text("a.png 1")
    monkeypatch.setattr(inputs, "embed", None)  # no feature is computed
    trained = "--checkpoint", digits_run
    for arguments, message in (
        (("people", "visitors"), "no run to identify with in runs/; name its folder with --checkpoint"),
        (("people", "visitors", "--checkpoint", "nowhere"), "no checkpoint at nowhere"),
        (("people", "probes.npy"), "people has images, probes.npy has features: expected the same in both"),
        (("people.npz", "visitors"), "people.npz has features, visitors has images"),
        (("people.npz", "probes.npy", *trained), "checkpoint: only for images, and people.npz has features"),
        (("people.npz", "probes.npy", "--flip", "sum"), "flip: only for images"),
        (("people.npz", "wide.npy"), "wide.npy has features of 5 dimensions, people.npz of 3"),
        (("probes.npy", "people.npz"), "probes.npy has no identities of its features"),
        (
            ("empty", "visitors", *trained),
            "no images or features in empty: expected empty/identity/... with files ending in",
        ),
        (("people", "empty", *trained), "no images or features in empty: expected files ending in"),
        (("people", "list.txt", *trained), "list.txt is neither an image nor a file of features"),
        (("list.txt", "visitors", *trained), "list.txt is neither a folder of images"),
        (("people", "visitors", *trained, "--backbone", "a.b"), "is not a.b, but small; leave out the option"),
    ):
        assert message in fails(capsys, 1, *arguments)
    monkeypatch.undo()
    monkeypatch.chdir(gallery)
    Path("x.png").write_bytes(b"no image")
    printed = fails(capsys, 1, "people", "x.png", *trained)
    assert "1 image to compute features of, none of which can be read: x.png: it is damaged" in printed
    np.savez("people.npz", features=np.ones((4, 3)), labels=np.array([0.0, 0.0, 1.0, 1.0]))
    assert "people.npz: labels: expected (n,) texts or integers" in fails(capsys, 1, "people.npz", "probes.npy")
    np.savez("people.npz", features=np.full((4, 3), np.nan), labels=np.array(["a", "a", "b", "b"]))
    assert "people.npz has NaN or infinity in 4 of its 4 vectors" in fails(capsys, 1, "people.npz", "probes.npy")
    assert not Path("probes-identified").exists() and not Path("visitors-identified").exists()


def test_interruption_leaves_no_files(digits_run, gallery, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "recognize", interrupted)
    assert "interrupted" in fails(capsys, 130, "people", "visitors", "--checkpoint", digits_run)
    assert not Path("visitors-identified").exists()


def test_upright_images(digits_run, gallery):
    """A photograph is turned as its EXIF orientation says, like everywhere in the trainer."""
    with Image.open("visitors/3/2.png") as image:
        exif = image.getexif()
        exif[0x0112] = 6  # shown after a quarter turn clockwise
        image.transpose(Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    scores = [
        identify("people", path, "--checkpoint", digits_run, "--threshold", 0)["results"][0]["scores"]
        for path in ("turned.png", "visitors/3/2.png")
    ]
    assert scores[0] == pytest.approx(scores[1])
