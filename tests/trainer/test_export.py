"""Exported files compute the trained network, and a difference is an error."""

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

pytest.importorskip("onnxscript", reason="the export extra is not installed")

import numpy as np
import onnx
import onnxruntime

from fused_margin import cli
from fused_margin.trainer import export as export_module
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.export import ExportError, export
from fused_margin.trainer.models.build import build_backbone
from fused_margin.trainer.train.checkpoint import (
    FILE_NAME,
    CheckpointError,
    backbone_state,
    load_checkpoint,
    save_checkpoint,
)
from fused_margin.trainer.train.loop import Trainer

CONSOLE = Console(quiet=True)


def trained(config, steps=3):
    """The path of a checkpoint after a few steps, in which all weights have changed."""
    splits = load_splits("digits", (8, 8), 1, 0.3, seed=0)
    trainer = Trainer(config, splits)
    for number in range(steps):
        batch = splits.train.__getitems__(list(range(64 * number, 64 * number + 64)))
        trainer.train_step(batch.images, batch.labels)
    config.output.mkdir()
    save_checkpoint(config.output / FILE_NAME, trainer.state_dict())
    return config.output / FILE_NAME


@pytest.mark.slow
def test_average_of_a_network_with_batch_norm(tiny_config):
    config = dataclasses.replace(
        tiny_config,
        backbone="user_networks.BatchNormNet",
        backbone_options={"dropout": 0.5},
        optimizer=dataclasses.replace(tiny_config.optimizer, ema=0.9),
    )
    path = trained(config)
    for named in (None, "user_networks.StateOutsideStateDict"):  # a checkpoint alone does not import code
        with pytest.raises(CheckpointError, match="if you trust it, add --backbone user_networks.BatchNormNet"):
            export(path, None, CONSOLE, named)
    assert export(path, None, CONSOLE, config.backbone) < 1e-5

    backbone = build_backbone(config).eval()
    backbone.load_state_dict(torch.load(config.output / "backbone.pt", weights_only=True))
    state = load_checkpoint(path)
    average = backbone_state(state)
    assert all(torch.equal(average[name], value) for name, value in backbone.state_dict().items())
    assert not torch.equal(average["head.1.weight"], state["model"]["backbone.head.1.weight"])

    images = torch.rand(5, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        expected = backbone(images)
    session = onnxruntime.InferenceSession(config.output / "backbone.onnx", providers=["CPUExecutionProvider"])
    for rows in (slice(0, 5), slice(0, 1)):  # any batch size
        (actual,) = session.run(None, {"images": images[rows].numpy()})
        torch.testing.assert_close(torch.from_numpy(actual), expected[rows], rtol=1e-4, atol=1e-5)
    metadata = {entry.key: entry.value for entry in onnx.load(config.output / "backbone.onnx").metadata_props}
    assert "-1 to 1" in metadata["input"] and "not normalized" in metadata["output"]


def interrupted(*_):
    raise KeyboardInterrupt


def test_command(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export"]) == 1
    assert "no run to export in runs/" in capsys.readouterr().err
    trained(tiny_config)
    assert cli.main(["export", str(tiny_config.output), "--output", "files"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "pixels from -1 to 1, (batch, 1, 8, 8), to embeddings (batch, 8)" in printed
    assert "features differ by" in printed and "allowed: 0.0001" in printed
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [
        "backbone.onnx",
        "backbone.pt",
        "class_weight.npy",
        "identities.json",
    ]
    assert cli.main(["export", "nowhere"]) == 1
    assert "no checkpoint at nowhere" in capsys.readouterr().err
    monkeypatch.setattr("fused_margin.commands.export.export", interrupted)
    assert cli.main(["export", str(tiny_config.output)]) == 130
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.slow
def test_file_with_other_results_is_an_error(tiny_config, monkeypatch):
    path = trained(tiny_config)
    write = export_module._write_onnx

    def write_another(path, backbone, example, name):
        other = build_backbone(tiny_config).eval()
        write(path, other, example, name)

    monkeypatch.setattr(export_module, "_write_onnx", write_another)
    with pytest.raises(ExportError, match=r"features differ by .* of the largest, more than 0.0001"):
        export(path, None, CONSOLE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StateOutsideStateDict", "gives other features: the network has state outside its state_dict"),
        ("DataDependent", "cannot be written as ONNX"),
    ],
)
def test_networks_that_cannot_be_exported(tiny_config, name, message):
    path = trained(dataclasses.replace(tiny_config, backbone=f"user_networks.{name}"), steps=0)
    with pytest.raises(ExportError, match=message):
        export(path, None, CONSOLE, f"user_networks.{name}")


def test_identities_of_the_class_weights(tiny_config):
    path = trained(tiny_config)
    export(path, None, CONSOLE)
    state = load_checkpoint(path)
    names = json.loads((tiny_config.output / "identities.json").read_text())
    weight = np.load(tiny_config.output / "class_weight.npy")
    splits = load_splits("digits", (8, 8), 1, 0.3, seed=0)
    assert names == splits.train.identities == state["identities"] and len(names) == 7
    np.testing.assert_array_equal(weight, state["model"]["criterion.loss_fn.weight"].numpy())


@pytest.mark.slow
def test_checkpoint_of_an_older_version_has_no_names(tiny_config):
    path = trained(tiny_config)
    state = load_checkpoint(path)
    del state["identities"], state["config"]["weights"]
    save_checkpoint(path, state)
    (tiny_config.output / "identities.json").write_text('["of another run"]')
    console = Console(record=True, file=io.StringIO(), width=200)
    export(path, None, console)
    assert "has no names of the identities" in console.export_text()
    assert not (tiny_config.output / "identities.json").exists()
    assert (tiny_config.output / "class_weight.npy").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "weights", "half"])
def test_export_errors(tiny_config, tmp_path, damage, capsys):
    path = trained(tiny_config)
    if damage == "weights":
        torch.save({"weight": torch.ones(2)}, path)
    elif damage == "half":
        save_checkpoint(path, {"step": 3, "config": {}})
    else:
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"step 3"}[damage])
    assert cli.main(["export", str(path), "--output", str(tmp_path / "files")]) == 1
    assert str(path) in "".join(capsys.readouterr().err.split("\n"))
    assert not (tmp_path / "files").exists()


def test_export_without_the_training_images(tiny_config):
    path = trained(tiny_config)
    state = load_checkpoint(path)
    state["config"]["data"] = "folder/that/is/gone"
    save_checkpoint(path, state)
    assert export(path, None, CONSOLE) < 1e-5
