"""Objectives without class weights: training, verification and export by the commands, micro-batches, resumption."""

import dataclasses
import json

import pytest
import torch
from evaluations import evaluate
from report_pages import read_page
from training_runs import StoppedTrainer, assert_same_state, fit

from fused_margin import cli
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.train.auxiliary import AuxiliaryConfig
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint
from fused_margin.trainer.train.interrupts import Interrupted
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LossConfig


@pytest.fixture
def triplet_config(tiny_config):
    return dataclasses.replace(tiny_config, loss=LossConfig("triplet"), images_per_identity=4)


@pytest.mark.slow
def test_commands_without_class_weights(tiny_options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *tiny_options, "--loss.name", "contrastive", "--output", "run"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed and "Sep" not in printed
    with open("run/report.json") as file:
        report = json.load(file, parse_constant=pytest.fail)  # NaN and infinity are not JSON
    assert report["separability"] is None and report["config"]["images_per_identity"] == 4
    assert report["training"]["last_loss"] < report["training"]["first_loss"]
    assert report["verification"]["accuracy"] > 0.55
    text = read_page("run/report.html").text
    assert "images per identity 4" in text and "Sep " not in text and "of class weights" not in text
    assert "separability" not in (tmp_path / "run" / "log.csv").read_text()
    evaluated = evaluate("--checkpoint", "run")
    assert evaluated["separability"] is None
    assert evaluated["result"]["accuracy"] == report["verification"]["accuracy"]
    state = load_checkpoint(tmp_path / "run" / FILE_NAME)
    assert not [name for name in state["model"] if name.startswith("criterion.")]


@pytest.mark.slow
def test_export_without_class_weights(triplet_config, splits, console):
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    from fused_margin.trainer.export import CLASSES_NAME, IDENTITIES_NAME, _write_classes

    folder = fit(dataclasses.replace(triplet_config, epochs=1), splits, console).config.output
    for name in (CLASSES_NAME, IDENTITIES_NAME):
        (folder / name).write_bytes(b"")  # of another export
    state = load_checkpoint(folder / FILE_NAME)
    assert _write_classes(folder, triplet_config, state) == "triplet has no class weights"
    assert not (folder / CLASSES_NAME).exists() and not (folder / IDENTITIES_NAME).exists()


@pytest.mark.slow
def test_resumed_run_matches_uninterrupted_run(triplet_config, splits, console, tmp_path):
    """The run stops within an epoch. What the losses have learned is restored: weights, a margin and recent pairs."""
    loss = LossConfig("siamese-l1", companions=AuxiliaryConfig(deepid2=0.01))
    config = dataclasses.replace(triplet_config, epochs=1, loss=loss, accumulate=2)
    uninterrupted = fit(dataclasses.replace(config, output=tmp_path / "uninterrupted"), splits, console)

    def stop():
        raise Interrupted

    config = dataclasses.replace(config, checkpoint_every=7)
    with pytest.raises(Interrupted):
        fit(config, splits, console, trainer=StoppedTrainer(config, splits, 12, stop))
    state = load_checkpoint(config.output / FILE_NAME)
    assert state["step"] == 7 and TrainConfig.from_dict(state["config"]) == config
    torch.manual_seed(99)
    assert_same_state(fit(config, splits, console, state=state).state_dict(), uninterrupted.state_dict())
    model = uninterrupted.state_dict()["model"]
    assert 0 < model["criterion.companions.losses.deepid2.margin"] < 100
    assert model["criterion.loss_fn.alpha"].std() > 0 and model["criterion.loss_fn.bias"] != 2.0  # its initial value


def test_micro_batches_have_whole_groups(triplet_config, splits):
    """Of P x K images, each micro-batch has the loss of its own triplets, and all of the images of its groups."""
    config = dataclasses.replace(triplet_config, accumulate=3, batch_size=24)
    trainer = Trainer(config, splits)
    seen = []
    trainer.criterion.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[1]))
    batch = splits.train.__getitems__(next(iter(trainer.batches)))
    trainer.train_step(batch.images, batch.labels)
    assert len(seen) == 3 and torch.equal(torch.cat(seen), batch.labels)
    for labels in seen:
        assert all(count % 4 == 0 for count in labels.unique(return_counts=True)[1].tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images_per_identity": 1}, "images_per_identity must be 0, or from 2 to"),
        ({"images_per_identity": -2}, "images_per_identity must not be negative"),
        ({"images_per_identity": 40}, r"micro-batch \(32\), got 40"),
        ({"images_per_identity": 20, "accumulate": 2}, r"micro-batch \(16\), got 20"),
    ],
)
def test_wrong_options(tiny_config, values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, **values)


def test_step_in_backward_needs_class_weights(triplet_config):
    optimizer = dataclasses.replace(triplet_config.optimizer, in_backward=True)
    with pytest.raises(ValueError, match="in_backward: .* loss.name triplet, which has none"):
        dataclasses.replace(triplet_config, optimizer=optimizer)


def test_checkpoints_of_older_versions_have_no_new_options(tiny_config):
    values = tiny_config.to_dict()
    del values["images_per_identity"]
    for name in ("angular_triplet", "angular_triplet_margin", "contrastive_form", "contrastive_normalize", "deepid2"):
        del values["loss"]["companions"][name]
    assert TrainConfig.from_dict(values) == tiny_config
