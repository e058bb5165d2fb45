"""The module names of version 0.1 still import, and its pickles of whole losses load."""

import importlib
import pickle

import pytest
import torch

import fused_margin as fm
from fused_margin.distributed import Shard

NAMES = {
    "adaptive": "AdaFaceLoss",
    "companions": "CenterLoss",
    "exclusive": "ExclusiveRegularizer",
    "linear": "SoftmaxLoss",
    "losses": "ArcFaceLoss",
    "margins": "Margin",
    "sharding": "Shard",
}


@pytest.mark.parametrize("module", NAMES)
def test_modules_of_the_first_version_import(module):
    assert hasattr(importlib.import_module(f"fused_margin.{module}"), NAMES[module])


def test_pickle_of_the_first_version_loads():
    now = pickle.dumps(fm.SoftmaxLoss(10, 4), protocol=0)
    before = now.replace(b"cfused_margin.losses.softmax\n", b"cfused_margin.linear\n")
    assert before != now and type(pickle.loads(before)) is fm.SoftmaxLoss


@pytest.mark.parametrize("module", [fm.ArcFaceLoss, fm.SoftmaxLoss, fm.AdaFaceLoss])
def test_pickle_of_the_first_version_with_drawn_classes(module):
    """Version 0.1 stored a shard without a group in losses that draw classes."""
    loss_fn = module(10, 4, sample_rate=0.5)
    shard = object.__new__(Shard)
    shard.__dict__.update(num_classes=10, group=None, sample_rate=0.5)
    loss_fn.__dict__["shard"] = shard
    loaded = pickle.loads(pickle.dumps(loss_fn))
    assert loaded.shard is None and loaded.sample_rate == 0.5
    assert loaded(torch.randn(3, 4), torch.arange(3)).isfinite()
