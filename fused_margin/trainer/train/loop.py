"""The training loop: the training step, and the state that a checkpoint saves."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_margin as fm
from fused_margin.distributed import Shard
from fused_margin.evaluation.errors import DataError
from fused_margin.losses.base import ClassificationLoss

from ..config import TrainConfig
from ..data.augment import augment
from ..data.base import Splits, TrainingBatches, data_loader, seeded_generator, to_input
from ..data.identity_batches import IdentityBatches, split_between_identities
from ..models.build import build_backbone, channels_last, embedding_size
from .checkpoint import CheckpointError, StartingWeights, identities_before, save_checkpoint
from .criterion import Criterion
from .devices import Devices
from .interrupts import Interrupted, watch_for_stop
from .optimizer import learning_rate_factor, make_optimizer
from .progress import TrainingProgress

AUGMENT_STREAM = 1  # of the augmentation's random numbers
MODEL_STREAM = 3  # of the random numbers of network and loss; 2 is the evaluation's stream
ROUNDING_STREAM = 4  # of the random bits that round class weights
RECENT_STEPS = 20  # number of steps that the shown loss is averaged over
STOP_EVERY = 5  # steps between checks of several processes for a stop request
# Of the names of the losses' tensors in the model's state dict.
LOSS_PREFIX, AUXILIARY_PREFIX = "criterion.loss_fn.", "criterion.companions."


class Recognizer(nn.Module):
    """The trained modules: backbone and criterion."""

    def __init__(self, backbone: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.backbone, self.criterion = backbone, criterion


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


class Trainer:
    """The state of a training, and its steps."""

    def __init__(
        self,
        config: TrainConfig,
        splits: Splits,
        devices: Devices | None = None,
        weights: StartingWeights | None = None,
    ) -> None:
        """`weights`: initial weights of the backbone; random by default."""
        self.config, self.splits = config, splits
        self.devices = devices or Devices(config)
        num_classes = splits.train.num_classes
        torch.manual_seed(config.seed)
        backbone = build_backbone(config)
        if weights is not None:
            backbone.load_state_dict(weights.backbone)
        # Names of the identities that the initial weights were trained on; None: unknown.
        self.identities_before: list[str] | None = [] if weights is None else weights.identities
        if self.devices.rank:  # all ranks have the same backbone, but different classes
            torch.manual_seed(self._seed(MODEL_STREAM))
        criterion = Criterion(
            config.loss,
            num_classes,
            embedding_size(backbone, config.model),
            self.devices.group,
            model=config.model,
        )
        criterion.companions.count_images(splits.train.labels)
        self.model = Recognizer(channels_last(backbone), criterion).to(self.devices.device)
        self.num_parameters = sum(p.numel() for p in backbone.parameters())
        part = self.devices.rank, self.devices.world_size
        self.batches: TrainingBatches
        if config.images_per_identity:
            self.batches = IdentityBatches(
                splits.train.labels,
                config.images_per_identity,
                config.batch_size,
                config.epochs,
                config.seed,
                part=part,
            )
        else:
            self.batches = TrainingBatches(len(splits.train), config.batch_size, config.epochs, config.seed, part=part)
        self.total_steps = len(self.batches)
        self._wrapped_backbone = self.fabric.setup_module(backbone)
        optimizer = self.fabric.setup_optimizers(make_optimizer(backbone, criterion, config.optimizer))
        assert not isinstance(optimizer, tuple)  # as for several optimizers
        self.optimizer = optimizer
        if config.steps_in_backward:
            assert isinstance(criterion.loss_fn, ClassificationLoss)
            fm.optim.step_in_backward(
                criterion.loss_fn,
                optimizer.optimizer,
                stochastic_rounding=config.optimizer.stochastic_rounding,
                # The same in all processes, because the bits also depend on the class.
                seed=seeded_generator(config.seed, ROUNDING_STREAM).initial_seed(),
            )
        self.shard = Shard(num_classes, self.devices.group)
        self.average: AveragedModel | None = None
        if decay := config.optimizer.ema:
            self.average = AveragedModel(self.backbone, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.step = 0
        self.seconds = 0.0  # of training, including resumed runs
        self.losses: list[float] = []  # of every step with a readable image
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
        """The backbone, or its moving average if there is one."""
        return self.backbone if self.average is None else self.average.module

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

    def _seed(self, *stream: int) -> int:
        """Seed of a stream of random numbers, different for each process."""
        own = (self.devices.rank,) if self.devices.rank else ()
        return seeded_generator(self.config.seed, *stream, *own).initial_seed()

    @property
    def class_weight(self) -> Tensor | None:
        """Class weights (C, D) of all processes on rank 0, (0, D) on others; on the CPU. All ranks must call it.

        None: the loss has none.
        """
        own = self.criterion.class_weight
        if own is None:
            return None
        gathered = self.shard.gather_to_first(own)
        return own[:0].cpu() if gathered is None else gathered

    def state_dict(self) -> dict[str, Any] | None:
        """The state that later steps depend on, on rank 0; None on other ranks. All ranks must call it.

        The state does not depend on the number of processes.
        """
        model: dict[str, Any] = self.model.state_dict()
        optimizer: dict[str, Any] = self.optimizer.state_dict()
        unreadable = self.devices.union(self.unreadable)
        optimizer["state"] = dict(optimizer["state"])
        for name, number in self._sharded_parameters().items():
            model[name] = self.shard.gather_to_first(model[name])
            if own := optimizer["state"].get(number):
                optimizer["state"][number] = _map_rows(self.shard.gather_to_first, own)
        for name in self._sharded_buffers():
            model[name] = self.shard.gather_to_first(model[name])
        if self.devices.rank:
            return None
        return {
            "config": self.config.to_dict(),
            "data": self.splits.fingerprint(),
            "step": self.step,
            "model": model,
            "optimizer": optimizer,
            "average": None if self.average is None else self.average.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),  # the loss scale, if there is one
            "seconds": self.seconds,
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "unreadable": sorted(unreadable),
            "identities": list(self.splits.train.identities),  # of the rows of the class weights
            "identities_before": self.identities_before,
        }

    def save(self, path: Path) -> None:
        """Write the state to a checkpoint, on rank 0. All ranks must call it."""
        state = self.state_dict()
        if state is not None:
            save_checkpoint(path, state)

    def _sharded_parameters(self) -> dict[str, int]:
        """Names of per-class parameters in the model's state dict, and their numbers in the optimizer's."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        numbers = {parameter: number for number, parameter in enumerate(parameters)}
        return {LOSS_PREFIX + name: numbers[p] for name, p in self.criterion.class_parameters().items()}

    def _sharded_buffers(self) -> list[str]:
        """Names of per-class buffers in the model's state dict."""
        return [AUXILIARY_PREFIX + name for name in self.criterion.companions.class_buffers()]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of `state_dict`.

        Raises:
            CheckpointError: the images have changed since the run was started, or the weights do not fit.
        """
        if state["data"] != self.splits.fingerprint():
            raise CheckpointError(
                f"the identities or images of {self.config.data!r} have changed since this run "
                "was started; start a new one"
            )
        model, optimizer = dict(state["model"]), {**state["optimizer"], "state": dict(state["optimizer"]["state"])}
        for name, number in self._sharded_parameters().items():
            model[name] = self.shard.local_part(model[name])
            if all_classes := optimizer["state"].get(number):
                optimizer["state"][number] = _map_rows(self.shard.local_part, all_classes)
        for name in self._sharded_buffers():
            model[name] = self.shard.local_part(model[name])
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


def _map_rows(function: Callable[[Tensor], Tensor | None], state: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's state of a parameter, with `function` of its tensors that have rows of classes.

    Others are the number of steps, which the backward counts in place and which is therefore copied, and None.
    """
    mapped = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            mapped[name] = function(value) if value.dim() else value.clone()
        else:
            mapped[name] = value
    return mapped


def _fetch(result: StepResult) -> dict[str, float]:
    """The values besides the loss by their logged names, copied from the device at once."""
    named = {"gradient_norm": result.gradient_norm, **{f"loss/{name}": part for name, part in result.parts.items()}}
    return dict(zip(named, torch.stack([value.float() for value in named.values()]).tolist(), strict=True))
