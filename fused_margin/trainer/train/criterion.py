"""The training criterion: the main loss, auxiliary losses, and the class weights, if the loss has any."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.losses.base import ClassificationLoss

from ..models import ModelConfig
from .auxiliary import AuxiliaryLosses
from .named_losses import LOSSES, LossConfig, make_loss, make_small_loss


class Criterion(nn.Module):
    """Embeddings (N, D) and labels (N,) to the loss. It has the class weights, if the loss has any.

    If the `model` has groups, their logits (N, groups) add GroupFace's self-grouping loss.

    Attributes:
        last_parts: the main loss and the auxiliary losses of the last call, by name, detached.
    """

    def __init__(
        self,
        config: LossConfig,
        num_classes: int,
        embedding_size: int,
        process_group: dist.ProcessGroup | None = None,
        *,
        model: ModelConfig | None = None,
    ) -> None:
        super().__init__()
        self.name, self.projected = config.name, LOSSES[config.name].projected
        overrides = {} if process_group is None else {"process_group": process_group}
        self.loss_fn = make_loss(config, num_classes, embedding_size, **overrides)
        workspace_mb = config.options.get("workspace_mb", 256)
        self.companions = AuxiliaryLosses(config.companions, num_classes, embedding_size, workspace_mb, process_group)
        self.group_loss: fm.SelfGroupingLoss | None = None
        if model is not None and model.groups:
            self.group_weight = model.group_weight
            self.group_loss = fm.SelfGroupingLoss(
                model.groups, batches=model.group_batches, process_group=process_group
            )
        self.last_parts: dict[str, Tensor] = {}
        for weight in self.projected_parameters():
            fm.optim.project_(weight)
        if config.weight_dtype != "float32":  # last, so that the same weights are drawn, and are rounded once
            assert isinstance(self.loss_fn, ClassificationLoss)
            self.loss_fn.weight = nn.Parameter(self.loss_fn.weight.detach().to(getattr(torch, config.weight_dtype)))

    def forward(self, embeddings: Tensor, labels: Tensor, group_logits: Tensor | None = None) -> Tensor:
        parts = {self.name: self.loss_fn(embeddings, labels)}
        if self.companions.weights:
            weight = None
            if isinstance(self.loss_fn, ClassificationLoss):
                weight = class_directions(self.loss_fn.weight, self.loss_fn.sub_centers)
            parts |= self.companions(embeddings, weight, labels)
        if self.group_loss is not None:
            parts["groups"] = self.group_weight * self.group_loss(group_logits)
        self.last_parts = {name: part.detach() for name, part in parts.items()}
        return functools.reduce(torch.add, parts.values())

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names in `last_parts`."""
        return self.name, *self.companions.weights, *(["groups"] if self.group_loss is not None else [])

    def projected_parameters(self) -> list[nn.Parameter]:
        """Class weights whose rows are kept at unit norm."""
        return [self.class_parameters()["weight"]] if self.projected else []

    def class_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters with rows of classes, by their names in `loss_fn`."""
        return self.loss_fn.class_parameters() if isinstance(self.loss_fn, ClassificationLoss) else {}

    def plain_parameters(self) -> list[nn.Parameter]:
        """All other parameters: class weights with a norm, biases, learned scales, radii and weights of features."""
        projected = {id(weight) for weight in self.projected_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in projected]

    @property
    def class_weight(self) -> Tensor | None:
        """Class weights (C, D) in float32, detached; with sub-centers as `class_directions`. None: there are none."""
        if not isinstance(self.loss_fn, ClassificationLoss):
            return None
        return class_directions(self.loss_fn.weight.detach().float(), self.loss_fn.sub_centers)


def class_directions(weight: Tensor, sub_centers: int) -> Tensor:
    """Weights (C * sub_centers, D) to one row per class (C, D): the normalized mean of its normalized sub-centers."""
    if sub_centers == 1:
        return weight
    return F.normalize(F.normalize(weight, dim=1).unflatten(0, (-1, sub_centers)).mean(1), dim=1)


def stored_distance(config: LossConfig, criterion_state: Mapping[str, Tensor]) -> fm.SiameseL1Loss | None:
    """The siamese loss of a `Criterion`, from its state dict; the main loss, if it has two. None: it has none."""
    options: Mapping[str, Any] = {}
    if config.name == "siamese-l1":
        prefix, options = "loss_fn.", config.options
    elif config.companions.siamese:
        prefix = "companions.losses.siamese."
    else:
        return None
    state = {name: criterion_state[prefix + name] for name in ("alpha", "bias")}
    loss_fn = fm.SiameseL1Loss(len(state["alpha"]), **options)
    loss_fn.load_state_dict(state)
    return loss_fn


def stored_class_weight(config: LossConfig, criterion_state: Mapping[str, Tensor]) -> Tensor | None:
    """Class weights (C, D) in float32, from the state dict of a `Criterion`. None: the loss has none."""
    loss_fn = make_small_loss(config)
    if not isinstance(loss_fn, ClassificationLoss):
        return None
    return class_directions(criterion_state["loss_fn.weight"].float(), loss_fn.sub_centers)
