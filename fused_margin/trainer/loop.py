"""The training loop: what a step is, and what has to be saved to go on after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fused_margin as fm

from .checkpoint import CheckpointError
from .config import OptimizerConfig, TrainConfig
from .data.augment import augment
from .data.base import DataError, Splits, TrainingBatches, data_loader, seeded_generator, to_input
from .interrupts import Interrupted, watch_for_stop
from .model import ResNet20
from .progress import TrainingProgress

AUGMENT_STREAM = 1  # keeps the augmentation's random numbers apart from the order's
RECENT_STEPS = 20  # the shown loss is their mean


class Recognizer(nn.Module):
    """Backbone and class weights as one module: images (N, C, H, W) and labels (N,) to the loss."""

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__()
        self.backbone = ResNet20(config.model)
        self.loss_fn = fm.ArcFaceLoss(
            num_classes,
            config.model.embedding_size,
            margin=config.loss.margin,
            scale=config.loss.scale,
            exclusive_weight=config.loss.exclusive_weight,
        )
        fm.optim.project_(self.loss_fn.weight)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return self.loss_fn(self.backbone(images), labels)


class Trainer:
    """Owns everything that changes from step to step."""

    def __init__(self, config: TrainConfig, splits: Splits) -> None:
        self.config, self.splits = config, splits
        accelerator, has_gpu = config.accelerator, fm.build_info()["cuda"]["available"]
        if accelerator == "auto":
            accelerator = "cuda" if has_gpu else "cpu"
        elif accelerator == "cuda" and not has_gpu:
            raise DataError("--accelerator cuda: there is no GPU, or the kernels are not built for it")
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=config.precision)
        torch.manual_seed(config.seed)
        model = Recognizer(config, splits.train.num_classes)
        # Channels last is the layout that CPU and GPU convolutions are fastest in.
        model.backbone.to(memory_format=torch.channels_last)
        self.num_parameters = sum(p.numel() for p in model.backbone.parameters())

        options = config.optimizer
        backbone = {
            "params": list(model.backbone.parameters()),
            "lr": options.lr,
            "weight_decay": options.weight_decay,
            "project": False,
        }
        class_weights = {"params": [model.loss_fn.weight], "lr": options.class_lr}
        optimizer = fm.optim.ProjectedSGD([backbone, class_weights], lr=options.lr, momentum=options.momentum)
        self.batches = TrainingBatches(len(splits.train), config.batch_size, config.epochs, config.seed)
        self.total_steps = len(self.batches)
        self.scheduler = LambdaLR(optimizer, lambda step: learning_rate_factor(step, self.total_steps, options))
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.step = 0
        self.seconds = 0.0  # of training, over all its runs
        self.losses: list[float] = []  # of every step; a step without a readable image has none
        self.unreadable: set[str] = set()

    @property
    def backbone(self) -> ResNet20:
        return self.model.backbone

    @property
    def class_weight(self) -> Tensor:
        return self.model.loss_fn.weight.detach()

    def fit(self, console: Console, save: Callable[[], None]) -> None:
        """Train from `self.step` to the end, calling `save` at checkpoints.

        Raises:
            Interrupted: SIGINT or SIGTERM came; `save` has been called.
            FloatingPointError: the loss is not finite.
        """
        config = self.config
        self.batches.start_step = self.step
        loader = data_loader(self.splits.train, self.batches, config.workers)
        pending: list[Tensor] = []  # losses still on the device: reading each would stall it

        def flush() -> None:
            if pending:
                losses = torch.stack(pending).tolist()
                self.losses += losses
                pending.clear()
                if not all(map(math.isfinite, losses)):
                    raise FloatingPointError(
                        f"the loss is not finite before step {self.step}; lower --optimizer.lr or --optimizer.class-lr"
                    )

        self.model.train()
        started = time.monotonic() - self.seconds
        progress = TrainingProgress(console, self.step, self.total_steps, config.epochs)
        with watch_for_stop() as stop, closing(progress):
            for batch in loader:
                self.unreadable.update(batch.unreadable)
                if len(batch.labels):
                    pending.append(self._train_step(batch.images, batch.labels))
                self.scheduler.step()
                self.step += 1
                self.seconds = time.monotonic() - started
                if progress.due(self.step, len(batch.labels)):
                    flush()
                    recent = self.losses[-RECENT_STEPS:]
                    mean = sum(recent) / len(recent) if recent else float("nan")
                    progress.show(self.step, mean, self.scheduler.get_last_lr()[0])
                if self.step == self.total_steps or self.step % config.checkpoint_every == 0:
                    flush()
                    save()
                if stop.made:
                    flush()
                    save()
                    raise Interrupted

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        device = self.fabric.device
        # A function of seed and step: a resumed run draws what an unbroken one would have drawn.
        generator = seeded_generator(self.config.seed, AUGMENT_STREAM, self.step, device=device)
        inputs = augment(to_input(images.to(device)), self.config.augmentation, generator)
        loss = self.model(inputs.contiguous(memory_format=torch.channels_last), labels.to(device))
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.fabric.clip_gradients(
            self.backbone,
            self.optimizer,
            max_norm=self.config.optimizer.clip_norm,
            error_if_nonfinite=False,  # the loss tells, without waiting for the device
        )
        self.optimizer.step()
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """Everything a later step depends on."""
        return {
            "config": self.config.to_dict(),
            "data": self.splits.fingerprint(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
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
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.losses = state["losses"].tolist()
        self.unreadable = set(state["unreadable"])


def learning_rate_factor(step: int, total_steps: int, options: OptimizerConfig) -> float:
    """Share of the largest learning rate at a step: linear warm-up, then polynomial decay."""
    warmup_steps = options.warmup * total_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 - min(1.0, progress)) ** options.decay_power
