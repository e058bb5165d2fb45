"""The module names of version 0.1 still import, and its pickles of whole losses load."""

import importlib
import pickle

import pytest

import fused_margin as fm

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
