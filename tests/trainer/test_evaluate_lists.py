"""`fused-margin evaluate --protocol megaface --lists`: features and images that MegaFace's lists name."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import evaluate, fails, own_folder  # noqa: F401
from PIL import Image
from report_pages import read_page

from fused_margin.trainer.data import load_splits
from fused_margin.trainer.train.checkpoint import FILE_NAME
from fused_margin.trainer.train.loop import Trainer

pytestmark = pytest.mark.usefixtures("blank_pictures", "own_folder")

PROBES = [f"{name}/{number}.png" for name in ("Ada", "Bo", "Cy") for number in range(2)]
DISTRACTORS = [f"{number}/photo.png" for number in range(5)]
SETS = {(2, 1): [3, 4], (2, 2): [1, 0], (4, 1): [0, 1, 2, 3]}
LISTED = "--protocol", "megaface", "--lists", "lists", "--distractors", "mega"


@pytest.fixture
def pixels(own_folder):  # noqa: F811
    """Lists of two sizes, one of which has two sets, and an image of each path; returns the pixels."""
    rng = np.random.default_rng(0)
    Path("lists").mkdir()
    probes = {"path": PROBES, "id": [path.split("/")[0] for path in PROBES]}
    Path("lists/facescrub_features_list.json").write_text(json.dumps(probes))
    for (size, number), rows in SETS.items():
        listed = {"path": [DISTRACTORS[row] for row in rows]}
        Path(f"lists/megaface_features_list.json_{size}_{number}").write_text(json.dumps(listed))
    written = []
    for root, paths in (("scrub", PROBES), ("mega", DISTRACTORS)):
        for path in paths:
            written.append(rng.integers(0, 256, (8, 8)).astype(np.uint8))
            Path(root, path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(written[-1]).save(Path(root, path))
    return np.stack(written)


def expected_rank1(features, rows):
    """Share of the ordered pairs of one identity that are nearer than all distractors of these rows."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    nearest = (unit[:6] @ unit[6:][rows].T).max(axis=1)
    return np.mean([unit[i] @ unit[i ^ 1] > nearest[i] for i in range(6)])


def check(report, features):
    by_set = {key: expected_rank1(features, rows) for key, rows in SETS.items()}
    galleries = report["result"]["galleries"]
    assert {(row["distractors"], row["set"]): row["rank1"] for row in galleries} == pytest.approx(by_set)
    of_two = (by_set[2, 1] + by_set[2, 2]) / 2
    expected = [(2, pytest.approx(of_two)), (4, pytest.approx(by_set[4, 1]))]
    assert [(row["distractors"], row["rate"]) for row in report["result"]["rank1"]] == expected
    assert report["result"]["distractors"] == 4 and report["scores"]["impostors"] == 6 * 4


def test_listed_features(pixels, capsys):
    features = np.random.default_rng(3).normal(size=(11, 3)).astype(np.float32)
    features[1] = features[0] + 0.1  # the two images of another identity are as far apart as strangers
    features[5] = -features[4]
    names = [f"scrub/{path}" for path in PROBES] + [f"mega/{path}" for path in DISTRACTORS]
    for name, row in zip(names, features, strict=True):
        np.save(f"{name}_x.npy", row)
    arguments = "--features", "scrub", *LISTED, "--suffix", "_x.npy"
    report = evaluate(*arguments)
    check(report, features)
    assert 0 < report["result"]["rank1"][1]["rate"] < 1

    Path("mega/2/photo.png_x.npy").unlink()
    assert "1 of the 5 distractors listed in lists/" in fails(capsys, 1, *arguments)
    for wrong, message in (
        (("--features", "nowhere", *LISTED), "features: expected the folder that the paths in --lists"),
        (("--data", "lists.txt", *LISTED), "data: expected the folder that the paths in --lists"),
        (LISTED[:4], "data: expected the folder that the paths in --lists are relative to, got nothing"),
        (("--features", "scrub", "--lists", "lists"), "lists: only for the protocol megaface"),
        (("--features", "scrub", "--suffix", "_x.npy"), "suffix: only with --lists"),
        (("--features", "scrub", *LISTED[:4]), "distractors: expected the folder that the paths in --lists"),
    ):
        assert message in fails(capsys, 2, *wrong)


def test_listed_images(pixels, tiny_config, capsys):
    config = dataclasses.replace(tiny_config, output=Path("run"))
    config.output.mkdir()
    trainer = Trainer(config, load_splits("digits", (8, 8), 1, 0.3, seed=0))
    trainer.save(Path("run", FILE_NAME))
    arguments = "--checkpoint", "run", "--data", "scrub", *LISTED
    report = evaluate(*arguments)
    inputs = torch.from_numpy((pixels.astype(np.float32) - 127.5) / 127.5)[:, None]
    with torch.no_grad():
        features = trainer.backbone.eval()(inputs).double().numpy()
    check(report, features)
    assert report["separability"] is not None and "images of scrub listed in lists/" in report["input"]["description"]
    cards = read_page("out/megaface.html").mistakes["miss"]
    assert cards and {card["captions"][2] for card in cards} <= {f"distractor{path}" for path in DISTRACTORS}

    Path("mega/1/photo.png").write_bytes(b"no image")
    assert "1 of the images that lists/" in fails(capsys, 1, *arguments)
    Path("scrub/Bo/1.png").unlink()
    assert "1 of the 6 probes listed in lists/" in fails(capsys, 1, *arguments)
