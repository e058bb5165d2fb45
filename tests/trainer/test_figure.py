"""`fused-margin figure`: its picture and numbers, the common start of all losses, errors and interruption."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_command
from PIL import Image

from fused_margin import cli
from fused_margin.trainer.figure import run as figure_run
from fused_margin.trainer.figure.config import PANELS
from fused_margin.trainer.figure.run import Geometry, measure, split_images
from fused_margin.trainer.train.loop import Trainer

TINY = ["figure", "--losses", "softmax", "regularface", "--epochs", "1", "--softmax-epochs", "1"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(cli.__file__).parents[1]), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def panels(monkeypatch):
    """The panels drawn by the runs of a test."""
    drawn, draw = [], figure_run.draw_panels

    def keep(path, title, panels, names, colors):
        drawn.append(panels)
        draw(path, title, panels, names, colors)

    monkeypatch.setattr(figure_run, "draw_panels", keep)
    return drawn


def test_measures_by_hand():
    embeddings = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, -2.0], [-1.0, 1.0]])
    labels = np.array([0, 0, 1, 2])
    # Weights are at 0, -60 and 150 degrees: samples are 0, 45, 30 and 15 degrees from their class weights.
    weight = np.array([[2.0, 0.0], [0.5, -(3**0.5) / 2], [-(3**0.5), 1.0]])
    actual = measure(embeddings, labels, weight, np.array([0, 0, 1, 1]))
    assert actual == pytest.approx(Geometry(0.75, (0 + 45 + 30 + 15) / 4, 60))


def test_picture_and_numbers(panels, capsys):
    assert cli.main([*TINY, "--digits", "3", "8", "6", "--output", "here"]) == 0
    printed = capsys.readouterr().out
    assert "softmax (1 of 2)" in printed and "files in here: figure.json, figure.png" in printed
    with Image.open("here/figure.png") as picture:
        assert picture.width >= 900 and np.asarray(picture.convert("L")).std() > 10
    report = json.loads(Path("here/figure.json").read_text(), parse_constant=pytest.fail)
    assert report["digits"] == [3, 8, 6] and report["images"]["train"] + report["images"]["held_out"] == 538
    assert list(report["losses"]) == ["softmax", "regularface"]
    assert report["losses"]["regularface"]["loss"]["exclusive_weight"] == 1

    for panel, numbers in zip(panels[0], report["losses"].values(), strict=True):
        weight = np.array(numbers["class_weight"])
        angles = [
            np.degrees(np.arccos(x @ weight[y] / np.linalg.norm(x) / np.linalg.norm(weight[y])))
            for x, y in zip(panel.test.astype(float), panel.test_labels, strict=True)
        ]
        assert numbers["mean_angle_to_own_class"] == pytest.approx(np.mean(angles), rel=1e-4)
        directions = np.degrees(np.arctan2(*weight.T))
        apart = [abs((a - b + 180) % 360 - 180) for i, a in enumerate(directions) for b in directions[:i]]
        assert numbers["smallest_angle_between_classes"] == pytest.approx(min(apart), rel=1e-4)
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)  # of SphereFace, which classifies by the cosine alone
    assert numbers["held_out_accuracy"] == np.mean((panel.test @ unit.T).argmax(axis=1) == panel.test_labels)
    np.testing.assert_allclose(np.linalg.norm(weight, axis=1), 1, rtol=1e-6)

    assert cli.main([*TINY, "--digits", "3", "8", "6", "--output", "again"]) == 0
    again = json.loads(Path("again/figure.json").read_text())
    for name in report["losses"]:
        assert report["losses"][name].pop("seconds") and again["losses"][name].pop("seconds")
    assert again == report


def test_all_losses_start_from_the_softmax_network(panels, monkeypatch):
    fit, calls = Trainer.fit, []

    def first_alone(self, *arguments, **options):
        calls.append(self.config.loss.name)
        if len(calls) == 1:
            fit(self, *arguments, **options)
        else:
            self.losses.append(0.0)

    monkeypatch.setattr(Trainer, "fit", first_alone)
    assert cli.main([*TINY, "--losses", *PANELS]) == 0
    assert calls == [
        "softmax",
        "softmax",
        "modified-softmax",
        "softmax",
        "sphereface",
        "cosface",
        "arcface",
        "sphereface",
    ]
    first, *others = panels[0]
    assert first.geometry.accuracy > 0.4
    for other in others:
        np.testing.assert_array_equal(other.test, first.test)
        unit = first.class_weight / np.linalg.norm(first.class_weight, axis=1, keepdims=True)
        expected = first.class_weight if "center" in other.title else unit
        np.testing.assert_allclose(other.class_weight, expected, rtol=1e-6)


def test_images_are_held_out():
    splits = split_images((7, 1), (16, 16), seed=0)
    assert splits.train.identities == splits.test.identities == ["7", "1"]
    counts = [torch.bincount(part.labels).tolist() for part in (splits.train, splits.test)]
    assert np.abs(np.subtract(*counts)).max() <= 1
    shown = {image.numpy().tobytes() for image in splits.train.images}
    assert not any(image.numpy().tobytes() in shown for image in splits.test.images)


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_margins_that_fit_the_plane(num_classes):
    cosface, arcface = (PANELS[name].settings(num_classes) for name in ("cosface", "arcface"))
    assert cosface.scale == arcface.scale > 0
    largest = 1 - np.cos(2 * np.pi / num_classes)
    assert cosface.margin == pytest.approx({2: 0.35, 3: 0.35, 10: largest / 2}[num_classes])
    assert arcface.margin == pytest.approx({2: 0.5, 3: 0.5, 10: np.pi / 10}[num_classes])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--digits 3", "digits must be two or more of 0 to 9, each once, got 3"),
        ("--digits 1 1 2", "digits must be two or more of 0 to 9, each once, got 1 1 2"),
        ("--digits 1 10", "digits must be two or more of 0 to 9"),
        ("--losses softmax softmax", "losses must be one or more, each once"),
        ("--losses triplet", "triplet"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--softmax-epochs -1", "softmax-epochs must be at least 0, got -1"),
        ("--losses", "losses must be one or more, each once, got none"),
        ("--seed -1", "seed must be at least 0"),
        (f"--seed {2**32}", "seed must be at most"),
    ],
)
def test_invalid_options(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["figure", *options.split()])
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert exit_.value.code == 2 and message in printed and "Traceback" not in printed
    assert not Path("runs").exists()


def test_invalid_output(capsys):
    Path("file").write_text("")
    assert cli.main([*TINY, "--output", "file"]) == 1
    assert "error: " in capsys.readouterr().err


def test_interruption(forks):
    process = forks.start(run_command, "figure", "--epochs", "1000", "--softmax-epochs", "1")
    deadline = time.monotonic() + 60
    while "1 of 7" not in process.output:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and "Traceback" not in process.output
    assert "interrupted: nothing was written" in process.output and not list(Path("runs/figure").iterdir())
