"""The kernels suite of the benchmarks on emulated kernels: it accepts correct results and detects wrong ones."""

import pytest
import torch

from benchmarks.kernels import comparisons, half, names, steps
from fused_margin._ops.backends import select
from fused_margin._ops.backends.select import Kernels
from fused_margin.benchmark.problems import Shape, make_inputs

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host

SHAPE = Shape(130, 40, 403)


@pytest.fixture
def measured(emulated, monkeypatch):
    monkeypatch.setattr(steps, "kernels", lambda *_: Kernels(emulated.cuda, 0))
    monkeypatch.setattr(steps, "EXACT_ROWS", 100)
    by_suite = {each.suite: each for each in comparisons.comparisons(("sm90", "sm80")) if each.suite in names.KERNELS}
    inputs = make_inputs(SHAPE, "cpu", batches=2)
    return {
        (suite, contestant.name): (contestant, variant(inputs))
        for suite, comparison in by_suite.items()
        for contestant in comparison.contestants
        if contestant.name in map(names.ours, ("sm90", "sm80"))
        for variant in contestant.variants.values()
    }


class Idle:
    """A family that launches and writes nothing."""

    def __getattr__(self, name):
        return lambda **_: None


def test_correct_results_are_within_tolerance_and_wrong_ones_are_not(measured):
    assert len(measured) == 2 * len(names.KERNELS)
    for (suite, name), (contestant, step) in measured.items():
        for turn in range(3):  # results of earlier rounds are not used
            step(turn)
        assert max(step.errors().values()) <= contestant.tolerance, (suite, name)
        if suite != names.NEAREST:  # a wrong label is excluded
            rows = step.rows[0]
            step.rows[0] = step.rows[1]
            assert not max(step.errors().values()) <= contestant.tolerance, (suite, name)
            step.rows[0] = rows
        step.family = Idle()
        assert not max(step.errors().values()) <= contestant.tolerance, (suite, name)


def test_forward_call_is_the_public_loss_without_gradients(emulated, monkeypatch):
    monkeypatch.setattr(select, "kernels", lambda *_: Kernels(emulated.cuda, 0))
    inputs = make_inputs(SHAPE, "cpu", batches=2)
    comparison = next(c for c in comparisons.comparisons(("sm90", "sm80")) if c.suite == names.EXPONENT_SUM)
    calls = {each.name: each for each in comparison.contestants if each.name.endswith(names.CALL)}
    assert list(calls) == [names.ours(backend, names.CALL) for backend in ("sm90", "sm80", select.PORTABLE)]
    with half.precision("highest"):  # the call itself requests half operands
        for backend in ("sm90", "sm80"):
            contestant = calls[names.ours(backend, names.CALL)]
            (build,) = contestant.variants.values()
            step = build(inputs)
            errors, losses = step.errors(), [step(turn) for turn in range(3)]
            assert 1e-9 < errors["loss"] <= contestant.loss_tolerance
            assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])  # batches rotate
            assert not losses[0].requires_grad and inputs.weight.grad is None
            inner = step.loss
            step.loss = lambda *arguments, inner=inner: 1.001 * inner(*arguments)
            assert step.errors()["loss"] > contestant.loss_tolerance
