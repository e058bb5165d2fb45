"""Checkpoints: exact resumption after an interruption or a crash, atomic replacement, errors."""

import dataclasses
import os
import re
import signal
import subprocess

import numpy as np
import pytest
import torch
from training_runs import StoppedTrainer, assert_same_state, fit

from fused_margin.trainer.config import OptimizerConfig, TrainConfig
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.train.checkpoint import (
    FILE_NAME,
    CheckpointError,
    load_checkpoint,
    load_run,
    save_checkpoint,
)
from fused_margin.trainer.train.interrupts import Interrupted
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LossConfig
from fused_margin.trainer.train.run import run

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_matches_uninterrupted_run(tiny_config, splits, console, tmp_path, signal_number):
    uninterrupted = fit(dataclasses.replace(tiny_config, output=tmp_path / "uninterrupted"), splits, console)

    before = signal.getsignal(signal_number)
    stopped = StoppedTrainer(tiny_config, splits, 13, lambda: os.kill(os.getpid(), signal_number))
    with pytest.raises(Interrupted):
        fit(tiny_config, splits, console, trainer=stopped)
    assert signal.getsignal(signal_number) is before
    state = load_checkpoint(tiny_config.output / FILE_NAME)
    assert state["step"] == 13 and len(state["losses"]) == 13
    torch.manual_seed(99)  # another process would have other random numbers
    resumed = fit(tiny_config, splits, console, state=state)
    assert resumed.step == uninterrupted.step == 40
    assert_same_state(resumed.state_dict(), uninterrupted.state_dict())


def test_killed_run_continues_from_its_last_checkpoint(tiny_config, splits, console, tmp_path):
    config = dataclasses.replace(tiny_config, checkpoint_every=10)
    uninterrupted = fit(dataclasses.replace(config, output=tmp_path / "uninterrupted"), splits, console)

    def die():
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(config, splits, console, trainer=StoppedTrainer(config, splits, 27, die))
    state = load_checkpoint(config.output / FILE_NAME)
    assert state["step"] == 20
    assert_same_state(fit(config, splits, console, state=state).state_dict(), uninterrupted.state_dict())


def test_every_option_is_resumed_exactly(tiny_config, splits, console, tmp_path):
    """Options with random numbers or state: dropout, random margins, batch norm, the average of the weights."""
    config = dataclasses.replace(
        tiny_config,
        checkpoint_every=10,
        accumulate=3,
        backbone="user_networks.BatchNormNet",
        backbone_options={"dropout": 0.3},
        loss=LossConfig("elasticface"),
        optimizer=OptimizerConfig(ema=0.9, schedule="step"),
    )
    uninterrupted = fit(dataclasses.replace(config, output=tmp_path / "uninterrupted"), splits, console)

    def die():
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(config, splits, console, trainer=StoppedTrainer(config, splits, 27, die))
    torch.manual_seed(99)
    state = load_checkpoint(config.output / FILE_NAME)
    assert state["step"] == 20
    resumed = fit(config, splits, console, state=state)
    assert_same_state(resumed.state_dict(), uninterrupted.state_dict())


def test_temporary_files_of_killed_processes_are_removed(tiny_config, console):
    folder = tiny_config.output
    folder.mkdir()
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    for name in (f"{FILE_NAME}.{dead.pid}.tmp", f"{FILE_NAME}.{os.getppid()}.tmp", f"{FILE_NAME}.mine.tmp"):
        (folder / name).write_bytes(b"half")
    run(tiny_config, console)
    left = sorted(path.name for path in folder.glob("*.tmp"))
    # one belongs to a running process, the other is not a temporary checkpoint
    assert left == sorted([f"{FILE_NAME}.{os.getppid()}.tmp", f"{FILE_NAME}.mine.tmp"])


def test_changed_data_is_not_resumed(tiny_config, splits, console):
    state = Trainer(tiny_config, splits).state_dict()
    other = load_splits("digits", (8, 8), 1, 0.3, seed=1)
    with pytest.raises(CheckpointError, match="changed"):
        Trainer(tiny_config, other).load_state_dict(state)


def test_checkpoint_is_replaced_atomically(tmp_path, monkeypatch):
    path = tmp_path / FILE_NAME
    save_checkpoint(path, {"step": 1})

    def fail(*args, **kwargs):
        args[1].write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("content", [b"", b"no zip file", None])
def test_damaged_checkpoints(tmp_path, content):
    path = tmp_path / FILE_NAME
    if content is None:  # the first half of a valid one
        save_checkpoint(path, {"weights": torch.randn(1000)})
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read the checkpoint"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_checkpoint(tmp_path / "other.pt")
    torch.save({"step": 3}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        load_checkpoint(path)


def test_any_truncation_is_a_checkpoint_error(tmp_path):
    """For a file truncated at any byte, and for arbitrary content, the error names the file."""
    path = tmp_path / FILE_NAME
    save_checkpoint(path, {"weights": torch.randn(100), "step": 3})
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    cuts = [content[:end] for end in range(0, len(content), max(1, len(content) // 60))]
    random = [rng.integers(0, 256, 100, dtype=np.uint8).tobytes() for _ in range(100)]
    for broken in cuts + random + [b"\x80\x02" + part for part in random]:
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_checkpoint(path)


@pytest.mark.parametrize("missing", ["config", "model", "average", "losses"])
def test_incomplete_checkpoint_is_an_error(tiny_config, splits, tmp_path, missing):
    path = tmp_path / FILE_NAME
    state = Trainer(tiny_config, splits).state_dict()
    save_checkpoint(path, {name: value for name, value in state.items() if name != missing})
    with pytest.raises(CheckpointError, match=f"cannot resume .*{FILE_NAME}: .* no usable {missing}"):
        load_run(path, "resume")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs: 3\n", "it is not a file written by torch.save"),
        (b"\x93NUMPY\x01\x00 and numbers", "it is not a file written by torch.save"),
        (torch.nn.Linear(2, 2), "it contains other objects than tensors and plain values"),
    ],
)
def test_files_of_another_kind_are_checkpoint_errors(tmp_path, content, message):
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_config_in_a_checkpoint(tmp_path):
    config = TrainConfig.defaults("digits")
    assert TrainConfig.from_dict(config.to_dict()) == config
    save_checkpoint(tmp_path / FILE_NAME, {"config": config.to_dict()})
    assert TrainConfig.from_dict(load_checkpoint(tmp_path / FILE_NAME)["config"]) == config
    other = dataclasses.replace(config, epochs=7, workers=3)
    assert config.differences(other) == [f"--epochs {config.epochs} (the run has 7)"]
