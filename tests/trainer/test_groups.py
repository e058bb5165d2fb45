"""Trainings with GroupFace: the network, the self-grouping loss, resumption, several processes and exported files."""

import copy
import dataclasses
import json

import pytest
import torch
from loss_inputs import relative_error
from test_devices import train
from training_runs import assert_same_state

import fused_margin as fm
from fused_margin import cli
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.data.augment import AugmentationConfig
from fused_margin.trainer.data.base import to_input
from fused_margin.trainer.models import GroupFaceNetwork, ModelConfig
from fused_margin.trainer.models.build import build_backbone, describe_backbone, embedding_size
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint
from fused_margin.trainer.train.logs import read_log
from fused_margin.trainer.train.loop import Trainer

pytestmark = pytest.mark.usefixtures("blank_pictures")


def grouped(config, **options):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **{"groups": 4, **options}))


@pytest.fixture
def splits():
    return load_splits("digits", (8, 8), 1, 0.3, seed=0)


@pytest.mark.parametrize("network", ["small", "lenet"])
def test_network(tiny_config, network):
    widths = (4, 4, 8) if network == "lenet" else (4, 4, 8, 8)
    config = grouped(dataclasses.replace(tiny_config, network=network), widths=widths)
    backbone = build_backbone(config)
    assert isinstance(backbone, GroupFaceNetwork) and backbone.head.in_features == 64 and backbone.head.num_groups == 4
    images = torch.randn(3, 1, 8, 8)
    embeddings, group_logits = backbone(images)
    assert embeddings.shape == (3, 8) and group_logits.shape == (3, 4)
    assert torch.equal(backbone.eval()(images), embeddings) and embedding_size(backbone, config.model) == 8
    assert "GroupFace (4 groups)" in describe_backbone(config)
    other = grouped(config, widths=widths, group_features=10, group_aggregation="hard")
    assert build_backbone(other).head.in_features == 10 and build_backbone(other).head.aggregation == "hard"


def test_any_backbone(tiny_config):
    options = {"backbone": "user_networks.BatchNormNet", "backbone_options": {"size": 6}}
    config = grouped(dataclasses.replace(tiny_config, **options))
    backbone = build_backbone(config)
    assert backbone.head.in_features == 6 and backbone.training and embedding_size(backbone, config.model) == 8


def test_step(tiny_config, splits):
    """The loss has a part for the groups, which is the weighted self-grouping loss of the batch."""
    trainer = Trainer(grouped(tiny_config, group_weight=0.5), splits)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    images, labels = splits.train.images[:64], splits.train.labels[:64]
    result = trainer.train_step(images, labels)
    moved = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key, _ in trainer.model.named_parameters()} <= moved
    assert "criterion.group_loss.recent" in moved
    assert trainer.logged_names[-2:] == ["loss/arcface", "loss/groups"]
    torch.testing.assert_close(result.loss, sum(result.parts.values()))
    recent = trainer.criterion.group_loss.recent[-1]
    assert recent.sum().item() == pytest.approx(64)

    criterion, inputs = trainer.criterion.eval(), to_input(images)
    with torch.no_grad():
        embeddings, logits = trainer.backbone(inputs)
        total = criterion(embeddings, labels, logits)
    target = (logits.double().softmax(1) - recent / 64).argmax(1)
    torch.testing.assert_close(criterion.last_parts["groups"], 0.5 * torch.nn.functional.cross_entropy(logits, target))
    torch.testing.assert_close(total, criterion.loss_fn(embeddings, labels) + criterion.last_parts["groups"])


def take_steps(trainer, steps):
    images = trainer.splits.train
    for _ in range(steps):
        batch = images.__getitems__(list(range(64 * trainer.step, 64 * trainer.step + 64)))
        trainer.train_step(batch.images, batch.labels)
        trainer.step += 1
    return trainer


def test_resumed_run_matches_uninterrupted_run(tiny_config, splits):
    config = grouped(tiny_config)
    uninterrupted = take_steps(Trainer(config, splits), 5).state_dict()
    state = copy.deepcopy(take_steps(Trainer(config, splits), 2).state_dict())
    assert TrainConfig.from_dict(state["config"]) == config
    torch.manual_seed(99)
    resumed = Trainer(config, splits)
    resumed.load_state_dict(state)
    assert_same_state(take_steps(resumed, 3).state_dict(), uninterrupted)


def test_checkpoints_of_older_versions_have_no_groups():
    values = TrainConfig().to_dict()
    for name in [name for name in values["model"] if name.startswith("group")]:
        del values["model"][name]
    del values["loss"]["companions"]["siamese"]
    assert TrainConfig.from_dict(values) == TrainConfig() and TrainConfig().model.groups == 0


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["soft", "hard"])
def test_command_line(tiny_options, tmp_path, monkeypatch, capsys, aggregation):
    """Trained, evaluated and exported: files that a program loads without the trainer."""
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    options = ["--model.groups", "4", "--model.group-aggregation", aggregation, "--loss.name", "cosface"]
    assert cli.main(["train", *tiny_options, *options, "--output", "run"]) == 0
    names, rows = read_log(tmp_path / "run" / "log.csv")
    assert "loss/groups" in names and rows
    training = json.loads((tmp_path / "run" / "report.json").read_text())["training"]
    assert training["last_loss"] < training["first_loss"]
    assert cli.main(["evaluate", "--checkpoint", "run", "--output", "evaluation"]) == 0
    assert cli.main(["export", "run"]) == 0
    assert "to embeddings (batch, 8)" in " ".join(capsys.readouterr().out.split())
    config = TrainConfig.from_dict(load_checkpoint(tmp_path / "run" / FILE_NAME)["config"])
    backbone = build_backbone(config).eval()
    backbone.load_state_dict(torch.load("run/backbone.pt", weights_only=True))
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    session = onnxruntime.InferenceSession("run/backbone.onnx", providers=["CPUExecutionProvider"])
    (exported,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(exported), backbone(images), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["soft", "hard"])
def test_two_processes_match_one(forks, tiny_config, splits, tmp_path, aggregation):
    """One step from a checkpoint, without augmentation, whose random numbers differ between processes."""
    still = AugmentationConfig(**dict.fromkeys(("rotation", "scale", "shear", "shift", "blur", "noise"), 0))
    config = grouped(tiny_config, group_aggregation=aggregation, group_weight=1.0)
    config = dataclasses.replace(config, epochs=1, batch_size=500, augmentation=still)
    trainer = take_steps(Trainer(config, splits), 2)
    trainer.losses = [1.0] * 2
    states = []
    for devices in (1, 2):
        output = tmp_path / str(devices)
        output.mkdir()
        trainer.config = dataclasses.replace(config, output=output)
        trainer.save(output / FILE_NAME)
        train(forks, "--resume", "--output", output, devices=devices)
        states.append(load_checkpoint(output / FILE_NAME))
    one, two = states
    assert one["step"] == two["step"] == 3
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-4)
    ours, expected = (state["model"].pop("criterion.group_loss.recent") for state in (two, one))
    torch.testing.assert_close(ours.sum(1), expected.sum(1))  # the samples of both processes
    torch.testing.assert_close(ours / 500, expected / 500, rtol=0, atol=1e-3)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-3)
    names = [name for name, _ in trainer.model.named_parameters()]  # the optimizer has those of the backbone first
    for number, name in enumerate(names):
        if name.startswith("backbone.head"):
            ours, expected = (state["optimizer"]["state"][number]["momentum_buffer"] for state in (two, one))
            assert expected.norm() > 0 and relative_error(ours, expected) < 1e-4, name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": -1}, "model.groups must be 0 or at least 2, got -1"),
        ({"groups": 1}, "model.groups must be 0 or at least 2, got 1"),
        ({"group_features": 0}, "model.group_features must be at least 1"),
        ({"group_batches": 0}, "model.group_batches must be at least 1, got 0"),
        ({"group_weight": -0.1}, "model.group_weight must be finite and not negative"),
    ],
)
def test_wrong_groups(wrong, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**wrong)


def test_output_of_a_network_without_groups_is_refused(tiny_config, splits, monkeypatch):
    """A user's network with a head of its own has group logits that no loss would train."""
    trainer = Trainer(tiny_config, splits)
    monkeypatch.setattr(trainer.backbone, "forward", lambda images: fm.GroupFaceOutput(images, images))
    with pytest.raises(TypeError, match="embeddings: expected a tensor of shape .* got GroupFaceOutput"):
        trainer.train_step(splits.train.images[:4], splits.train.labels[:4])
