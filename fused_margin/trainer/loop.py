"""The training loop: what a step is, and what has to be saved to go on after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_margin as fm

from .checkpoint import CheckpointError
from .config import TrainConfig
from .data.augment import augment
from .data.base import DataError, Splits, TrainingBatches, data_loader, seeded_generator, to_input
from .interrupts import Interrupted, watch_for_stop
from .losses import Criterion
from .models import build_backbone, embedding_size
from .optimisation import learning_rate_factor, make_optimizer
from .progress import TrainingProgress

AUGMENT_STREAM = 1  # keeps the augmentation's random numbers apart from the order's
MODEL_STREAM = 3  # and those that the network and the loss draw; 2 is the evaluation's
RECENT_STEPS = 20  # the shown loss is their mean


class Recognizer(nn.Module):
    """Backbone and criterion as one module: images (N, C, H, W) and labels (N,) to the loss."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = build_backbone(config)
        self.criterion = Criterion(config.loss, num_classes, embedding_size(self.backbone, config.model))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(self.backbone(images), labels)


class StepResult(NamedTuple):
    """What a step tells, left on the device: reading it would stall that."""

    loss: Tensor
    gradient_norm: Tensor  # of the backbone, before it is clipped
    parts: dict[str, Tensor]  # of the loss, where it has several


class LoggedStep(NamedTuple):
    """A step whose values are yet to be read, and logged if it has any other."""

    step: int
    result: StepResult
    known: dict[str, float] | None


class Trainer:
    """Owns everything that changes from step to step."""

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        self.config, self.splits = config, splits
        self.fabric = _make_fabric(config)
        torch.manual_seed(config.seed)
        model = Recognizer(config, splits.train.num_classes)
        # Channels last is the layout that CPU and GPU convolutions are fastest in.
        model.backbone.to(memory_format=torch.channels_last)
        self.num_parameters = sum(p.numel() for p in model.backbone.parameters())

        optimizer = make_optimizer(model.backbone, model.criterion, config.optimizer)
        self.batches = TrainingBatches(len(splits.train), config.batch_size, config.epochs, config.seed)
        self.total_steps = len(self.batches)
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.average: AveragedModel | None = None
        if decay := config.optimizer.ema:
            self.average = AveragedModel(self.backbone, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.step = 0
        self.seconds = 0.0  # of training, over all its runs
        self.losses: list[float] = []  # of every step; a step without a readable image has none
        self.unreadable: set[str] = set()

    @property
    def backbone(self) -> nn.Module:
        return self.model.backbone

    @property
    def evaluated_backbone(self) -> nn.Module:
        """With the moving average of the weights, where there is one."""
        return self.backbone if self.average is None else self.average.module

    @property
    def class_weight(self) -> Tensor:
        return self.model.criterion.class_weight

    @property
    def learning_rate(self) -> float:
        """Of the backbone, at the next step."""
        return self.config.optimizer.lr * self._learning_rate_factor()

    def fit(
        self,
        console: Console,
        save: Callable[[], None],
        log: Callable[[int, Mapping[str, float]], None] = lambda step, values: None,
    ) -> None:
        """Train from `self.step` to the end, calling `save` at checkpoints and `log` with steps and their values.

        All that was logged up to a checkpoint has been when `save` is called.

        Raises:
            Interrupted: SIGINT or SIGTERM came; `save` has been called.
            FloatingPointError: the loss is not finite.
        """
        config = self.config
        self.batches.start_step = self.step
        loader = data_loader(self.splits.train, self.batches, config.workers)
        pending: list[LoggedStep] = []

        def flush() -> None:
            if pending:
                losses = torch.stack([each.result.loss for each in pending]).tolist()
                self.losses += losses
                for each, loss in zip(pending, losses, strict=True):
                    if each.known is not None:
                        log(each.step, {"loss": loss, **each.known, **_read(each.result)})
                pending.clear()
                if not all(map(math.isfinite, losses)):
                    raise FloatingPointError(
                        f"the loss is not finite before step {self.step}; lower --optimizer.lr or --optimizer.class-lr"
                    )

        self.model.train()
        started = time.monotonic() - self.seconds
        progress = TrainingProgress(console, self.step, self.total_steps, config.epochs)
        speed = Speed()
        with watch_for_stop() as stop, closing(progress):
            for batch in loader:
                self.unreadable.update(batch.unreadable)
                lr = self.learning_rate
                result = self.train_step(batch.images, batch.labels) if len(batch.labels) else None
                self.step += 1
                self.seconds = time.monotonic() - started
                speed.count(len(batch.labels))
                if result is not None:
                    is_logged = self.step % config.log_every == 0 or self.step == self.total_steps
                    known = {"lr": lr, "images_per_second": speed.since_last()} if is_logged else None
                    pending.append(LoggedStep(self.step, result, known))
                if progress.due(self.step, len(batch.labels)):
                    flush()
                    recent = self.losses[-RECENT_STEPS:]
                    mean = sum(recent) / len(recent) if recent else float("nan")
                    progress.show(self.step, mean, lr)
                if self.step == self.total_steps or self.step % config.checkpoint_every == 0:
                    flush()
                    save()
                if stop.made:
                    flush()
                    save()
                    raise Interrupted

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self.step, self.total_steps, self.config.optimizer)

    def train_step(self, images: Tensor, labels: Tensor) -> StepResult:
        device = self.fabric.device
        # Functions of seed and step: a resumed run draws what an unbroken one would have drawn.
        torch.manual_seed(seeded_generator(self.config.seed, MODEL_STREAM, self.step).initial_seed())
        generator = seeded_generator(self.config.seed, AUGMENT_STREAM, self.step, device=device)
        inputs = augment(to_input(images.to(device)), self.config.augmentation, generator)
        inputs, labels = inputs.contiguous(memory_format=torch.channels_last), labels.to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._learning_rate_factor()

        self.optimizer.zero_grad()
        total, parts = 0.0, {}
        pieces = min(self.config.accumulate, len(labels))
        for some_inputs, some_labels in zip(inputs.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
            share = len(some_labels) / len(labels)
            loss = self.model(some_inputs, some_labels) * share
            self.fabric.backward(loss)
            total = total + loss.detach()
            for name, part in self.model.criterion.last_parts.items():
                parts[name] = parts.get(name, 0.0) + part * share
        # Fabric's own clipping takes all of an optimizer's parameters; projected class weights need none.
        self.fabric.strategy.precision.unscale_gradients(self.optimizer.optimizer)
        norm = nn.utils.clip_grad_norm_(self.backbone.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.backbone)
        return StepResult(total, norm, parts if len(parts) > 1 else {})

    def state_dict(self) -> dict[str, Any]:
        """Everything a later step depends on."""
        return {
            "config": self.config.to_dict(),
            "data": self.splits.fingerprint(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss's scale, where there is one
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "unreadable": sorted(self.unreadable),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            CheckpointError: the images are not those the run was started with.
        """
        if state["data"] != self.splits.fingerprint():
            raise CheckpointError(
                f"the identities or images of {self.config.data!r} have changed since this run "
                "was started; start a new one"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.losses = state["losses"].tolist()
        self.unreadable = set(state["unreadable"])


def _make_fabric(config: TrainConfig) -> Fabric:
    accelerator, has_gpu = config.accelerator, fm.build_info()["cuda"]["available"]
    if accelerator == "auto":
        accelerator = "cuda" if has_gpu else "cpu"
    elif accelerator == "cuda" and not has_gpu:
        raise DataError("--accelerator cuda: there is no GPU, or the kernels are not built for it")
    if config.precision == "16-mixed" and accelerator == "cpu":
        raise DataError("--precision 16-mixed needs a GPU; on the CPU use bf16-mixed or 32-true")
    return Fabric(accelerator=accelerator, devices=1, precision=config.precision)


class Speed:
    """Images per second, between one question and the next."""

    def __init__(self) -> None:
        self._images, self._since = 0, time.monotonic()

    def count(self, images: int) -> None:
        self._images += images

    def since_last(self) -> float:
        now = time.monotonic()
        speed = self._images / (now - self._since)
        self._images, self._since = 0, now
        return speed


def _read(result: StepResult) -> dict[str, float]:
    """The values beside the loss, by the names they are logged under, fetched at once."""
    named = {"gradient_norm": result.gradient_norm, **{f"loss/{name}": part for name, part in result.parts.items()}}
    return dict(zip(named, torch.stack([value.float() for value in named.values()]).tolist(), strict=True))
