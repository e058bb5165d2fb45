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

from fused_margin.distributed import Shard

from .checkpoint import CheckpointError, StartingWeights, identities_before
from .config import TrainConfig
from .data.augment import augment
from .data.base import DataError, Splits, TrainingBatches, data_loader, seeded_generator, to_input
from .devices import Devices
from .interrupts import Interrupted, watch_for_stop
from .losses import Criterion
from .models import build_backbone, embedding_size
from .optimisation import learning_rate_factor, make_optimizer
from .progress import TrainingProgress

AUGMENT_STREAM = 1  # keeps the augmentation's random numbers apart from the order's
MODEL_STREAM = 3  # and those that the network and the loss draw; 2 is the evaluation's
RECENT_STEPS = 20  # the shown loss is their mean
STOP_EVERY = 5  # steps after which several processes ask each other whether to stop
LOSS = "criterion.loss_fn."  # before the loss's names in the model's state dict


class Recognizer(nn.Module):
    """What is trained: images (N, C, H, W) to embeddings (N, D), and these with labels (N,) to the loss."""

    def __init__(self, backbone: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.backbone, self.criterion = backbone, criterion


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

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        devices: Devices | None = None,
        weights: StartingWeights | None = None,
    ) -> None:
        """`weights`: what the backbone starts from, in place of random numbers."""
        self.config, self.splits = config, splits
        self.devices = devices or Devices(config)
        num_classes, world = splits.train.num_classes, self.devices.world
        torch.manual_seed(config.seed)
        backbone = build_backbone(config)
        if weights is not None:
            backbone.load_state_dict(weights.backbone)
        # Names of the identities that the starting weights were trained on; None: not known.
        self.identities_before = [] if weights is None else weights.identities
        if self.devices.rank:  # the same backbone everywhere, but other classes
            torch.manual_seed(self._seed(MODEL_STREAM))
        criterion = Criterion(config.loss, num_classes, embedding_size(backbone, config.model), self.devices.group)
        # Channels last is the layout that CPU and GPU convolutions are fastest in.
        backbone.to(memory_format=torch.channels_last)
        self.model = Recognizer(backbone, criterion).to(self.devices.device)
        self.num_parameters = sum(p.numel() for p in backbone.parameters())
        self.batches = TrainingBatches(
            len(splits.train), config.batch_size, config.epochs, config.seed, part=(self.devices.rank, world)
        )
        self.total_steps = len(self.batches)
        self._wrapped_backbone = self.fabric.setup_module(backbone)
        self.optimizer = self.fabric.setup_optimizers(make_optimizer(backbone, criterion, config.optimizer))
        self.shard = Shard(num_classes, self.devices.group)
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
    def criterion(self) -> Criterion:
        return self.model.criterion

    @property
    def fabric(self) -> Fabric:
        return self.devices.fabric

    @property
    def evaluated_backbone(self) -> nn.Module:
        """With the moving average of the weights, where there is one."""
        return self.backbone if self.average is None else self.average.module

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
            DataError: no image could be read.
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

        def save_what_is_trained() -> None:
            flush()
            if self.losses:  # before the first image that can be read there is nothing to keep
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
                    is_logged = self.step % config.log_every == 0 or self.step == self.total_steps
                    known = {"lr": lr, "images_per_second": speed.since_last()} if is_logged else None
                    pending.append(LoggedStep(self.step, result, known))
                # An epoch has tried every image.
                if self.step % self.batches.steps_per_epoch == 0 and not self.losses and not pending:
                    raise DataError(f"none of the {len(self.splits.train):,} images to train on could be read")
                if progress.due(self.step, len(batch.labels)):
                    flush()
                    recent = self.losses[-RECENT_STEPS:]
                    mean = sum(recent) / len(recent) if recent else float("nan")
                    progress.show(self.step, mean, lr)
                if self.step == self.total_steps or self.step % config.checkpoint_every == 0:
                    save_what_is_trained()
                # All processes stop after the same step. Asking the others waits for the device.
                asks = self.devices.world == 1 or self.step % STOP_EVERY == 0
                if asks and self.devices.any(stop.made):
                    save_what_is_trained()
                    raise Interrupted

    def _learning_rate_factor(self) -> float:
        return learning_rate_factor(self.step, self.total_steps, self.config.optimizer)

    def train_step(self, images: Tensor, labels: Tensor) -> StepResult | None:
        """One step on this process's part of the images, which may be none of them; None where nobody has any."""
        device = self.devices.device
        sizes = [len(piece) for piece in labels.tensor_split(self.config.accumulate)]
        counts = self.devices.sums(torch.tensor(sizes)).tolist()  # of each part, over all processes
        if not sum(counts):
            return None
        # Functions of seed and step: a resumed run draws what an unbroken one would have drawn.
        torch.manual_seed(self._seed(MODEL_STREAM, self.step))
        generator = torch.Generator(device).manual_seed(self._seed(AUGMENT_STREAM, self.step))
        inputs = augment(to_input(images.to(device)), self.config.augmentation, generator)
        inputs, labels = inputs.contiguous(memory_format=torch.channels_last), labels.to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self._learning_rate_factor()

        self.optimizer.zero_grad()
        total, parts = 0.0, {}
        pieces = inputs.tensor_split(self.config.accumulate), labels.tensor_split(self.config.accumulate)
        for some_inputs, some_labels, count in zip(*pieces, counts, strict=True):
            if not count:
                continue
            share = count / sum(counts)
            loss = self._loss(some_inputs, some_labels) * share
            self.fabric.backward(loss)
            total = total + loss.detach()
            for name, part in self.criterion.last_parts.items():
                parts[name] = parts.get(name, 0.0) + part * share
        # Fabric's own clipping takes all of an optimizer's parameters; projected class weights need none.
        self.fabric.strategy.precision.unscale_gradients(self.optimizer.optimizer)
        norm = nn.utils.clip_grad_norm_(self.backbone.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.backbone)
        return StepResult(total, norm, parts if len(parts) > 1 else {})

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of all processes' images."""
        embeddings = self._wrapped_backbone(images)
        if self.devices.world > 1:  # DDP divides by it
            embeddings.register_hook(lambda gradient: gradient * self.devices.world)
        return self.criterion(embeddings, labels)

    def _seed(self, *stream: int) -> int:
        """Of a stream of random numbers that is this process's own."""
        own = (self.devices.rank,) if self.devices.rank else ()
        return seeded_generator(self.config.seed, *stream, *own).initial_seed()

    @property
    def class_weight(self) -> Tensor | None:
        """(C, D) of all processes' classes, on the first one's CPU; None on the others. All must ask."""
        return self.shard.collect(self.criterion.class_weight)

    def state_dict(self) -> dict[str, Any] | None:
        """Everything a later step depends on, in the first process; None in the others, which take part.

        It does not depend on how many processes there are.
        """
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        unreadable = self.devices.union(self.unreadable)
        optimizer["state"] = dict(optimizer["state"])
        for name, number in self._divided().items():
            model[name] = self.shard.collect(model[name])
            if momentum := optimizer["state"].get(number):
                whole = {key: self.shard.collect(value) for key, value in momentum.items() if value is not None}
                optimizer["state"][number] = {**momentum, **whole}
        if self.devices.rank:
            return None
        return {
            "config": self.config.to_dict(),
            "data": self.splits.fingerprint(),
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "average": None if self.average is None else self.average.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss's scale, where there is one
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "unreadable": sorted(unreadable),
            "identities": list(self.splits.train.identities),  # of the rows of the class weights
            "identities_before": self.identities_before,
        }

    def _divided(self) -> dict[str, int]:
        """The classes' parameters in the model's state dict, and their numbers in the optimizer's."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        return {LOSS + name: numbers[p] for name, p in self.criterion.loss_fn.class_parameters().items()}

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
        model, optimizer = dict(state["model"]), {**state["optimizer"], "state": dict(state["optimizer"]["state"])}
        for name, number in self._divided().items():
            model[name] = self.shard.part_of(model[name])
            if momentum := optimizer["state"].get(number):
                own = {key: self.shard.part_of(value) for key, value in momentum.items() if value is not None}
                optimizer["state"][number] = {**momentum, **own}
        try:
            self.model.load_state_dict(model)
        except RuntimeError as error:
            raise CheckpointError(f"the weights in the checkpoint do not fit the network: {error}") from error
        self.optimizer.load_state_dict(optimizer)
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.losses = state["losses"].tolist()
        self.unreadable = set(state["unreadable"])
        self.identities_before = identities_before(state)


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
