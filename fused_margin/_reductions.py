"""Means over the samples that count."""

import math

import torch
from torch import Tensor


def mean_over(total: Tensor, count: Tensor) -> Tensor:
    """``total / count``. NaN where nothing counts, with a gradient of 0, as torch.nn.functional.cross_entropy has it."""
    empty = count == 0
    return torch.where(empty, math.nan, total / count.masked_fill(empty, 1))
