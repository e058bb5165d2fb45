"""The state of a training, which a checkpoint saves and restores for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_margin as fm
from fused_margin.distributed import Shard
from fused_margin.losses.base import ClassificationLoss

from ..config import TrainConfig
from ..data.base import Splits, TrainingBatches, seeded_generator
from ..data.identity_batches import IdentityBatches
from ..models.build import build_backbone, channels_last, embedding_size
from .checkpoint import CheckpointError, StartingWeights, identities_before, save_checkpoint
from .criterion import Criterion
from .devices import Devices
from .optimizer import make_optimizer

MODEL_STREAM = 3  # of the random numbers of network and loss; 2 is the evaluation's stream
ROUNDING_STREAM = 4  # of the random bits that round class weights
# Of the names of the losses' tensors in the model's state dict.
LOSS_PREFIX, AUXILIARY_PREFIX = "criterion.loss_fn.", "criterion.companions."


class Recognizer(nn.Module):
    """The trained modules: backbone and criterion."""

    def __init__(self, backbone: nn.Module, criterion: Criterion) -> None:
        super().__init__()
        self.backbone, self.criterion = backbone, criterion


class TrainingState:
    """What a training has: the model, its optimizer, the order of the batches, and the progress."""

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
