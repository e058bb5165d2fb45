"""The losses that the benchmark times: of this library, in plain PyTorch, and of pytorch-metric-learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fused_margin as fm

from .contestants import Loss
from .problems import COSINE_MARGIN, MARGIN, SCALE

WORKSPACE_MB = 256
LossName = Literal["arcface", "cosface", "normface"]
Margin = Callable[[Tensor], Tensor]  # target logits, (N,), to those with the margin


def _angular(logits: Tensor) -> Tensor:
    return SCALE * torch.cos(torch.acos((logits / SCALE).clamp(-1, 1)) + MARGIN)


def _additive(logits: Tensor) -> Tensor:
    return logits - SCALE * COSINE_MARGIN


def _logits(embeddings: Tensor, weight: Tensor) -> Tensor:
    """The scale is applied to (N, D) numbers instead of (N, C)."""
    return F.linear(F.normalize(embeddings) * SCALE, F.normalize(weight))


def _writing(margin: Margin) -> Loss:
    """The loss as a careful user writes it: the margin is applied to N numbers, in place."""

    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = _logits(embeddings, weight)
        target = torch.arange(len(labels), device=labels.device), labels
        return F.cross_entropy(logits.index_put_(target, margin(logits[target]).to(logits.dtype)), labels)

    return loss


def _selecting(margin: Margin) -> Loss:
    """The same with torch.where instead of a write, which a compiler can fuse into its loops."""

    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = _logits(embeddings, weight)
        target = margin(logits[torch.arange(len(labels), device=labels.device), labels])
        is_target = torch.arange(len(weight), device=weight.device) == labels[:, None]
        return F.cross_entropy(torch.where(is_target, target[:, None], logits), labels)

    return loss


def lean_normface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_logits(embeddings, weight), labels)


lean_arcface, selecting_arcface = _writing(_angular), _selecting(_angular)


@dataclass(frozen=True)
class Objective:
    """One loss in all implementations."""

    title: str
    loss_class: type[fm.MarginLoss]
    arguments: Mapping[str, Any]  # of loss_class
    forms: Mapping[str, Loss]  # in plain PyTorch; the first runs without torch.compile
    peer: tuple[str, Mapping[str, float]]  # class of pytorch-metric-learning, and its arguments

    def make_peer(self, num_classes: int, embedding_size: int) -> nn.Module:
        from pytorch_metric_learning import losses

        name, arguments = self.peer
        return getattr(losses, name)(num_classes=num_classes, embedding_size=embedding_size, **arguments)


OBJECTIVES: dict[LossName, Objective] = {
    "arcface": Objective(
        "ArcFace",
        fm.ArcFaceLoss,
        {"margin": MARGIN},
        {"write": lean_arcface, "select": selecting_arcface},
        ("ArcFaceLoss", {"margin": math.degrees(MARGIN), "scale": SCALE}),
    ),
    "cosface": Objective(
        "CosFace",
        fm.CosFaceLoss,
        {"margin": COSINE_MARGIN},
        {"write": _writing(_additive), "select": _selecting(_additive)},
        ("CosFaceLoss", {"margin": COSINE_MARGIN, "scale": SCALE}),
    ),
    "normface": Objective(
        "NormFace",
        fm.NormFaceLoss,
        {},
        {"no margin": lean_normface},
        ("NormalizedSoftmaxLoss", {"temperature": 1 / SCALE}),
    ),
}


def has_peer() -> bool:
    """Whether pytorch-metric-learning is installed."""
    return find_spec("pytorch_metric_learning") is not None
