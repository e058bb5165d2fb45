"""Types of the keyword arguments that losses have in common, for type checkers."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor


class SharedOptions(TypedDict, total=False):
    """Keyword arguments of every loss with class weights, except sub_centers; :class:`MarginLoss` describes them."""

    process_group: dist.ProcessGroup | None
    sample_rate: float
    sparse: bool
    exclusive_weight: float
    exclusive_refresh: str | int
    class_weight: Tensor | None
    reduction: str
    ignore_index: int
    label_smoothing: float
    workspace_mb: float
    device: torch.device | str | None
    dtype: torch.dtype | None


class PsiOptions(TypedDict, total=False):
    """Keyword arguments of :class:`fused_margin.Margin` that are no numbers."""

    beyond_pi: str
    easy: bool
    gradient: str


class ClassificationOptions(SharedOptions, total=False):
    """Keyword arguments of every loss with class weights; :class:`MarginLoss` describes them."""

    sub_centers: int


class MarginOptions(ClassificationOptions, PsiOptions, total=False):
    """Keyword arguments of the margin losses; :class:`MarginLoss` describes them."""


class SubCenterOptions(SharedOptions, PsiOptions, total=False):
    """Keyword arguments of :class:`SubCenterArcFaceLoss`, which names sub_centers itself."""
