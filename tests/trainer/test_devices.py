"""Training in several processes: divided images and classes, equal weights, common stops and resumptions."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from forks import run_command
from rich.console import Console

from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.data.augment import AugmentationConfig
from fused_margin.trainer.data.base import DataError
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LossConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*options):
    return [sys.executable, "-m", "fused_margin.cli", "train", *map(str, options)]


def train(forks, *options, devices=2):
    """Train with one process per device, as started by Lightning or torchrun; returns their output."""
    forks.preload("fused_margin.trainer.train.run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"} if devices > 1 else {}
    options = "train", *map(str, options), "--devices", str(devices)
    processes = [
        forks.start(run_command, *options, environment=environment | ({"LOCAL_RANK": str(rank)} if devices > 1 else {}))
        for rank in range(devices)
    ]
    codes = [process.wait() for process in processes]
    printed = "".join(process.output for process in processes)
    assert codes == [0] * devices, printed
    return printed


class Stopped(Exception):
    pass


DIVIDED = {
    "arcface": LossConfig("arcface", margin=0.2, scale=16.0, exclusive_weight=1.0),
    "l2-softmax": LossConfig("l2-softmax"),  # has a bias and a learned scale
}


@pytest.fixture
def partial_run(tiny_config, tmp_path, name):
    """A run started by one process, without augmentation, which would differ between processes."""
    nothing = dict.fromkeys(("rotation", "scale", "shear", "shift", "blur", "noise"), 0)
    config = dataclasses.replace(
        tiny_config,
        augmentation=AugmentationConfig(**nothing),
        checkpoint_every=25,
        output=tmp_path / "partial_run",
        loss=DIVIDED[name],
    )
    trainer = Trainer(config, load_splits("digits", (8, 8), 1, 0.3, seed=0))
    config.output.mkdir()

    def save():
        save_checkpoint(config.output / FILE_NAME, trainer.state_dict())
        raise Stopped

    with pytest.raises(Stopped):
        trainer.fit(Console(quiet=True), save)
    return config.output


@pytest.mark.parametrize("name", ["arcface", pytest.param("l2-softmax", marks=pytest.mark.slow)])
def test_two_processes_match_one(forks, partial_run, tmp_path, name):
    states = []
    for devices in (1, 2):
        output = tmp_path / str(devices)
        shutil.copytree(partial_run, output)
        printed = train(forks, "--resume", "--output", output, devices=devices)
        assert printed.count("Verification on 3 identities") == 1  # only one process prints
        assert (output / "report.json").exists()
        states.append(load_checkpoint(output / FILE_NAME))
    one, two = states
    assert one["step"] == two["step"] == 40
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_signal_stops_all_processes_and_one_device_resumes(tiny_options, tmp_path):
    output = tmp_path / "run"
    options = [*tiny_options, "--epochs", "500", "--devices", "2", "--output", output, "--accumulate", "2"]
    process = subprocess.Popen(command(*options), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log, waited = output / "log.csv", time.monotonic()
    while not (log.exists() and len(log.read_text().splitlines()) > 1):
        assert process.poll() is None and time.monotonic() - waited < 120
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 130 and printed.count("continue with") == 1, printed
    step = load_checkpoint(output / FILE_NAME)["step"]
    assert step > 0
    trainer_options = TrainConfig.from_dict(load_checkpoint(output / FILE_NAME)["config"])
    config = dataclasses.replace(trainer_options, devices=1)
    trainer = Trainer(config, load_splits("digits", (8, 8), 1, config.test_fraction, seed=0))
    trainer.load_state_dict(load_checkpoint(output / FILE_NAME))
    assert trainer.step == step and trainer.class_weight.shape == (7, 8)


def test_processes_without_a_readable_image(forks, face_folder, tmp_path):
    """Batches of two images, half of which are broken: often one process has no image, sometimes both."""
    folder = tmp_path / "faces"
    shutil.copytree(face_folder, folder)
    broken = sorted(folder.glob("*/[01].png"))
    for path in broken:
        path.write_bytes(b"")
    options = ["--model.image-size", "8", "8", "--model.channels", "3", "--model.widths", "4", "4", "8", "8"]
    options += [
        "--model.embedding-size",
        "8",
        "--evaluation.pairs",
        "20",
        "--evaluation.folds",
        "2",
        "--accelerator",
        "cpu",
    ]
    train(forks, "--data", folder, "--output", tmp_path / "run", "--epochs", 2, "--batch-size", 2, *options)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    state = load_checkpoint(tmp_path / "run" / FILE_NAME)
    assert [named.split(": ")[0] for named in report["data"]["unreadable"]] == [str(path) for path in broken]
    assert 0 < len(state["losses"]) < state["step"]


@pytest.mark.parametrize("name", ["l-softmax", pytest.param("softmax", marks=pytest.mark.slow)])
def test_softmax_losses_in_two_processes(forks, tiny_options, tmp_path, name):
    train(forks, *tiny_options, "--loss.name", name, "--output", tmp_path / "run")
    training = json.loads((tmp_path / "run" / "report.json").read_text())["training"]
    assert training["last_loss"] < training["first_loss"]
    model = load_checkpoint(tmp_path / "run" / FILE_NAME)["model"]
    assert model["criterion.loss_fn.weight"].shape == (7, 8)
    if name == "softmax":
        assert model["criterion.loss_fn.bias"].shape == (7,) and model["criterion.loss_fn.bias"].abs().min() > 0


def test_center_loss_is_not_supported_on_several_devices(tiny_config):
    loss = dataclasses.replace(LossConfig(), companions=dataclasses.replace(LossConfig().companions, center=0.1))
    config = dataclasses.replace(tiny_config, devices=2, loss=loss)
    with pytest.raises(DataError, match="--devices 2: "):
        Trainer(config, load_splits("digits", (8, 8), 1, 0.3, seed=0))
