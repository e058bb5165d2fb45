"""`fused-margin evaluate` on a trained network: images, verification sets, options, errors."""

import io
import json
import pickle
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from evaluations import clusters, evaluate, fails, own_folder, write  # noqa: F401
from PIL import Image
from report_pages import read_page

from fused_margin import cli
from fused_margin.trainer.evaluate import inputs
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures", "own_folder")
TRAIN = """train --data digits --epochs 2 --batch-size 64 --model.image-size 8 8 --model.widths 4 4 8 8
    --model.embedding-size 8 --evaluation.pairs 200 --accelerator cpu"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of 40 steps, in its runs/."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert cli.main([*TRAIN.split(), "--output", "runs/digits"]) == 0
    return root / "runs" / "digits"


def test_default_options_repeat_the_report_of_the_training(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained.parents[1])  # runs/ has one run, the latest
    assert cli.main(["evaluate"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "3 identities not trained on" in printed and "pairs.json, pairs.png" in printed
    ours, theirs = (json.loads((trained / name).read_text()) for name in ("pairs.json", "report.json"))
    for name in ("accuracy", "accuracy_std", "fold_accuracy", "fold_threshold", "pairs", "folds_share_no_identity"):
        assert ours["result"][name] == theirs["verification"][name], name
    assert ours["scores"]["auc"] == theirs["verification"]["auc"]
    assert ours["scores"]["tar_at_far"] == theirs["verification"]["tar_at_far"]
    assert ours["separability"] == pytest.approx(theirs["separability"])
    assert ours["flip"] == "none" and ours["input"]["rows"] == theirs["data"]["test"]["images"]


def test_protocols_on_a_trained_network(pictures, trained):
    sums = evaluate("--checkpoint", trained, "--protocol", "lfw", drawn=True)
    joined = evaluate("--checkpoint", trained / FILE_NAME, "--protocol", "lfw", "--variant", "regularface", drawn=True)
    for report in (sums, joined):
        assert report["result"]["pairs"] == 200 and len(report["result"]["fold_accuracy"]) == 10
    assert sums["result"]["accuracy"] >= 0.5  # after 40 steps, distances are below the first steps of the grid
    assert joined["result"]["accuracy"] > 0.6
    assert (sums["flip"], sums["result"]["threshold_unit"]) == ("sum", "squared distance")
    assert (joined["flip"], joined["result"]["threshold_unit"]) == ("concat", "cosine")
    assert not sums["result"]["tar_over_folds"]["far_resolved"]  # 90 impostors, FAR 1e-3
    assert "tar_over_folds" not in joined["result"]

    actual = evaluate("--checkpoint", trained, "--protocol", "megaface", "--probes", 0.7, drawn=True)
    result = actual["result"]
    assert result["probe_identities"] == 2 and result["probes"] + result["distractors"] == 539
    assert [row["distractors"] for row in result["rank1"]] == [10, 100, result["distractors"]]
    rates = [row["rate"] for row in result["rank1"]]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0.2
    assert actual["scores"]["impostors"] == result["probes"] * result["distractors"]
    assert actual["scores"]["far"] == 1e-6 and not actual["scores"]["far_resolved"]


def test_evaluation_on_other_images(trained, face_folder, capsys):
    broken = face_folder / "person_3" / "9.jpg"
    broken.write_bytes(b"\xff\xd8 nothing more")
    other = face_folder / "person_3" / "9.jfif"
    other.touch()
    try:
        report = evaluate("--checkpoint", trained, "--data", face_folder, "--num-pairs", 60, "--flip", "concat")
    finally:
        broken.unlink()
        other.unlink()
    assert report["input"]["rows"] == 8 * 4 + 1  # all identities, because none was trained on
    (unreadable,) = report["input"]["unreadable"]
    assert unreadable.startswith(f"{broken}: it is damaged, no image") and report["input"]["dimensions"] == 8
    assert "9 identities not trained on" in report["input"]["description"]
    assert report["input"]["skipped"] == {"files ending in .jfif": 1}
    printed = capsys.readouterr().out
    assert (
        "skipped 1 unreadable image, listed in the report" in printed
        and "skipped: files ending in .jfif (1)" in printed
    )
    assert report["result"]["accuracy"] > 0.6  # even an untrained network separates these patterns


def test_embedded_images_are_not_a_folder_of_that_name(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "pairs.txt").write_text("not a list\n")
    report = evaluate("--checkpoint", trained.resolve(), "--data", "digits", "--num-pairs", 60)
    assert "handwritten digits" in report["input"]["description"]


def test_other_images_need_no_split(face_folder, capsys, tmp_path):
    """A run trained on all identities can be evaluated on other images, and any run on two identities."""
    assert cli.main([*TRAIN.split(), "--epochs", "1", "--test-fraction", "0", "--output", "all"]) == 0
    arguments = "--checkpoint", "all", "--num-pairs", 60
    assert evaluate(*arguments, "--data", face_folder)["input"]["rows"] == 33
    for name in ("person_0", "person_1"):
        shutil.copytree(face_folder / name, tmp_path / "two" / name)
    assert evaluate(*arguments, "--data", "two")["input"]["rows"] == 8
    for image in list(Path("two").glob("*/[1-9].png")):
        image.unlink()
    capsys.readouterr()
    printed = fails(capsys, 1, *arguments, "--data", "two")
    assert "there are images of 2 identities, 0 of them with two or more" in printed and "train" not in printed
    shutil.rmtree("two/person_1")
    printed = fails(capsys, 1, *arguments, "--data", "two")
    assert "has images of one identity; at least two are needed" in printed and "train" not in printed


@pytest.mark.slow
def test_identities_with_trained_names_are_counted(face_folder, capsys, tmp_path):
    options = [
        "--model.image-size",
        "8",
        "8",
        "--model.widths",
        "4",
        "4",
        "8",
        "8",
        "--model.embedding-size",
        "8",
        "--accelerator",
        "cpu",
    ]
    assert cli.main(["train", "--data", str(face_folder), "--epochs", "1", *options, "--output", "run"]) == 0
    trained_on = load_checkpoint(Path("run", FILE_NAME))["identities"]
    shutil.copytree(face_folder, tmp_path / "copy")
    arguments = "--checkpoint", "run", "--data", "copy", "--num-pairs", 60
    description = evaluate(*arguments)["input"]["description"]
    assert description.endswith(f"9 identities, {len(trained_on)} with the name of a training identity")
    for name in trained_on[1:]:
        Path("copy", name).rename(Path("copy", f"other_{name}"))
    assert "9 identities, 1 with the name of a training identity" in evaluate(*arguments)["input"]["description"]

    state = load_checkpoint(Path("run", FILE_NAME))
    del state["identities"]  # as in an older version
    save_checkpoint(Path("run", FILE_NAME), state)
    assert "it is unknown whether the network was trained on any" in evaluate(*arguments)["input"]["description"]


def test_changed_images_are_an_error(trained, capsys, tmp_path):
    state = load_checkpoint(trained / FILE_NAME)
    save_checkpoint(tmp_path / FILE_NAME, {**state, "data": "of other images"})
    assert "have changed since the training" in fails(capsys, 1, "--checkpoint", tmp_path)
    del state["model"]["backbone.embedding.weight"]
    save_checkpoint(tmp_path / FILE_NAME, state)
    assert "do not fit the network" in fails(capsys, 1, "--checkpoint", tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--protocol ijbc", "ijbc"),
        ("--protocol lfw --flip none", "flip: lfw's variant insightface prescribes sum"),
        ("--protocol lfw --metric weighted-l1", "metric: lfw's variants prescribe theirs; for weighted-l1"),
        (
            "--protocol megaface --metric weighted-l1",
            "metric: megaface searches by the cosine; weighted-l1 is for pairs",
        ),
        ("--metric l2", "l2"),
        ("--features x.npz --checkpoint runs", "features: cannot be combined with checkpoint or data"),
        ("--data no/such/folder", "no folder 'no/such/folder'"),
        ("--far 0", "far must be between 0 and 1"),
        ("--folds 1", "folds must be at least 2"),
        ("--num-pairs 3", "num-pairs must be at least two per fold"),
        ("--probes 1", "probes must be between 0 and 1"),
        ("--workers -1", "workers must not be negative"),
    ],
)
def test_invalid_options(capsys, options, message):
    assert message in fails(capsys, 2, *options.split())


def test_every_option_has_help(capsys):
    printed = fails(capsys, 0, "--help")
    for words in ("--checkpoint", "--features", "--variant", "Mirror", "Share of the identities"):
        assert words.lower() in printed.lower()


def test_missing_network(capsys, tmp_path):
    assert "no run to evaluate in runs/" in fails(capsys, 1)
    assert "no checkpoint at nowhere" in fails(capsys, 1, "--checkpoint", "nowhere")
    (tmp_path / FILE_NAME).write_bytes(b"damaged")
    assert "cannot read the checkpoint" in fails(capsys, 1, "--checkpoint", tmp_path)
    save_checkpoint(tmp_path / FILE_NAME, {"config": {"data": "digits"}})
    assert "cannot evaluate" in fails(capsys, 1, "--checkpoint", tmp_path)


def encoded_digit(rng, shade):
    pixels = (rng.random((8, 8)) * 60 + shade).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_published_verification_sets(trained, monkeypatch, tmp_path, capsys):
    """A .bin file, an LFW folder and videos, with images of two shades."""
    rng = np.random.default_rng(0)
    shades = [(20, 20) if row % 2 else (20, 180) for row in range(40)]
    images = [encoded_digit(rng, shade) for pair in shades for shade in pair]
    flags = [row % 2 == 1 for row in range(40)]
    Path("faces.bin").write_bytes(pickle.dumps((images, flags)))
    report = evaluate("--checkpoint", trained, "--data", "faces.bin", "--protocol", "lfw")
    assert report["result"]["pairs"] == 40 and report["input"]["rows"] == 80
    assert evaluate("--checkpoint", trained, "--data", "faces.bin")["scores"]["genuine"] == 20

    names, lines = ["Ann_Lee", "Bo", "Cy"], ["2\t3"]
    for name, shade in zip(names, (20, 100, 180), strict=True):
        for folder in (Path("lfw", name), Path("ytf", name, "0"), Path("ytf", name, "1")):
            folder.mkdir(parents=True)
            for number in range(1, 4):
                (folder / f"{name}_{number:04d}.png").write_bytes(encoded_digit(rng, shade))
    for _ in range(2):
        lines += [f"{name}\t1\t2" for name in names] + [f"{a}\t3\t{b}\t1" for a, b in pairwise([*names, names[0]])]
    Path("lfw/pairs.txt").write_text("\n".join(lines))
    report = evaluate("--checkpoint", trained, "--data", "lfw", "--protocol", "lfw", "--variant", "regularface")
    assert report["result"]["pairs"] == 12 and len(report["result"]["fold_accuracy"]) == 2

    rows = ["split number, first name, second name, is same"]
    for split in (1, 2):
        rows += [f"{split}, {n}/0, {n}/1, 1" for n in names] + [f"{split}, {names[0]}/0, {n}/1, 0" for n in names[1:]]
    Path("ytf/splits.txt").write_text("\n".join(rows))
    Path("ytf/Bo/0/Bo_0001.png").write_bytes(b"no image")  # two frames of the video remain
    for data in ("ytf", "ytf/splits.txt"):
        report = evaluate("--checkpoint", trained, "--data", data, "--protocol", "ytf")
        assert report["result"]["pairs"] == 10 and report["input"]["rows"] == 17
        assert len(report["input"]["unreadable"]) == 1
    page = read_page("out/ytf.html")
    assert "Bo_0001.png: it is damaged" in page.text and "middle frames of the videos" in page.text
    shown = {caption for cards in page.mistakes.values() for card in cards for caption in card["captions"]}
    assert shown <= {f"0/{name}_0002.png" for name in names} | {f"1/{name}_0002.png" for name in names} | {
        "0/Bo_0003.png"
    }

    # A protocol for another kind of set is an error before any feature is computed.
    monkeypatch.setattr(inputs, "embed", None)
    for data, protocol, message in (
        ("ytf", "pairs", "splits.txt has pairs of videos: evaluate it with --protocol ytf"),
        ("ytf", "lfw", "splits.txt has pairs of videos: evaluate it with --protocol ytf"),
        ("ytf", "megaface", "without their identities, which megaface needs: evaluate it with --protocol ytf"),
        ("lfw", "ytf", "pairs.txt has pairs of images, and --protocol ytf compares videos"),
        ("lfw", "megaface", "without their identities, which megaface needs"),
        ("faces.bin", "ytf", "faces.bin has pairs of images, and --protocol ytf compares videos"),
        ("digits", "ytf", "digits has images of identities, and --protocol ytf compares videos"),
    ):
        assert message in fails(capsys, 1, "--checkpoint", trained, "--data", data, "--protocol", protocol)
    monkeypatch.undo()

    # In a folder with both sets, the protocol selects one.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    Path("ytf/pairs.txt").write_text(Path("lfw/pairs.txt").read_text())
    for name in names:
        for number in range(1, 4):
            Path("ytf", name, f"{name}_{number:04d}.png").write_bytes(encoded_digit(rng, 20))
    assert evaluate("--checkpoint", trained, "--data", "ytf", "--protocol", "ytf")["result"]["pairs"] == 10
    assert evaluate("--checkpoint", trained, "--data", "ytf")["result"]["pairs"] == 12


def test_pairs_without_folds(trained, capsys):
    """LFW's pairsDevTest.txt has all genuine pairs, then all impostor pairs, and no folds."""
    rng = np.random.default_rng(0)
    names = [f"P_{number}" for number in range(12)]
    for number, name in enumerate(names):
        Path("lfw", name).mkdir(parents=True)
        for photograph in (1, 2):
            Path("lfw", name, f"{name}_{photograph:04d}.png").write_bytes(encoded_digit(rng, 15 * number))
    lines = ["12", *(f"{name}\t1\t2" for name in names), *(f"{a}\t1\t{b}\t2" for a, b in pairwise([*names, "P_0"]))]
    Path("lfw/pairs.txt").write_text("\n".join(lines))
    Path("lfw/pairsDevTest.txt").write_text("\n".join(lines))
    listed = evaluate("--checkpoint", trained, "--data", "lfw/pairsDevTest.txt", "--protocol", "lfw")
    assert listed["result"]["pairs"] == 24 and listed["input"]["description"].endswith("pairsDevTest.txt")
    arguments = "--checkpoint", trained, "--data", "lfw", "--protocol", "lfw"
    assert len(evaluate(*arguments)["result"]["fold_accuracy"]) == 10
    assert len(evaluate(*arguments, "--folds", 4)["result"]["fold_accuracy"]) == 4
    gone = load_checkpoint(trained / FILE_NAME)
    gone["config"]["data"] = "folder/that/is/gone"
    Path("moved").mkdir()
    save_checkpoint(Path("moved", FILE_NAME), gone)
    moved = evaluate("--checkpoint", "moved", *arguments[2:])
    assert moved["result"]["fold_accuracy"] == evaluate(*arguments)["result"]["fold_accuracy"]
    assert "pairs.txt: pairs: expected at least 13 genuine and 13 impostor pairs" in fails(
        capsys, 1, *arguments, "--folds", 13
    )


def test_options_that_do_not_apply_to_the_input(trained, capsys):
    rng = np.random.default_rng(0)
    for name in ("A", "B", "C", "D"):
        Path("lfw", name).mkdir(parents=True)
        for photograph in (1, 2):
            Path("lfw", name, f"{name}_{photograph:04d}.png").write_bytes(encoded_digit(rng, 0))
    lines = ["2\t2", "A\t1\t2", "B\t1\t2", "A\t1\tB\t1", "B\t1\tA\t2"]
    lines += [line.translate(str.maketrans("AB", "CD")) for line in lines[1:]]
    Path("lfw/pairs.txt").write_text("\n".join(lines))
    features = np.eye(8, dtype=np.float32)
    pairs, same = np.array([[0, 1], [0, 2], [4, 5], [4, 6]]), np.array([True, False] * 2)
    np.savez("given.npz", features=features, pairs=pairs, same=same, fold=np.array([0, 0, 1, 1]))
    for arguments, number in ((("--checkpoint", trained, "--data", "lfw"), 8), (("--features", "given.npz"), 4)):
        assert "gives 2 folds, not 3" in fails(capsys, 1, *arguments, "--folds", 3)
        assert f"gives {number} pairs" in fails(capsys, 1, *arguments, "--num-pairs", 400)
        evaluate(*arguments, "--folds", 2, "--num-pairs", number)  # unchanged
        printed = fails(capsys, 1, *arguments, "--protocol", "megaface", "--folds", 5)
        assert "folds, num-pairs: the protocol megaface has neither" in printed


def test_error_of_images_names_their_file(trained, capsys):
    rng = np.random.default_rng(0)
    Path("faces.bin").write_bytes(pickle.dumps(([encoded_digit(rng, 20)] * 40, [True] * 20)))
    printed = fails(capsys, 1, "--checkpoint", trained, "--data", "faces.bin")
    assert "faces.bin: same: expected genuine and impostor pairs" in printed


def test_pair_without_its_image_is_an_error(trained, capsys):
    rng = np.random.default_rng(0)
    Path("faces.bin").write_bytes(pickle.dumps(([encoded_digit(rng, 20)] * 39 + [b"no image"], [True, False] * 10)))
    assert "image 39" in fails(capsys, 1, "--checkpoint", trained, "--data", "faces.bin")
