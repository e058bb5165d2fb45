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
from training_runs import assert_same_state, fit, train_and_die

from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data import load_splits
from fused_margin.trainer.data.config import AugmentationConfig
from fused_margin.trainer.train.auxiliary import AuxiliaryConfig
from fused_margin.trainer.train.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from fused_margin.trainer.train.loop import Trainer
from fused_margin.trainer.train.named_losses import LossConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals as POSIX has them")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*options):
    return [sys.executable, "-m", "fused_margin.cli", "train", *map(str, options)]


def start(forks, *options, devices=2):
    """Start one process per device, as Lightning or torchrun do."""
    forks.preload("fused_margin.trainer.train.run")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0"} if devices > 1 else {}
    options = "train", *map(str, options), "--devices", str(devices)
    return [
        forks.start(run_command, *options, environment=environment | ({"LOCAL_RANK": str(rank)} if devices > 1 else {}))
        for rank in range(devices)
    ]


def train(forks, *options, devices=2):
    """Train with one process per device; returns their output."""
    processes = start(forks, *options, devices=devices)
    codes = [process.wait() for process in processes]
    printed = "".join(process.output for process in processes)
    assert codes == [0] * devices, printed
    return printed


class Stopped(Exception):
    pass


DIVIDED = {
    "arcface": LossConfig("arcface", margin=0.2, scale=16.0, exclusive_weight=1.0),
    "l2-softmax": LossConfig("l2-softmax"),  # has a bias and a learned scale
    "bfloat16": LossConfig("arcface", margin=0.2, scale=16.0, weight_dtype="bfloat16"),
    "companions": LossConfig(
        "arcface",
        margin=0.2,
        scale=16.0,
        companions=AuxiliaryConfig(
            center=0.01, ring=0.01, intra=1.0, inter=1.0, uniform=1.0, range=1.0, marginal=1.0, center_invariant=1e-3
        ),
    ),
    "triplet": LossConfig("triplet", companions=AuxiliaryConfig(angular_triplet=0.1, contrastive=0.1, deepid2=0.01)),
    "siamese-l1": LossConfig("siamese-l1", companions=AuxiliaryConfig(siamese=0.5)),
}


@pytest.fixture
def partial_run(tiny_config, tmp_path, name):
    """A run started by one process, without augmentation, which would differ between processes."""
    nothing = dict.fromkeys(("rotation", "scale", "shear", "shift", "blur", "noise"), 0)
    config = dataclasses.replace(
        tiny_config,
        augmentation=AugmentationConfig(**nothing),
        checkpoint_every=39 if name == "bfloat16" else 25,
        output=tmp_path / "partial_run",
        loss=DIVIDED[name],
        images_per_identity=0 if DIVIDED[name].has_class_weights else 4,
    )
    trainer = Trainer(config, load_splits("digits", (8, 8), 1, 0.3, seed=0))
    config.output.mkdir()

    def save():
        save_checkpoint(config.output / FILE_NAME, trainer.state_dict())
        raise Stopped

    with pytest.raises(Stopped):
        trainer.fit(Console(quiet=True), save)
    return config.output


@pytest.mark.parametrize(
    "name",
    [
        "arcface",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("l2-softmax", "companions", "triplet", "siamese-l1")),
    ],
)
def test_two_processes_match_one(forks, partial_run, tmp_path, name):
    """The two step the class weights in the backward, if they can, and the one by their gradient."""
    states = []
    for devices in (1, 2):
        output = tmp_path / str(devices)
        shutil.copytree(partial_run, output)
        in_backward: tuple[object, ...] = ("--optimizer.in-backward", devices == 2 and name != "companions")
        if not DIVIDED[name].has_class_weights:
            in_backward = ()
        printed = train(forks, "--resume", "--output", output, *in_backward, devices=devices)
        assert printed.count("Verification on 3 identities") == 1  # only one process prints
        assert (output / "report.json").exists()
        states.append(load_checkpoint(output / FILE_NAME))
    one, two = states
    assert one["step"] == two["step"] == 40
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(two["optimizer"]["state"], one["optimizer"]["state"], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["companions"])
def test_one_process_goes_on_with_the_centers_of_two(forks, partial_run, tmp_path, name):
    output = tmp_path / "two"
    shutil.copytree(partial_run, output)
    train(forks, "--resume", "--output", output)
    state = load_checkpoint(output / FILE_NAME)
    centers = state["model"]["criterion.companions.losses.center.centers"]
    before = load_checkpoint(partial_run / FILE_NAME)["model"]["criterion.companions.losses.center.centers"]
    assert centers.shape == (7, 8) and (centers != before).any(dim=1).all()
    config = dataclasses.replace(TrainConfig.from_dict(state["config"]), devices=1)
    trainer = Trainer(config, load_splits("digits", (8, 8), 1, config.test_fraction, seed=0))
    trainer.load_state_dict(state)
    assert_same_state(trainer.state_dict()["model"], state["model"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bfloat16"])
def test_bfloat16_class_weights_in_two_processes(forks, partial_run, tmp_path, name):
    """The random bits do not depend on the number of processes, so that few elements are rounded differently."""
    assert load_checkpoint(partial_run / FILE_NAME)["model"]["criterion.loss_fn.weight"].dtype == torch.bfloat16
    states = []
    for devices in (1, 2, 1):
        output = tmp_path / str(len(states))
        shutil.copytree(partial_run, output)
        train(forks, "--resume", "--output", output, devices=devices)
        states.append(load_checkpoint(output / FILE_NAME))
    one, two, again = states
    assert_same_state(one, again)
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-4, atol=0)
    (ours,), (expected,) = (
        [values for values in state["optimizer"]["state"].values() if "step" in values] for state in (two, one)
    )
    assert ours["step"] == expected["step"] == 40
    assert (ours["momentum_buffer"] == expected["momentum_buffer"]).float().mean() > 0.9
    weights = [state["model"]["criterion.loss_fn.weight"] for state in (two, one)]
    assert (weights[0] == weights[1]).float().mean() > 0.9


def test_killed_process_continues_exactly(forks, tiny_config, tmp_path):
    """With class weights in bfloat16, whose random rounding depends on the number of steps so far."""
    config = dataclasses.replace(
        tiny_config,
        epochs=1,
        checkpoint_every=4,
        loss=LossConfig("arcface", 0.2, 16.0, 1.0, weight_dtype="bfloat16"),
    )
    splits, quiet = load_splits("digits", (8, 8), 1, 0.3, seed=0), Console(quiet=True)
    uninterrupted = fit(dataclasses.replace(config, output=tmp_path / "uninterrupted"), splits, quiet)
    forks.preload("fused_margin.trainer.train.run")
    process = forks.start(train_and_die, config, splits, 14)
    assert process.wait() == -signal.SIGKILL, process.output
    state = load_checkpoint(config.output / FILE_NAME)
    assert state["step"] == 12
    torch.manual_seed(99)
    resumed = fit(config, splits, quiet, state=state)
    assert_same_state(resumed.state_dict(), uninterrupted.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_processes_continue_exactly(forks, tiny_options, tmp_path, dtype):
    """Two processes, both killed at any moment."""
    options = [*tiny_options, "--epochs", "6", "--checkpoint-every", "2", "--loss.weight-dtype", dtype]
    train(forks, *options, "--output", tmp_path / "uninterrupted")
    output = tmp_path / "killed"
    processes = start(forks, *options, "--output", output)
    while not (output / FILE_NAME).exists() or load_checkpoint(output / FILE_NAME)["step"] < 30:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    assert load_checkpoint(output / FILE_NAME)["step"] < 120
    train(forks, "--resume", "--output", output)
    assert_same_state(*(load_checkpoint(tmp_path / name / FILE_NAME) for name in ("killed", "uninterrupted")))


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["l-softmax", "softmax"])
def test_softmax_losses_in_two_processes(forks, tiny_options, tmp_path, name):
    train(forks, *tiny_options, "--loss.name", name, "--output", tmp_path / "run")
    training = json.loads((tmp_path / "run" / "report.json").read_text())["training"]
    assert training["last_loss"] < training["first_loss"]
    model = load_checkpoint(tmp_path / "run" / FILE_NAME)["model"]
    assert model["criterion.loss_fn.weight"].shape == (7, 8)
    if name == "softmax":
        assert model["criterion.loss_fn.bias"].shape == (7,) and model["criterion.loss_fn.bias"].abs().min() > 0
