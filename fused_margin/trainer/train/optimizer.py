"""The optimizer with its parameter groups, and the learning-rate schedule."""

from __future__ import annotations

from torch import nn

import fused_margin as fm

from ..config import OptimizerConfig
from .criterion import Criterion


def make_optimizer(backbone: nn.Module, criterion: Criterion, options: OptimizerConfig) -> fm.optim.ProjectedSGD:
    """SGD that keeps class weights at unit norm. `initial_lr` of a group is its largest learning rate."""
    decayed = list(backbone.parameters())
    others: list[nn.Parameter] = []
    for parameter in criterion.plain_parameters():  # no weight decay for biases and radii
        (decayed if parameter.dim() > 1 else others).append(parameter)
    groups = [
        {"params": decayed, "lr": options.lr, "weight_decay": options.weight_decay, "project": False},
        {"params": criterion.projected_parameters(), "lr": options.class_lr},
        {"params": others, "lr": options.lr, "project": False},
    ]
    optimizer = fm.optim.ProjectedSGD(groups, lr=options.lr, momentum=options.momentum)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def learning_rate_factor(step: int, total_steps: int, options: OptimizerConfig) -> float:
    """Factor on the largest learning rate at a step: linear warmup, then polynomial decay or milestones."""
    warmup_steps = options.warmup * total_steps
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if options.schedule == "step":
        return options.gamma ** sum(step >= round(share * total_steps) for share in options.milestones)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 - min(1.0, progress)) ** options.decay_power
