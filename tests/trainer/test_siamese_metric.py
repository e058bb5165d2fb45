"""Verification with the distance that a training has learned: `evaluate --metric siamese-l1`."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from evaluations import evaluate, fails
from report_pages import read_page
from sklearn.preprocessing import normalize
from training_runs import fit

import fused_margin as fm
from fused_margin.evaluation import kfold_accuracy, make_pairs
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.evaluate.network import embed
from fused_margin.trainer.train.auxiliary import AuxiliaryConfig
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from fused_margin.trainer.train.criterion import stored_distance
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LossConfig

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def siamese_run(tiny_config, splits, console, tmp_path, monkeypatch):
    """A training with the siamese loss alone."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    loss = LossConfig("siamese-l1")
    config = dataclasses.replace(tiny_config, epochs=1, loss=loss, images_per_identity=4)
    return fit(config, splits, console)


def test_learned_distance(siamese_run, capsys):
    losses = siamese_run.losses
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    report = evaluate("--checkpoint", "run", "--metric", "siamese-l1")
    assert "pairs-siamese-l1: accuracy" in capsys.readouterr().out

    model = load_checkpoint(siamese_run.config.output / FILE_NAME)["model"]
    alpha, bias = (model[f"criterion.loss_fn.{name}"].double().numpy() for name in ("alpha", "bias"))
    images = load_splits("digits", (8, 8), 1, 0.3, seed=0)
    options = {"distortion": images.test_distortion, "seed": 0}
    embedded = embed(siamese_run.evaluated_backbone, images.test, torch.device("cpu"), mirror=False, **options)
    pairs = make_pairs(embedded.labels, 200, 10, 0)
    first, second = (normalize(embedded.features.astype(np.float64))[pairs.indices[:, side]] for side in (0, 1))
    scores = bias - np.abs(first - second) @ alpha
    folds = kfold_accuracy(scores, pairs.same, pairs.fold)
    result = report["result"]
    assert result["fold_accuracy"] == folds.accuracy.tolist()
    np.testing.assert_allclose(result["fold_threshold"], folds.threshold, rtol=1e-6)
    assert result["threshold_unit"] == "log odds" and "heads" not in result and report["flip"] == "none"
    assert result["distance"] == {"bias": pytest.approx(float(bias)), "negative_weights": np.mean(alpha < 0)}
    text = read_page("out/pairs-siamese-l1.html").text
    assert "which the training has learned" in text and "log odds" in text and "fitted pairs" not in text


def test_distance_of_a_companion(tiny_config, splits, tmp_path, monkeypatch):
    """Of a network that is not trained, whose distance has its initial weights."""
    monkeypatch.chdir(tmp_path)
    loss = LossConfig("softmax", companions=AuxiliaryConfig(siamese=0.5))
    trainer = Trainer(dataclasses.replace(tiny_config, loss=loss), splits)
    with torch.no_grad():
        trainer.criterion.companions.losses["siamese"].bias.fill_(0.75)
    save_checkpoint(tmp_path / FILE_NAME, trainer.state_dict())
    assert evaluate("--checkpoint", ".", "--metric", "siamese-l1")["result"]["distance"]["bias"] == 0.75
    summed = evaluate("--checkpoint", ".", "--metric", "siamese-l1", "--flip", "sum")
    assert summed["flip"] == "sum"


def test_settings_of_the_stored_loss():
    state = {f"loss_fn.{name}": value for name, value in fm.SiameseL1Loss(5).state_dict().items()}
    loss_fn = stored_distance(LossConfig("siamese-l1", options={"normalize": False}), state)
    assert not loss_fn.normalize and torch.equal(loss_fn.alpha, state["loss_fn.alpha"])
    assert stored_distance(LossConfig("arcface"), state) is None


def test_refused_checkpoints_and_options(tiny_config, splits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / FILE_NAME, Trainer(tiny_config, splits).state_dict())
    metric = "--checkpoint", ".", "--metric", "siamese-l1"
    for code, options, message in (
        (1, metric, "metric: checkpoint.pt has no distance .*: train with --loss.name siamese-l1 or"),
        (2, (*metric, "--flip", "concat"), "flip: siamese-l1 has weights for the features of one image"),
        (2, (*metric, "--protocol", "megaface"), "metric: megaface searches by the cosine; siamese-l1 is for pairs"),
        (2, ("--features", "x.npz", *metric[2:]), "metric: siamese-l1 needs the --checkpoint that has learned it"),
    ):
        printed = fails(capsys, code, *options)
        assert re.search(message, printed), printed
    assert not list(tmp_path.glob("*.json"))
