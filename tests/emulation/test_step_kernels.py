"""The CUDA kernel that steps rows, executed by the host emulator, against float64 and the CPU kernel."""

import pytest
import step_cases
import torch
from step_cases import DTYPES, RULES, SIZES, Rows, assert_close, assert_nearly_same_bits, bf16, f32, f64, step

import fused_margin as fm
from fused_margin._ops.backends import select
from fused_margin._ops.backends.select import Kernels
from fused_margin._ops.row_update import NO_COMPLETION
from fused_margin.optim import ProjectedSGD, step_in_backward

pytestmark = pytest.mark.slow  # compiles the CUDA kernels for the host


@pytest.fixture
def run(emulated):
    return Kernels(emulated.cuda, 0)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_steps(run, rule, dtypes):
    step_cases.check_steps(run, rule, dtypes)


@pytest.mark.parametrize("dtypes", DTYPES)
def test_steps_of_momentum_alone(run, dtypes):
    step_cases.check_steps_of_momentum_alone(run, dtypes)


def test_rows_of_nan(run):
    step_cases.check_rows_of_nan(run)


@pytest.mark.parametrize("compute", [f32, f64], ids=str)
@pytest.mark.parametrize("rule", ["projected sgd", "momentum", "projected adam"])
def test_stochastic_rounding(run, rule, compute):
    step_cases.check_stochastic_rounding(run, rule, compute)


def test_stochastic_rounding_is_unbiased(run):
    step_cases.check_unbiased_rounding(run)


@pytest.mark.parametrize("rule", ["projected sgd", "momentum", "adamw"])
def test_bits_of_the_cpu_kernel(backends, rule):
    """Misaligned rows included, whose elements belong to other threads."""
    for size in SIZES:
        update = RULES[rule]._replace(stochastic=True)
        rows, gradient = Rows.of(update, 7, size, bf16), torch.randn(7, size)
        expected, measured = (step(run, rows, gradient, update) for run in backends)
        assert_nearly_same_bits(measured, expected)


def completion_terms(kind, classes, size, compute, begin, end):
    """Arguments that complete the gradient of rows [begin, end) of the class weights."""
    samples, labels = 6, torch.tensor([4, 2, 4, 0, 8, 4])
    terms = NO_COMPLETION | {"samples": samples, "class_begin": begin, "chunk": end - begin}
    if kind == "inner product":
        length = torch.randn(classes, dtype=f64)
        length[begin + 1] = 0
        return terms | {"length_gradient": length}
    terms |= {"inner_product": False, "inverse_norm": torch.rand(classes, dtype=compute) / size**0.5}
    if kind == "nearest":  # reads other rows, so that only the momentum can be stepped
        nearest = torch.tensor([4, 4, 0, 4, 2, 3, 8, 2, 1])
        order = torch.sort(nearest, stable=True)
        return terms | {
            "nearest": nearest, "sorted_nearest": order.values, "nearest_order": order.indices,
            "nearest_gradient": torch.randn(classes, dtype=compute),
        }  # fmt: skip
    order = torch.sort(labels, stable=True)
    return terms | {
        "dense_scale": torch.tensor(0.7, dtype=f64), "normalized_embeddings": torch.randn(samples, size, dtype=compute),
        "sorted_labels": order.values, "label_order": order.indices, "target_gradient": torch.randn(samples, dtype=f64),
        "uniform_direction": torch.randn(size, dtype=compute), "class_weight": torch.rand(classes, dtype=f64),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["samples", "inner product", "nearest"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_completed_gradients(backends, dtypes, kind):
    """The rows from 2 on, of all classes and of drawn ones, with a term that is added."""
    compute, stored = DTYPES[dtypes]
    update, classes, begin, end = RULES["projected momentum"], 9, 2, 9
    for size in (5, 512, 1030, 1036):
        rows, gradient = Rows.of(update, 12, size, stored), torch.randn(end - begin, size, dtype=compute)
        terms = completion_terms(kind, classes, size, compute, begin, end)
        drawn = torch.tensor([0, 1, 2, 3, 5, 6, 9, 10, 11])
        for selected in (None, drawn):
            if selected is not None:
                terms["weight"] = torch.randn(classes, size, dtype=f64).to(stored)
            into_momentum = kind == "nearest"
            added = None if into_momentum else torch.randn(classes, size, dtype=compute)
            expected, measured = (
                step(
                    run, rows, gradient, update, selected=None if into_momentum else selected, added=added,
                    into_momentum=into_momentum, completion=terms | {"classes": classes},
                )
                for run in backends
            )  # fmt: skip
            assert_close_to_cpu(measured, expected, compute)


def assert_close_to_cpu(measured, expected, compute):
    if measured.weight.dtype == bf16:
        assert_nearly_same_bits(measured, expected)
    else:
        assert_close(measured, expected, compute)


@pytest.mark.parametrize("optimizer", [ProjectedSGD, torch.optim.AdamW])
def test_steps_in_the_backward_of_a_loss(emulated, monkeypatch, optimizer):
    """In several chunks, with every term of the gradient, against the ordinary way on the CPU."""

    def train(in_backward):
        torch.manual_seed(0)
        loss_fn = fm.ArcFaceLoss(
            301, 45, scale=16.0, exclusive_weight=0.5, label_smoothing=0.1, workspace_mb=0.05, dtype=f64
        )
        parameters = optimizer([loss_fn.weight], lr=0.01)
        if in_backward:
            step_in_backward(loss_fn, parameters)
        for _ in range(3):
            loss_fn(torch.randn(9, 45, dtype=f64), torch.randint(301, (9,))).backward()
            parameters.step()
            parameters.zero_grad()
        return loss_fn.weight.detach()

    expected = train(False)
    monkeypatch.setattr(select, "kernels", lambda *_: Kernels(emulated.cuda, 0))
    torch.testing.assert_close(train(True), expected, rtol=0, atol=1e-9)
