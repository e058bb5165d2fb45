"""Pairs of a drop-in loss and pytorch-metric-learning's own with equal weights, and their comparison."""

import inspect

import pytest
import torch
from loss_inputs import leaf, problem, relative_error

pytest.importorskip("pytorch_metric_learning", "2.9")  # older versions ignore the options of SubCenterArcFaceLoss
from pytorch_metric_learning import losses

from fused_margin.compat import pytorch_metric_learning as compat

CLASSES, SIZE, SAMPLES = 90, 12, 37
LOSSES = [name for name in compat.__all__ if name.endswith("Loss")]
MARGIN_LOSSES = [name for name in LOSSES if name != "NormalizedSoftmaxLoss"]


def batch():
    x, _, y = problem(SAMPLES, CLASSES, SIZE, spread=1.0)
    return x, y


def pair(name, *, dtype=torch.float64, **options):
    """Our loss and theirs with equal weights; options that are functions are called for each loss."""
    both = []
    for module in (compat, losses):
        arguments = {key: value() if inspect.isfunction(value) else value for key, value in options.items()}
        both.append(getattr(module, name)(num_classes=CLASSES, embedding_size=SIZE, **arguments).to(dtype))
    both[1].load_state_dict(both[0].state_dict())
    return both


def outcome(loss_fn, x, y, *args):
    """Loss, gradient of the embeddings, gradient of W."""
    a = leaf(x)
    loss_fn.W.grad = None
    loss = loss_fn(a, y, *args)
    loss.backward()
    return loss.detach(), a.grad, loss_fn.W.grad


def assert_same(ours, theirs, x, y, *args, tolerance=1e-10):
    for measured, expected in zip(outcome(ours, x, y, *args), outcome(theirs, x, y, *args), strict=True):
        assert relative_error(measured, expected) < tolerance
