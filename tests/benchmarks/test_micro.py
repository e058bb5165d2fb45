"""The micro benchmarks cover every public module, and compare it with the same values."""

import pytest
from torch import nn

import fused_margin as fm
from benchmarks.micro.cases import CASES, require_agreement
from fused_margin.benchmark.problems import Shape


def test_every_public_module_has_a_case():
    public = {name: getattr(fm, name) for name in fm.__all__}
    modules = {name for name, value in public.items() if isinstance(value, type) and issubclass(value, nn.Module)}
    assert modules == set(CASES) and all(case.loss is public[name] for name, case in CASES.items())


@pytest.mark.parametrize("name", CASES)
def test_naive_form_is_right(name):
    require_agreement(name, Shape(8, 64, 40), "cpu")
