"""Configurations: plain values and YAML files match the command line, and errors name the wrong option."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from fused_margin.commands.train import parse
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.config_values import ConfigError, overlay, read_file, write_file
from fused_margin.trainer.options import parse_options
from fused_margin.trainer.train.checkpoint import CheckpointError


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config_file(text):
    Path("run.yaml").write_text(text)
    return ["--config", "run.yaml"]


def test_file_gives_defaults_and_the_command_line_wins():
    file = config_file(
        "data: digits\nepochs: 7\nseed: 5\noptimizer: {lr: 1e-3, momentum: 0.5, milestones: [0.5, 0.9]}\n"
    )
    config = parse([*file, "--epochs", "3", "--optimizer.momentum", "0.25"])
    assert config.data == "digits" and config.epochs == 3 and config.seed == 5
    assert config.batch_size == 64  # the defaults for digits still apply
    assert config.optimizer.lr == 0.001 and config.optimizer.momentum == 0.25
    assert config.optimizer.milestones == (0.5, 0.9)
    assert config.output.parent == Path("runs") and config.output.name.startswith("digits-")


def test_defaults_depend_on_the_data_in_the_file():
    config = parse(config_file("network: lenet\nloss: {name: cosface}\nmodel: {widths: [3, 4, 5]}\n"))
    expected = TrainConfig.defaults("glyphs", "lenet", "cosface")
    assert config.loss == expected.loss
    assert config.model == dataclasses.replace(expected.model, widths=(3, 4, 5))
    assert parse([*config_file("network: lenet\n"), "--network", "paper"]).model.image_size == (112, 96)


def test_file_of_a_run_starts_the_same_run(tmp_path):
    options = "--data digits --loss.name cosface --loss.options workspace_mb=32 --model.widths 4 4 8 8 --backbone a.b"
    more = "--backbone-options size=(3,4) rate=0.5 name=resnet18 text='1e-3' --optimizer.schedule step --optimizer.lr 1e-7 --output one"
    config = parse(f"{options} {more}".split())
    write_file(tmp_path / "config.yaml", config.to_file_values())
    again = parse(["--config", "config.yaml", "--output", "two"])
    assert config.differences(again) == []
    assert again == dataclasses.replace(config, output=Path("two"), config=Path("config.yaml"))
    assert again.backbone_options == {"size": (3, 4), "rate": 0.5, "name": "resnet18", "text": "1e-3"}
    assert "output" not in yaml.safe_load((tmp_path / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "run.yaml: epoch: no such option, got 3; did you mean 'epochs'?"),
        ("loss: {name: arcfac}", "got 'arcfac'; did you mean 'arcface'?"),
        ("loss: {options: {esy: 1}}", "gradient, label_smoothing, sub_centers, workspace_mb; did you mean 'easy'?"),
        ("optimizer: {rate: 3}", "run.yaml: optimizer.rate: no such option, got 3"),
        ("optimizer: 3", "optimizer: Input should be an object, got 3"),
        ("epochs: many", "epochs: Input should be a valid integer, got 'many'"),
        ("epochs: 1.5", "epochs: Input should be a valid integer, got 1.5"),
        ("epochs: true", "epochs: Input should be a valid integer, got True"),
        ("optimizer: {lr: fast}", "optimizer.lr: Input should be a valid number, got 'fast'"),
        ("optimizer: {milestones: [a]}", "optimizer.milestones.0: Input should be a valid number, got 'a'"),
        ("optimizer: {schedule: cosine}", "optimizer.schedule: Input should be 'poly' or 'step', got 'cosine'"),
        ("optimizer: {lr: -1}", "run.yaml: optimizer.lr must be positive"),
        ("model: {image_size: [8]}", "model.image_size.1: Field required, got [8]"),
        ("model: {depth: 11}", "model.depth: Input should be 4, 10, 20, 36 or 64, got 11"),
        ("model: {widths: 3}", "model.widths: Input should be a valid array, got 3"),
        ("augmentation: {mirror: 1}", "augmentation.mirror: Input should be a valid boolean, got 1"),
        ("data: 3", "data: Input should be a valid string, got 3"),
        ("data: no/such/folder", "run.yaml: data: no folder 'no/such/folder'"),
        ("backbone: a.b\nbackbone_options: [1]", "backbone_options: Input should be an object, got [1]"),
        (
            "backbone: a.b\nbackbone_options: {x: 2020-01-01}",
            "run.yaml: a value is neither number, text, list nor mapping",
        ),
        ("resume: true", "run.yaml: resume: only on the command line"),
        ("- 3", "run.yaml: expected options with values, such as `epochs: 3`, got [3]"),
        ("", "run.yaml: expected options with values, such as `epochs: 3`, got None"),
        ("a: [", "cannot read the configuration run.yaml"),
        ("a: !!python/object/apply:os.getcwd []", "cannot read the configuration run.yaml"),
    ],
)
def test_file_errors(text, message):
    with pytest.raises(ConfigError) as error:
        parse(config_file(text))
    assert message in str(error.value)


def test_missing_file():
    with pytest.raises(ConfigError, match="nothing.yaml"):
        read_file(Path("nothing.yaml"))


def test_command_line_replaces_output_and_data_of_the_file():
    file = config_file("output: here\ndata: no/such/folder\n")
    assert parse([*file, "--data", "digits"]).output == Path("here")
    assert parse([*file, "--data", "digits", "--output", "there"]).output == Path("there")
    with pytest.raises(CheckpointError, match="no checkpoint at here"):
        parse([*file, "--data", "digits", "--resume"])


def test_plain_values_round_trip():
    config = TrainConfig.defaults("digits")
    assert TrainConfig.from_dict(config.to_dict()) == config
    values = config.to_dict()
    del values["optimizer"]["lr"]
    with pytest.raises(ValueError, match="not a configuration of this version: optimizer.lr: not given"):
        TrainConfig.from_dict(values)
    with pytest.raises(ValueError, match="not a configuration .*: sise: no such option"):
        TrainConfig.from_dict({**config.to_dict(), "sise": 3})
    with pytest.raises(ValueError, match="epochs: Input should be a valid integer, got 'two'"):
        TrainConfig.from_dict({**config.to_dict(), "epochs": "two"})
    assert overlay(config, {"model": {"embedding_size": 3}}).model.embedding_size == 3


def test_parsing_of_user_options():
    words = [
        "a=1",
        "b=1e-3",
        "c=(1, 2)",
        "d=0.3,0.6",
        "e=None",
        "f=True",
        "g=resnet18",
        "h='7'",
        "i={'x': [1]}",
        "j=a=b",
    ]
    assert parse_options(words) == {
        "a": 1, "b": 0.001, "c": (1, 2), "d": (0.3, 0.6), "e": None, "f": True, "g": "resnet18", "h": "7",
        "i": {"x": (1,)}, "j": "a=b",
    }  # fmt: skip
    for wrong in ("a", "=3", "a=1j", "a={1: 2}"):
        with pytest.raises(ValueError, match="expected"):
            parse_options([wrong])


@pytest.mark.parametrize(
    "wrong", [{"accumulate": 0}, {"accumulate": 200}, {"log_every": 0}, {"backbone_options": {"a": 1}}]
)
def test_invalid_values(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(TrainConfig(), **wrong)
