"""Runs that the tests of training stop, resume and compare."""

import os
import signal

import torch
from rich.console import Console

from fused_margin.trainer.train.checkpoint import FILE_NAME, save_checkpoint
from fused_margin.trainer.train.loop import Trainer


class StoppedTrainer(Trainer):
    """Calls `stop` during step number `at`."""

    def __init__(self, config, splits, at, stop):
        super().__init__(config, splits)
        self.at, self.stop = at, stop

    def train_step(self, images, labels):
        if self.step + 1 == self.at:
            self.stop()
        return super().train_step(images, labels)


def fit(config, splits, console, state=None, trainer=None):
    """Train with checkpoints in the output folder; returns the trainer."""
    trainer = trainer or Trainer(config, splits)
    if state is not None:
        trainer.load_state_dict(state)
    config.output.mkdir(exist_ok=True)
    trainer.fit(console, lambda: save_checkpoint(config.output / FILE_NAME, trainer.state_dict()))
    return trainer


def train_and_die(config, splits, at):
    """Train until step number `at`, during which the process is killed."""
    torch.set_num_threads(1)
    stopped = StoppedTrainer(config, splits, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    fit(config, splits, Console(quiet=True), trainer=stopped)


def assert_same_state(ours, theirs):
    """Assert equality bit for bit, except for times and configuration."""
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {"seconds", "config"}:
        if isinstance(ours[name], dict):
            assert_same_state(ours[name], theirs[name])
        elif isinstance(ours[name], torch.Tensor):
            assert torch.equal(ours[name], theirs[name]), name
        else:
            assert ours[name] == theirs[name], name
