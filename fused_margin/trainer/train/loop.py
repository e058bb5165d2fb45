"""The training loop and the training step."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from fused_margin.evaluation.errors import DataError

from ..data.augment import augment
from ..data.base import data_loader, to_input
from ..data.identity_batches import split_between_identities
from .interrupts import Interrupted, watch_for_stop
from .optimizer import learning_rate_factor
from .progress import TrainingProgress
from .state import MODEL_STREAM, TrainingState

AUGMENT_STREAM = 1  # of the augmentation's random numbers
RECENT_STEPS = 20  # number of steps that the shown loss is averaged over
STOP_EVERY = 5  # steps between checks of several processes for a stop request


class StepResult(NamedTuple):
    """Results of a step. They stay on the device, because reading them would wait for it."""

    loss: Tensor
    gradient_norm: Tensor  # of the backbone, before clipping
    parts: dict[str, Tensor]  # of the loss, if it has several


class LoggedStep(NamedTuple):
    """A step whose results have not been read yet."""

    step: int
    result: StepResult
    values: dict[str, float] | None  # further values to log; None: the step is not logged


class Trainer(TrainingState):
    """A training, and its steps."""

    @property
    def logged_names(self) -> list[str]:
        """Names of the values that `fit` logs."""
        names = ["loss", "lr", "images_per_second", "gradient_norm"]
        parts = self.criterion.part_names
        return names + [f"loss/{name}" for name in parts] if len(parts) > 1 else names

    @property
    def learning_rate(self) -> float:
        """Learning rate of the backbone in the next step."""
        return self.config.optimizer.lr * self._learning_rate_factor()

    def fit(
        self,
        console: Console,
        save: Callable[[], None],
        log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    ) -> None:
        """Train from `self.step` to the end.

        Args:
            console: for the progress.
            save: called at checkpoints, after all earlier steps have been logged.
            log: called with a step and its values, by `logged_names`.

        Raises:
            Interrupted: SIGINT or SIGTERM was received; `save` has been called.
            FloatingPointError: the loss is not finite.
            DataError: no image could be read.
        """
        config = self.config
        self.batches.start_step = self.step
        loader = data_loader(self.splits.train, self.batches, config.workers)
        pending: list[LoggedStep] = []

        def flush() -> None:
            if pending:
                losses = torch.stack([logged.result.loss for logged in pending]).tolist()
                self.losses += losses
                for logged, loss in zip(pending, losses, strict=True):
                    if logged.values is not None:
                        log(logged.step, {"loss": loss, **logged.values, **_fetch(logged.result)})
                pending.clear()
                if not all(map(math.isfinite, losses)):
                    raise FloatingPointError(
                        f"the loss is not finite before step {self.step}; lower --optimizer.lr or --optimizer.class-lr"
                    )

        def save_trained() -> None:
            flush()
            if self.losses:  # nothing is trained before the first readable image
                save()

        self.model.train()
        started = time.monotonic() - self.seconds
        progress = TrainingProgress(console, self.step, self.total_steps, config.epochs)
        speed = Speed()
        with watch_for_stop() as stop, closing(progress):
            for batch in loader:
                self.unreadable.update(batch.unreadable)
                lr = self.learning_rate
                result = self.train_step(batch.images, batch.labels)
                self.step += 1
                self.seconds = time.monotonic() - started
                speed.count(len(batch.labels))
                if result is not None:
                    is_logged = self.step % config.log_every == 0 or self.step in (1, self.total_steps)
                    known = {"lr": lr, "images_per_second": speed.since_last()} if is_logged else None
                    pending.append(LoggedStep(self.step, result, known))
                # A whole epoch has had no readable image.
                if self.step % self.batches.steps_per_epoch == 0 and not self.losses and not pending:
                    raise DataError(f"none of the {len(self.splits.train):,} images to train on could be read")
                if progress.due(self.step, len(batch.labels)):
                    flush()
                    recent = self.losses[-RECENT_STEPS:]
                    mean = sum(recent) / len(recent) if recent else float("nan")
                    progress.show(self.step, mean, lr)
                if self.step == self.total_steps or self.step % config.checkpoint_every == 0:
                    save_trained()
                # All processes must stop after the same step. Communicating at every step would be slow.
                checks_stop = self.devices.world_size == 1 or self.step % STOP_EVERY == 0
                if checks_stop and self.devices.any(stop.made):
                    save_trained()
                    raise Interrupted

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self.step, self.total_steps, self.config.optimizer)

    def train_step(self, images: Tensor, labels: Tensor) -> StepResult | None:
        """One step on this process's part of the images, which may be empty; None if all processes have none."""
        device = self.devices.device
        if self.config.images_per_identity:
            sizes = split_between_identities(labels, self.config.accumulate)
        else:
            sizes = [len(part) for part in labels.tensor_split(self.config.accumulate)]
        counts = self.devices.all_reduce_sum(torch.tensor(sizes)).tolist()  # of each micro-batch, over all processes
        if not sum(counts):
            return None
        # Seeds depend on the step, so that a resumed run draws the same numbers as an uninterrupted one.
        torch.manual_seed(self._seed(MODEL_STREAM, self.step))
        generator = torch.Generator(device).manual_seed(self._seed(AUGMENT_STREAM, self.step))
        inputs = augment(to_input(images.to(device)), self.config.augmentation, generator)
        inputs, labels = inputs.contiguous(memory_format=torch.channels_last), labels.to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._learning_rate_factor()

        self.optimizer.zero_grad()
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        micro_batches = inputs.split(sizes), labels.split(sizes)
        for micro_inputs, micro_labels, count in zip(*micro_batches, counts, strict=True):
            if not count:
                continue
            share = count / sum(counts)
            loss = self._loss(micro_inputs, micro_labels) * share
            self.fabric.backward(loss)
            losses.append(loss.detach())
            for name, part in self.criterion.last_parts.items():
                parts[name] = parts.get(name, 0.0) + part * share
        # Fabric's clipping would include all parameters of the optimizer, but projected class weights need none.
        self.fabric.strategy.precision.unscale_gradients(self.optimizer.optimizer)
        norm = nn.utils.clip_grad_norm_(self.backbone.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.backbone)
        return StepResult(functools.reduce(torch.add, losses), norm, parts if len(parts) > 1 else {})

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss over the images of all processes."""
        output = self._wrapped_backbone(images)
        outputs = tuple(output) if self.config.model.groups else (output,)  # with the logits of the groups
        if self.devices.world_size > 1:  # undoes DDP's division of the gradients by the number of processes
            # Of views, because the network computes the embeddings from the logits, whose gradient would be scaled twice.
            outputs = tuple(tensor.view_as(tensor) for tensor in outputs)
            for tensor in outputs:
                tensor.register_hook(lambda gradient: gradient * self.devices.world_size)
        embeddings, *group_logits = outputs
        return self.criterion(embeddings, labels, *group_logits)


class Speed:
    """Images per second between two calls of `since_last`."""

    def __init__(self) -> None:
        self._images, self._since = 0, time.monotonic()

    def count(self, images: int) -> None:
        self._images += images

    def since_last(self) -> float:
        now = time.monotonic()
        speed = self._images / (now - self._since)
        self._images, self._since = 0, now
        return speed


def _fetch(result: StepResult) -> dict[str, float]:
    """The values besides the loss by their logged names, copied from the device at once."""
    named = {"gradient_norm": result.gradient_norm, **{f"loss/{name}": part for name, part in result.parts.items()}}
    return dict(zip(named, torch.stack([value.float() for value in named.values()]).tolist(), strict=True))
