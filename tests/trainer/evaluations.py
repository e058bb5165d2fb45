"""Runs of `fused-margin evaluate` for its tests, and features for it."""

import json

import numpy as np
import pytest
from PIL import Image
from report_pages import read_page

from fused_margin import cli


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def evaluate(*arguments, drawn=False):
    """Run the command, check picture and page, and return the report written to the folder `out`."""
    assert cli.main(["evaluate", "--output", "out", *map(str, arguments)]) == 0
    options = list(arguments)
    name = options[options.index("--protocol") + 1] if "--protocol" in options else "pairs"
    if name == "lfw":
        name += "-" + (options[options.index("--variant") + 1] if "--variant" in options else "insightface")
    if "--metric" in options:
        name += "-" + options[options.index("--metric") + 1]
    with Image.open(f"out/{name}.png") as picture:
        assert not drawn or picture.width >= 1000 and np.asarray(picture.convert("L")).std() > 10
    with open(f"out/{name}.json") as file:
        report = json.load(file, parse_constant=pytest.fail)  # NaN and infinity are not JSON
    assert report["protocol"] == name
    result = report["result"]
    if report["scores"] is not None:
        shown = report["scores"]["auc"]
    else:
        shown = result["cmc"][0] if result["dir_at_far"] is None else result["dir_at_far"]["dir"]
    assert shown in read_page(f"out/{name}.html").numbers
    return report


def fails(capsys, code, *arguments):
    """Run the command, which must exit with `code`; returns its output."""
    try:
        returned = cli.main(["evaluate", *map(str, arguments)])
    except SystemExit as exit_:
        returned = exit_.code
    streams = capsys.readouterr()
    assert returned == code, streams
    assert "Traceback" not in streams.out + streams.err
    return " ".join((streams.out + streams.err).replace("│", " ").split())


def write(**arrays):
    np.savez("features.npz", **arrays)
    return "--features", "features.npz"


def clusters(identities=12, images=6, size=8, noise=0.8):
    rng = np.random.default_rng(0)
    center = np.repeat(rng.normal(size=(identities, size)), images, axis=0)
    features, mirrored = (center + noise * rng.normal(size=center.shape) for _ in range(2))
    return {"features": features, "mirrored": mirrored, "labels": np.repeat(np.arange(identities), images)}
