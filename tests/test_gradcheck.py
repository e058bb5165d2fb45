"""Analytic gradients against finite differences in float64, for every loss and option."""

import pytest
import torch
from loss_inputs import problem
from test_margin_cross_entropy import MARGINS
from torch.autograd import gradcheck

import fused_margin as fm
from fused_margin.functional import cosine_logsumexp, exclusive_regularization, margin_cross_entropy

SIZE = (6, 9, 5)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny calls, which take less time than waking threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


EXACT = {name: margin for name, margin in MARGINS.items() if margin.get("gradient") != "straight_through"}


def inputs():
    x, w, y = problem(*SIZE, seed=3)
    return x.requires_grad_(), w.requires_grad_(), y


@pytest.mark.parametrize(
    ("scale", "workspace_mb"),
    [
        (8.0, 256),
        pytest.param(300.0, 256, marks=pytest.mark.slow),
        (None, 256),
        (8.0, 1e-6),
        pytest.param(300.0, 1e-6, marks=pytest.mark.slow),
        pytest.param(None, 1e-6, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", EXACT)
def test_margins(name, scale, workspace_mb):
    x, w, y = inputs()
    x = (x.detach() * 0.5).requires_grad_()
    margin = fm.Margin(**EXACT[name])
    assert gradcheck(lambda a, b: margin_cross_entropy(a, b, y, margin, scale, workspace_mb=workspace_mb), (x, w))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.2},
        {"class_weight": torch.rand(SIZE[1], dtype=torch.float64), "label_smoothing": 0.2},
        {"ignore_index": 1},
    ],
    ids=["plain", "smooth", "weighted", "ignored"],
)
def test_options(options, reduction):
    x, w, y = inputs()
    assert gradcheck(
        lambda a, b: margin_cross_entropy(a, b, y, fm.Margin(m2=0.5), 8.0, reduction=reduction, **options), (x, w)
    )


def test_all_options_with_learned_margins_and_scale():
    x, w, y = inputs()
    m2 = torch.rand(SIZE[0], dtype=torch.float64, requires_grad=True)
    m3 = torch.rand((), dtype=torch.float64, requires_grad=True)
    s = (torch.rand(SIZE[0], dtype=torch.float64) + 5).requires_grad_()

    def loss(a, b, c, d, e):
        return margin_cross_entropy(a, b, y, fm.Margin(1.1, c, d), e, exclusive_weight=0.5, label_smoothing=0.1)

    assert gradcheck(loss, (x, w, m2, m3, s))


def test_cosine_logsumexp_and_exclusive_term():
    x, w, y = inputs()
    s = (torch.rand(SIZE[0], dtype=torch.float64) + 5).requires_grad_()
    assert gradcheck(lambda a, b, c: cosine_logsumexp(a, b, y, c), (x, w, s))
    assert gradcheck(exclusive_regularization, (w,))
