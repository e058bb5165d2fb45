"""The CPU kernel that steps rows, with every instruction set of this machine."""

import pytest
import step_cases
import torch
from step_cases import DTYPES, RULES
from test_cpu_kernels import AVAILABLE

from fused_margin import _C
from fused_margin._ops.backends.select import Kernels


@pytest.fixture(params=AVAILABLE, ids=lambda capability: capability.name)
def run(request):
    before = _C.cpu.capability()
    _C.cpu.use(request.param)
    yield Kernels(_C.cpu, 0)
    _C.cpu.use(before)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_steps(run, rule, dtypes):
    step_cases.check_steps(run, rule, dtypes)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_steps_of_momentum_alone(run, dtypes):
    step_cases.check_steps_of_momentum_alone(run, dtypes)


def test_rows_of_nan(run):
    step_cases.check_rows_of_nan(run)


def test_known_answers_of_the_generator():
    step_cases.check_philox_itself()


@pytest.mark.parametrize("compute", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", ["projected sgd", "momentum", "projected adam"])
def test_stochastic_rounding(run, rule, compute):
    step_cases.check_stochastic_rounding(run, rule, compute)


def test_stochastic_rounding_is_unbiased(run):
    step_cases.check_unbiased_rounding(run)
