"""Optimizers for class weights: projected gradient descent, and steps within the backward of a loss."""

from fused_margin.optim.in_backward import StepInBackward, step_in_backward
from fused_margin.optim.projected_sgd import ProjectedSGD, project_, start_momentum

__all__ = ["ProjectedSGD", "StepInBackward", "project_", "start_momentum", "step_in_backward"]
