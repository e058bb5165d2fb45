"""Training: learning, gradient accumulation, averaged weights, reports, and initial weights."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from report_pages import read_page
from rich.console import Console
from training_runs import fit

import fused_margin as fm
from fused_margin.commands.train import parse
from fused_margin.trainer.config import OptimizerConfig, TrainConfig
from fused_margin.trainer.data import DataError, load_splits
from fused_margin.trainer.data.config import AugmentationConfig
from fused_margin.trainer.evaluate.config import EvaluateConfig
from fused_margin.trainer.evaluate.run import run_evaluation
from fused_margin.trainer.models import ModelConfig
from fused_margin.trainer.train import progress
from fused_margin.trainer.train.checkpoint import (
    FILE_NAME,
    CheckpointError,
    backbone_state,
    criterion_state,
    load_backbone_weights,
    load_checkpoint,
    save_checkpoint,
)
from fused_margin.trainer.train.criterion import stored_class_weight
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.optimizer import learning_rate_factor
from fused_margin.trainer.train.run import averaged_steps, run

pytestmark = pytest.mark.usefixtures("blank_pictures")


def test_loss_falls_and_unseen_identities_are_verified(pictures, tiny_config, console):
    nothing = dict.fromkeys(("rotation", "scale", "shear", "shift", "blur", "noise"), 0)
    config = dataclasses.replace(
        tiny_config,
        epochs=8,
        model=ModelConfig(image_size=(16, 16), widths=(8, 8, 16, 16), embedding_size=16),
        augmentation=AugmentationConfig(**nothing),
    )
    report = run(config, console)
    assert report["training"]["steps"] == 160
    assert report["training"]["last_loss"] < 0.6 * report["training"]["first_loss"]
    assert report["verification"]["accuracy"] > 0.6
    assert report["verification"]["auc"] > 0.65
    written = json.loads((config.output / "report.json").read_text())
    assert written["verification"] == report["verification"] and written.keys() == report.keys()
    with Image.open(config.output / "report.png") as picture:
        assert picture.width > 1000 and np.asarray(picture.convert("L")).std() > 10
    page = read_page(config.output / "report.html")
    assert page.numbers[0] == report["verification"]["accuracy"] and page.mistakes.keys() == {"accept", "reject"}

    state = load_checkpoint(config.output / FILE_NAME)
    weight = stored_class_weight(config.loss, criterion_state(state))
    assert report["separability"]["mean"] == pytest.approx(fm.functional.separability(weight).mean)
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(7))  # class weights are projected after the last step


def test_gradient_accumulation_matches_full_batch(tiny_config, splits):
    """Gradients of unequal micro-batches, weighted by their images, add up to that of the batch."""
    batch = splits.train.__getitems__(list(range(64)))
    results, weights = [], []
    for accumulate in (1, 5):  # 13 + 13 + 13 + 13 + 12 images
        trainer = Trainer(dataclasses.replace(tiny_config, accumulate=accumulate), splits)
        results.append(trainer.train_step(batch.images, batch.labels))
        weights.append(trainer.model.state_dict())
    assert results[1].loss == pytest.approx(results[0].loss.item(), rel=1e-5)
    assert results[1].gradient_norm == pytest.approx(results[0].gradient_norm.item(), rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6)


def test_empty_micro_batches_are_skipped(tiny_config, splits):
    batch = splits.train.__getitems__([0, 1])  # the other images of the batch were unreadable
    trainer = Trainer(dataclasses.replace(tiny_config, accumulate=5), splits)
    assert torch.isfinite(trainer.train_step(batch.images, batch.labels).loss)


def test_average_of_the_weights(tiny_config, splits, console):
    optimizer = dataclasses.replace(tiny_config.optimizer, ema=0.75)
    trainer = Trainer(dataclasses.replace(tiny_config, optimizer=optimizer), splits)
    expected = None
    for step in range(4):
        batch = splits.train.__getitems__(list(range(64 * step, 64 * step + 64)))
        trainer.train_step(batch.images, batch.labels)
        weight = trainer.backbone.embedding.weight.detach().clone()
        expected = weight if expected is None else 0.75 * expected + 0.25 * weight
    averaged = trainer.evaluated_backbone
    torch.testing.assert_close(averaged.embedding.weight, expected)
    assert not torch.equal(averaged.embedding.weight, weight)
    assert torch.equal(backbone_state(trainer.state_dict())["embedding.weight"], averaged.embedding.weight)
    assert Trainer(tiny_config, splits).evaluated_backbone is not None


def test_average_is_evaluated(tiny_config, console):
    config = dataclasses.replace(tiny_config, optimizer=dataclasses.replace(tiny_config.optimizer, ema=0.9))
    with_average, without = (
        run(config, console),
        run(dataclasses.replace(tiny_config, output=config.output / "b"), console),
    )
    assert with_average["training"] == without["training"]  # the average does not change training
    assert with_average["verification"] != without["verification"]


def test_batch_norm_in_training_and_evaluation(tiny_config, console):
    """Evaluation uses running statistics from the checkpoint, and training steps run in training mode."""
    config = dataclasses.replace(tiny_config, backbone="user_networks.BatchNormNet", backbone_options={"size": 5})
    report = run(config, console)
    state = load_checkpoint(config.output / FILE_NAME)
    assert backbone_state(state)["layers.1.num_batches_tracked"] == 40
    options = EvaluateConfig(checkpoint=config.output, accelerator="cpu")
    with pytest.raises(CheckpointError, match="add --backbone user_networks.BatchNormNet"):
        run_evaluation(options, console)
    with pytest.raises(CheckpointError, match="add --backbone user_networks.BatchNormNet"):
        parse(["--resume", "--output", str(config.output)])
    evaluated = run_evaluation(dataclasses.replace(options, backbone=config.backbone), console)
    assert evaluated["input"]["dimensions"] == 5
    assert evaluated["scores"]["auc"] == report["verification"]["auc"]

    modes = []

    class RecordsMode(Trainer):
        def train_step(self, images, labels):
            modes.append(self.backbone.training)
            return super().train_step(images, labels)

    splits = load_splits("digits", (8, 8), 1, 0.3, seed=0)
    trainer = RecordsMode(config, splits)
    trainer.backbone.eval()  # as after an evaluation
    trainer.fit(console, lambda: None)
    assert len(modes) == 40 and all(modes)


def test_half_precision(tiny_config, splits, console):
    with pytest.raises(DataError, match="--precision 16-mixed needs a GPU"):
        Trainer(dataclasses.replace(tiny_config, precision="16-mixed"), splits)
    model = ModelConfig(image_size=(16, 16), widths=(4, 4, 8, 8), embedding_size=8)  # 2 x 2 before the last stage
    splits = load_splits("digits", (16, 16), 1, 0.3, seed=0)
    config = dataclasses.replace(tiny_config, model=model, precision="bf16-mixed", accumulate=2)
    trainer = fit(config, splits, console)
    assert trainer.losses[-1] < trainer.losses[0]
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_face_folder_end_to_end(face_folder, tmp_path, console):
    config = TrainConfig.defaults(str(face_folder))
    assert config.augmentation.mirror and config.evaluation.flip == "concat"
    config = dataclasses.replace(
        config,
        output=tmp_path / "run",
        epochs=2,
        batch_size=8,
        accelerator="cpu",
        model=dataclasses.replace(config.model, channels=3, image_size=(16, 16), widths=(4, 4, 8, 8)),
        evaluation=dataclasses.replace(config.evaluation, pairs=40),
    )
    broken = face_folder / "person_3" / "9.jpg"
    broken.write_bytes(b"\xff\xd8 nothing more")
    try:
        report = run(config, console)
    finally:
        broken.unlink()
    (unreadable,) = report["data"]["unreadable"]
    assert unreadable.startswith(f"{broken}: it is damaged, no image") and report["data"]["skipped"] == {}
    assert report["data"]["train"]["identities"] + report["data"]["test"]["identities"] == 9
    assert np.isfinite(report["training"]["last_loss"])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown(tiny_config, splits, terminal, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    shown = io.StringIO()
    fit(tiny_config, splits, Console(file=shown, force_terminal=terminal, width=100))
    for words in ("epoch 1/2", "epoch 2/2", "loss ", "lr ", "images/s", "0:00:0"):
        assert words in shown.getvalue()
    assert ("\x1b[" in shown.getvalue()) == terminal


def test_divergence_is_an_error(tiny_config, splits, console):
    config = dataclasses.replace(tiny_config, optimizer=OptimizerConfig(lr=1e30, clip_norm=1e30))
    with pytest.raises(FloatingPointError, match="lower --optimizer.lr"):
        fit(config, splits, console)


def test_all_identities_can_be_trained_on(pictures, tiny_config, console):
    config = dataclasses.replace(tiny_config, test_fraction=0.0, epochs=1)
    report = run(config, console)
    assert report["verification"] is None
    assert json.loads((config.output / "report.json").read_text())["verification"] is None
    assert report["data"]["train"] == {"identities": 10, "images": 1797}
    assert report["data"]["test"] == {"identities": 0, "images": 0, "named_as_before": 0}
    state = load_checkpoint(config.output / FILE_NAME)
    assert state["identities"] == list("0123456789") and state["model"]["criterion.loss_fn.weight"].shape == (10, 8)
    with Image.open(config.output / "report.png") as picture:
        assert picture.width > 1000
    page = read_page(config.output / "report.html")
    assert "Nothing was verified" in page.text and page.numbers == [report["separability"]["mean"]]
    with pytest.raises(DataError, match="all identities of 'digits' were trained on"):
        run_evaluation(EvaluateConfig(checkpoint=config.output, accelerator="cpu"), console)


def test_all_identities_of_a_folder(face_folder, tmp_path):
    """Identities with one image are included, although verification could not use them."""
    splits = load_splits(str(face_folder), (8, 8), 1, 0.0, 0)
    assert splits.train.num_classes == 9 and len(splits.train) == 33
    assert splits.test.num_classes == 0 and len(splits.test) == 0
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "0.png").write_bytes((face_folder / "person_0" / "0.png").read_bytes())
    with pytest.raises(DataError, match="has images of one identity; at least two are needed$"):
        load_splits(str(tmp_path), (8, 8), 1, 0.0, 0)


@pytest.mark.parametrize("source", ["folder", "checkpoint", "export"])
def test_training_starts_from_weights(tiny_config, splits, console, tmp_path, source):
    earlier = dataclasses.replace(
        tiny_config, output=tmp_path / "earlier", optimizer=OptimizerConfig(ema=0.9), test_fraction=0.5
    )
    fit(earlier, load_splits("digits", (8, 8), 1, 0.5, 0), console)
    expected = backbone_state(load_checkpoint(earlier.output / FILE_NAME))
    path = earlier.output if source == "folder" else earlier.output / FILE_NAME
    if source == "export":
        path = tmp_path / "backbone.pt"
        torch.save(expected, path)
    weights = load_backbone_weights(path)
    assert set(weights.backbone) == set(expected)
    trainer = Trainer(tiny_config, splits, weights=weights)
    for name, value in trainer.backbone.state_dict().items():
        assert torch.equal(value, expected[name]), name
    # The run loads the weights, and its first loss is that of a trained network.
    config = dataclasses.replace(tiny_config, weights=path, epochs=1)
    run(config, console)
    state = load_checkpoint(config.output / FILE_NAME)
    batch = splits.train.__getitems__(next(iter(trainer.batches)))
    assert state["losses"][0].item() == pytest.approx(trainer.train_step(batch.images, batch.labels).loss.item())
    if source == "export":  # resuming does not need the file
        path.unlink()
        run(dataclasses.replace(config, resume=True), console)


@pytest.mark.slow
def test_identities_of_the_initial_weights_are_reported(tiny_config, tmp_path):
    """The report includes runs that start from such a run, resumed runs, and evaluations."""

    def run_from(weights, name, **options):
        screen = Console(record=True, file=io.StringIO(), width=120)
        config = dataclasses.replace(tiny_config, epochs=1, weights=weights, output=tmp_path / name, **options)
        return config, run(config, screen)["data"]["test"], screen.export_text()

    def evaluated(config):
        screen = Console(quiet=True)
        return run_evaluation(EvaluateConfig(checkpoint=config.output), screen)["input"]["description"]

    config, test, printed = run_from(None, "random")
    assert test["named_as_before"] == 0 and "Verification on 3 identities not trained on" in printed
    everyone, _, _ = run_from(None, "all", test_fraction=0.0)
    for before, name in ((everyone.output, "second"), (tmp_path / "second", "third")):
        config, test, printed = run_from(before, name)
        assert test["named_as_before"] == test["identities"] == 3
        assert "Verification on 3 identities, 3 with the name of a training identity" in printed
        assert evaluated(config).endswith("3 identities, 3 with the name of a training identity")
    config.weights.rename(tmp_path / "gone")
    assert run(dataclasses.replace(config, resume=True), Console(quiet=True))["data"]["test"] == test

    torch.save(backbone_state(load_checkpoint(config.output / FILE_NAME)), tmp_path / "backbone.pt")
    config, test, printed = run_from(tmp_path / "backbone.pt", "unknown")
    assert test["named_as_before"] is None
    assert "Verification on 3 identities; it is unknown whether the network was trained on any" in " ".join(
        printed.split()
    )
    state = load_checkpoint(config.output / FILE_NAME)
    del state["identities_before"]  # as in an older version
    save_checkpoint(config.output / FILE_NAME, state)
    assert "it is unknown" in evaluated(config)


def test_training_without_a_readable_image_is_an_error(tiny_config, console, face_folder, tmp_path):
    for image in face_folder.glob("*/*.png"):
        (tmp_path / "faces" / image.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / image.parent.name / image.name).write_bytes(b"no image")
    config = dataclasses.replace(tiny_config, data=str(tmp_path / "faces"), batch_size=2, checkpoint_every=1)
    with pytest.raises(DataError, match=r"none of the \d+ images to train on could be read"):
        run(config, console)
    assert not (config.output / FILE_NAME).exists() and not (config.output / "report.json").exists()


def test_initial_weights_errors(tiny_config, console, tmp_path):
    path = tmp_path / "backbone.pt"
    config = dataclasses.replace(tiny_config, weights=path)

    def check_error(message):
        with pytest.raises(CheckpointError, match=message):
            run(config, console)
        assert not config.output.exists()

    check_error("no weights at .*backbone.pt; expected the folder of a run")
    path.write_bytes(b"")
    check_error("cannot read the weights .*backbone.pt: the file is empty")
    torch.save([1, 2], path)
    check_error("backbone.pt holds no weights of a backbone")
    torch.save({"weight": torch.ones(3)}, path)
    check_error("the weights in .*backbone.pt do not fit the network.*Missing key")


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (7, 1), (20, 2), (40, 5), (160, 20), (5000, 20)])
def test_averaged_first_and_last_steps_are_disjoint(steps, expected):
    assert averaged_steps(steps) == expected and 2 * averaged_steps(steps) <= max(steps, 2)


def test_far_below_one_impostor_is_reported(tiny_config):
    console = Console(record=True, file=io.StringIO(), width=80)
    report = run(dataclasses.replace(tiny_config, epochs=1), console)  # 20 steps
    verification, printed = report["verification"], console.export_text()
    assert verification["impostors"] == 100 and verification["far_resolved"] is False
    assert "(0 of 100 impostors accepted)" in printed
    with open(tiny_config.output / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["verification/accuracy"]) > 0 and last["verification/tar_at_far"] == ""
    losses = load_checkpoint(tiny_config.output / FILE_NAME)["losses"]
    training = report["training"]
    assert training["first_loss"] == pytest.approx(losses[:2].mean().item())
    assert training["last_loss"] == pytest.approx(losses[-2:].mean().item())
    assert "first to last 2 steps" in printed and f"{losses[:2].mean():.2f} to {losses[-2:].mean():.2f}" in printed


def test_learning_rate():
    options = OptimizerConfig(warmup=0.1, decay_power=2)
    factors = [learning_rate_factor(step, 100, options) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1 and factors[55] == pytest.approx(0.25)
    assert learning_rate_factor(100, 100, options) == 0
    flat = OptimizerConfig(warmup=0, decay_power=0)
    assert {learning_rate_factor(step, 100, flat) for step in range(100)} == {1}


def test_published_step_schedules():
    regularface = OptimizerConfig(schedule="step", warmup=0)  # 30 epochs, halved every 6
    factors = [learning_rate_factor(step, 30 * 7, regularface) for step in range(30 * 7)]
    assert factors == [0.5 ** (step // (6 * 7)) for step in range(30 * 7)]
    sphereface = OptimizerConfig(schedule="step", warmup=0, milestones=(16 / 28, 24 / 28), gamma=0.1)
    factors = [learning_rate_factor(step, 28_000, sphereface) for step in (0, 15_999, 16_000, 23_999, 24_000)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    warm = OptimizerConfig(schedule="step", warmup=0.1)
    assert learning_rate_factor(0, 100, warm) == pytest.approx(1 / 11)
