"""The tutorial's commands, run in order on fewer and smaller faces, and the faces themselves."""

import contextlib
import csv
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("lightning", reason="the trainer's extra is not installed")

from fused_margin import cli
from fused_margin.evaluation import find_pair_list
from fused_margin.trainer.data import load_splits

pytestmark = pytest.mark.usefixtures("blank_pictures")
DOCS = Path(__file__).parents[1] / "docs" / "guide"
TUTORIAL = (DOCS / "photographs.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TUTORIAL, flags=re.DOTALL | re.MULTILINE)
FEWER = ["--pictures", "2"]
SMALLER = ["--epochs", "1", "--model.depth", "4", "--model.widths", *"4448", "--model.embedding-size", "8"]


def draw(*arguments, script="cartoon_faces.py"):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(script, run_name="__main__")


def landmarks(folder):
    with open(folder / "landmarks.csv", newline="") as file:
        _, *rows = csv.reader(file)
    return {path: np.array(values, float).reshape(5, 2) for path, *values in rows}


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tutorial") / "faces"
    draw(folder, "--identities", 4, "--pictures", 2, script=str(DOCS / "cartoon_faces.py"))
    return folder


def test_landmarks_are_inside_every_picture(faces):
    points_of = landmarks(faces)
    assert set(points_of) == {path.relative_to(faces).as_posix() for path in faces.rglob("*.jpg")}
    assert len(points_of) == (4 + 40) * 2
    for path, points in points_of.items():
        with Image.open(faces / path) as image:
            assert (points > 0).all() and (points < image.size).all(), path
        left, right, nose, left_corner, right_corner = points
        across, down = right - left, (left_corner + right_corner - left - right) / 2
        assert across[0] * down[1] - across[1] * down[0] > 0, path  # the mouth is below the eyes at any angle
        assert (nose - left) @ across > 0 > (nose - right) @ across, path


def test_landmarks_are_at_the_eyes(faces):
    """In most pictures, those without glasses, irises are darker than their surroundings."""
    darker = []
    for path, points in landmarks(faces).items():
        pixels = np.asarray(Image.open(faces / path).convert("L"), float)
        eyes, radius = points[:2], np.linalg.norm(points[1] - points[0]) * 0.4
        y, x = np.mgrid[: pixels.shape[0], : pixels.shape[1]]
        for eye in eyes:
            distance = np.hypot(x - eye[0], y - eye[1])
            ring = pixels[(distance > 0.6 * radius) & (distance < radius)]
            darker.append(pixels[distance < 0.15 * radius].mean() < ring.mean())
    assert np.mean(darker) > 0.75


def test_pictures_depend_on_the_seed(faces, tmp_path):
    for seed in (0, 1):
        options = ["--identities", 4, "--pictures", 2, "--seed", seed]
        draw(tmp_path / str(seed), *options, script=str(DOCS / "cartoon_faces.py"))
    for path in ["landmarks.csv", "lfw/pairs.txt", "train/person_003/002.jpg", "lfw/Person_043/Person_043_0001.jpg"]:
        drawn = (faces / path).read_bytes()
        assert (tmp_path / "0" / path).read_bytes() == drawn
        assert (tmp_path / "1" / path).read_bytes() != drawn


def test_folders_are_readable(faces):
    splits = load_splits(str(faces / "train"), (16, 16), 3, 0.5, 0)
    assert (splits.train.num_classes, splits.test.num_classes) == (2, 2)
    lfw = find_pair_list(str(faces / "lfw"))()
    assert np.bincount(lfw.fold).tolist() == [8] * 10 and lfw.same.sum() == 40
    people = [
        {Path(lfw.images[item]).parent.name for item in lfw.pairs[lfw.fold == fold].ravel()} for fold in range(10)
    ]
    assert len(set.union(*people)) == sum(map(len, people))  # no identity is in two folds


@pytest.mark.slow
def test_commands_run_in_sequence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOCS / "cartoon_faces.py", tmp_path)
    (script,) = [text for language, text in BLOCKS if language == "python"]
    (tmp_path / "same_person.py").write_text(script)
    _, *commands = [text for language, text in BLOCKS if language == "sh"]  # the first block installs the package
    ran = []
    for command in [shlex.split(line) for text in commands for line in text.splitlines()]:
        match command:
            case ["python", name, *arguments]:
                draw(*arguments, *(FEWER if name == "cartoon_faces.py" else []), script=name)
            case ["cp", "-r", source, target]:
                shutil.copytree(source, target)
            case ["mkdir", folder]:
                Path(folder).mkdir()
            case ["mv", *sources, folder]:
                for source in sources:
                    shutil.move(source, folder)
            case ["cp", source, target]:
                shutil.copy(source, target)
            case ["fused-margin", *arguments]:
                smaller = SMALLER if arguments[0] == "train" and "--resume" not in arguments else []
                assert cli.main([*arguments, *smaller]) == 0, capsys.readouterr()
                ran.append(arguments[0])
            case _:
                raise AssertionError(f"the tutorial has a command that is not tested: {command}")
    assert ran == ["align", "train", "train", "train", "evaluate", "evaluate", "export", "identify"]
    cosines = re.findall(r"^cosine (\S+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(cosines) == 2 and all(-1 <= float(cosine) <= 1 for cosine in cosines)
    named = re.findall(r"^files in (\S+): (.*)$", TUTORIAL, flags=re.MULTILINE)
    assert len(named) == 4
    for folder, names in named:
        assert all((tmp_path / folder / name).exists() for name in names.split(", ")), names


@pytest.fixture
def options_of(capsys, monkeypatch):
    """The options in a command's help."""
    monkeypatch.setenv("COLUMNS", "200")

    def options(command):
        with contextlib.suppress(SystemExit):
            cli.main([command, "--help"])
        return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))

    return options


def test_options_in_the_text_exist(options_of):
    text = re.sub(r"^```.*?^```$", "", TUTORIAL, flags=re.DOTALL | re.MULTILINE)
    mentioned = [code.split() for code in re.findall(r"`([^`\n]+)`", text)]
    either = options_of("train") | options_of("evaluate") | options_of("identify")
    for words in mentioned:
        if words[0] == "fused-margin":
            assert words[1] in cli.COMMANDS, words
        if words[0] == "fused-margin" or words[0].startswith("--"):
            known = options_of(words[1]) if words[0] == "fused-margin" else either
            assert {word for word in words if word.startswith("--")} <= known, words
    assert ["--network", "paper"] in mentioned and ["fused-margin", "compare"] in mentioned
