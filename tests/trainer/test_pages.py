"""The HTML pages of trainings and evaluations: numbers, the worst pairs, pictures, names that need escaping."""

import base64
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluations import clusters, evaluate, own_folder, write  # noqa: F401
from PIL import Image
from report_pages import read_page

from fused_margin import cli, evaluation
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.evaluate import figures
from fused_margin.trainer.evaluate import run as module
from fused_margin.trainer.evaluate.inputs import read_checkpoint

pytestmark = pytest.mark.usefixtures("blank_pictures", "own_folder")
ESCAPED = "<b>x&\"y'{{ 7 }}"  # the name of an identity
BYTES = os.fsdecode(b"caf\xe9")  # not UTF-8
OPTIONS = """--model.image-size 8 8 --model.widths 4 4 8 8 --model.embedding-size 8 --batch-size 8 --epochs 2
    --test-fraction 0.75 --evaluation.pairs 80 --evaluation.folds 2 --log-every 1 --accelerator cpu"""


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Folders of eight identities with four images each. Two have unusual names, and one has a broken image."""
    root, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    for name in (ESCAPED, BYTES, *"abcdef"):
        (root / name).mkdir()
        pattern = rng.integers(90, 160, (4, 4, 3))
        for number in range(4):
            image = np.kron(pattern + rng.normal(0, 50, (4, 4, 3)), np.ones((25, 20, 1)))  # often taken for another
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / name / f"{number}.png")
    (root / "a" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def trained(faces, tmp_path_factory):
    """Folder of a run, which has been resumed and evaluated."""
    output = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_save", lambda figure, path, title: Image.new("L", (1, 1)).save(path, "PNG"))
        assert cli.main(["train", "--data", str(faces), *OPTIONS.split(), "--output", str(output)]) == 0
        assert cli.main(["train", "--resume", "--output", str(output)]) == 0
        assert cli.main(["evaluate", "--checkpoint", str(output)]) == 0
    return output


def test_page_has_the_numbers_of_the_training(trained):
    page, report = read_page(trained / "report.html"), json.loads((trained / "report.json").read_text())
    verified = report["verification"]
    headline = [verified[name] for name in ("accuracy", "tar_at_far", "equal_error_rate", "auc")]
    assert page.numbers[:5] == [*headline, report["separability"]["mean"]]
    folds = zip(verified["fold_accuracy"], verified["fold_threshold"], strict=True)
    assert page.numbers[5:9] == [number for fold in folds for number in fold]
    assert f"{verified['accuracy']:.2%} ± {verified['accuracy_std']:.2%}" in page.text
    assert f"{report['training']['backbone_parameters']:,}" in page.text and "resumed yes" in page.text
    assert f"broken.jpg: {report['data']['unreadable'][0].split(': ')[1]}" in page.text
    assert f"fused-margin evaluate --checkpoint {trained} --protocol megaface" in page.text
    for title in ("ROC curve", "Scores", "Separability", "Loss", "Learning rate", "Speed", "Gradient norm"):
        assert title in page.text
    assert len(page.all("svg")) == 7
    rows = (trained / "log.csv").read_text().splitlines()
    first, last = (row.split(",") for row in (rows[1], rows[-1]))
    label = next(drawing["aria-label"] for drawing in page.all("svg") if drawing["aria-label"].startswith("Loss"))
    assert label == f"Loss from step {first[0]} to {last[0]}: first {float(first[1]):.4g}, last {float(last[1]):.4g}."


def worst_pairs(trained, faces, report):
    """Names and scores of the false accepts and the false rejects, by a plain loop over all pairs."""
    network = read_checkpoint(trained / "checkpoint.pt", None, None)
    inputs = network.features(torch.device("cpu"), mirror=True, workers=0, folds=None, show=print)
    features = np.hstack([inputs.features.features, inputs.features.mirrored]).astype(float)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    pairs, same, fold, _ = evaluation.make_pairs(inputs.features.labels, 80, 2, 0)
    images = load_splits(str(faces), (8, 8), 3, 0.75, 0).test
    accepts, rejects = [], []
    for (first, second), is_same, number in zip(pairs, same, fold, strict=True):
        score = features[first] @ features[second]
        names = [str(Path(images.source(row)[0]).relative_to(faces)) for row in (first, second)]
        names = [name.encode("utf-8", "backslashreplace").decode() for name in names]
        if is_same != (score >= report["result"]["fold_threshold"][number]):
            (rejects if is_same else accepts).append((score, names))
    return sorted(accepts, reverse=True), sorted(rejects)


def test_mistakes_are_the_worst_pairs(trained, faces):
    page, report = read_page(trained / "pairs.html"), json.loads((trained / "pairs.json").read_text())
    accepts, rejects = worst_pairs(trained, faces, report)
    assert 1 < len(accepts) and len(rejects) > 8  # more than are shown
    for kind, worst in (("accept", accepts), ("reject", rejects)):
        cards = page.mistakes[kind]
        assert [card["captions"] for card in cards] == [names for _, names in worst[:8]]
        assert [card["numbers"][0] for card in cards] == pytest.approx([score for score, _ in worst[:8]])
        assert f"{len(worst)} of {report['scores']['genuine']} " in page.text
    assert read_page(trained / "report.html").mistakes == page.mistakes

    pictures = page.all("img")
    assert len(pictures) == 2 * (len(accepts[:8]) + 8)
    for picture in pictures:
        kind, _, encoded = picture["src"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert kind == "data:image/jpeg" and image.format == "JPEG"
            assert image.size == (80, 100) == (int(picture["width"]), int(picture["height"]))


def test_names_are_escaped(trained):
    page = read_page(trained / "pairs.html")
    assert ESCAPED in page.text and ESCAPED not in page.source
    assert "caf\\udce9" in page.text  # the byte that is not UTF-8


def test_same_input_gives_the_same_page(trained):
    before = (trained / "pairs.html").read_text()
    assert cli.main(["evaluate", "--checkpoint", str(trained)]) == 0
    again = (trained / "pairs.html").read_text()
    of_time = re.compile(r"<dt>time</dt>\s*<dd>.*</dd>")
    assert len(of_time.findall(again)) == 1 and of_time.sub("", again) == of_time.sub("", before)


def test_vanished_image_is_named(trained, faces, monkeypatch):
    """The image of the worst false accept is deleted after its features have been computed."""
    worst = read_page(trained / "pairs.html").mistakes["accept"][0]["captions"]
    lost = faces / worst[0].replace("caf\\udce9", BYTES)
    content = lost.read_bytes()
    monkeypatch.setattr(module, "draw_evaluation", lambda path, *_: (lost.unlink(), Image.new("L", (1, 1)).save(path)))
    try:
        evaluate("--checkpoint", trained)
    finally:
        lost.write_bytes(content)
    page = read_page("out/pairs.html")
    assert page.mistakes["accept"][0]["captions"] == worst
    assert "no picture: No such file or directory" in page.text and page.all("img")


def test_searches_of_a_network_show_probe_mate_and_distractor(trained):
    report = evaluate("--checkpoint", trained, "--protocol", "megaface")
    page, last = read_page("out/megaface.html"), report["result"]["rank1"][-1]
    assert page.numbers[0] == last["rate"] and "Identification" in page.text
    missed = round(report["result"]["searches"] * (1 - last["rate"]))
    assert f"{missed} of {report['result']['searches']} searches found a distractor" in page.text
    cards = page.mistakes["miss"]
    assert cards and len(page.all("img")) == 3 * len(cards)
    for card in cards:
        probe, mate, distractor = (caption.split("/")[0] for caption in card["captions"])
        assert probe == mate != distractor and card["captions"][0] != card["captions"][1]
        assert card["numbers"][0] <= card["numbers"][1]
    excess = [card["numbers"][1] - card["numbers"][0] for card in cards]
    assert excess == sorted(excess, reverse=True)


def test_rows_of_feature_files_are_named():
    given = clusters()
    report = evaluate(*write(**given), "--num-pairs", 60, "--folds", 2)
    page = read_page("out/pairs.html")
    assert not page.all("img") and not page.mistakes and "Features have no pictures" in page.text
    unit = given["features"] / np.linalg.norm(given["features"], axis=1, keepdims=True)
    pairs, same, fold, _ = evaluation.make_pairs(given["labels"], 60, 2, 0)
    scores = [unit[first] @ unit[second] for first, second in pairs]
    threshold = np.array(report["result"]["fold_threshold"])[fold]
    score, first, second = max(
        (score, *pair) for score, pair, s, t in zip(scores, pairs, same, threshold, strict=True) if not s and score >= t
    )
    rows = [f"row {row}, label {given['labels'][row]}" for row in (first, second)]
    assert f"cosine threshold first second {score:.3f} " in page.text
    cells = re.sub(r"\s+,", ",", page.text)
    assert f"{score:.3f} " in cells and " ".join(rows) in cells
    distractors = np.random.default_rng(0).normal(size=(50, 8))
    evaluate(*write(**given, distractors=distractors), "--protocol", "megaface")
    assert "of the distractors" in read_page("out/megaface.html").text


def test_page_without_mistakes():
    features = np.repeat(np.eye(4), 10, axis=0) + 0.01 * np.random.default_rng(0).normal(size=(40, 4))
    evaluate(*write(features=features, labels=np.repeat(np.arange(4), 10)), "--num-pairs", 60)
    page = read_page("out/pairs.html")
    assert "0 of 30 impostor pairs scored above" in page.text and not page.mistakes


def test_lfw_variants(trained):
    for variant in ("insightface", "regularface"):
        evaluate("--checkpoint", trained, "--protocol", "lfw", "--variant", variant)
        page = read_page(f"out/lfw-{variant}.html")
        assert page.mistakes and ("over folds" in page.text) == (variant == "insightface")
