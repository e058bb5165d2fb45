"""Gradients of fused_margin in edge cases: cos = ±1, zero rows, and scaled cosines up to 500."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fused_margin as fm
from fused_margin.benchmark.problems import SCALE, Answer, Shape, make_inputs, relative_error, truth

SHAPE = Shape(64, 128, 1000)
MARGINS = {
    "NormFace": fm.Margin(),
    "CosFace": fm.Margin(m3=0.35),
    "ArcFace": fm.Margin(m2=0.5),
    "SphereFace": fm.Margin(m1=4.0),
    "combined": fm.Margin(m1=1.0, m2=0.3, m3=0.2),
}


@dataclass(frozen=True)
class Check:
    """A measured value and its upper bound. NaN fails."""

    case: str
    measured: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.bound


def _answer(embeddings: Tensor, weight: Tensor, labels: Tensor, margin: fm.Margin, scale: float) -> Answer:
    x, w = (leaf.detach().clone().requires_grad_() for leaf in (embeddings, weight))
    loss = fm.functional.margin_cross_entropy(x, w, labels, margin, scale)
    loss.backward()
    return Answer(loss.detach(), x.grad, w.grad)


def _gradient_error(answer: Answer, exact: Answer) -> float:
    errors = (
        relative_error(answer.embeddings, exact.embeddings),
        relative_error(answer.weight, exact.weight),
    )
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _length_over_bound(answer: Answer, embeddings: Tensor, weight: Tensor, m1: float) -> float:
    """The largest norm of a gradient row, divided by its upper bound.

    |dψ/dθ| ≤ m1, and the gradient of a cosine has norm sin θ / ‖x‖, so a row of dX has norm at most
    (m1 + 1)·s / (N·‖x‖), and a row of dW at most m1·s / ‖w‖. At cos = ±1 with m2 > 0 the direction of the gradient is
    undefined, so only the norm is checked.
    """
    rows = (answer.embeddings.norm(dim=1) * embeddings.norm(dim=1)).max()
    classes = (answer.weight.norm(dim=1) * weight.norm(dim=1)).max()
    return float(torch.stack((rows * len(embeddings) / (m1 + 1), classes / m1)).max() / SCALE)


def check_edges(device: str) -> list[Check]:
    inputs = make_inputs(SHAPE, device, batches=1)
    weight = inputs.weight.detach()
    labels = inputs.labels[0]
    noise = inputs.embeddings[0].detach()
    sign = torch.ones(SHAPE.rows, 1, device=device)
    sign[1::2] = -1
    checks = []

    on_the_axis = 100 * sign * weight[labels]
    for name, margin in MARGINS.items():
        answer = _answer(on_the_axis, weight, labels, margin, SCALE)
        length = _length_over_bound(answer, on_the_axis, weight, margin.m1)
        checks.append(Check(f"cos = ±1, {name}: gradient length / its bound", length, 1.0))
        if name == "NormFace":
            error = _gradient_error(answer, truth("normface", on_the_axis, weight, labels))
            checks.append(Check("cos = ±1, NormFace: gradient error", error, 1e-5))

    with_zeros, weight_with_zeros = noise.clone(), weight.clone()
    with_zeros[:3] = 0
    weight_with_zeros[labels[2:5]] = 0
    answer = _answer(with_zeros, weight_with_zeros, labels, MARGINS["ArcFace"], SCALE)
    exact = truth("arcface", with_zeros, weight_with_zeros, labels)
    # F.normalize divides zero rows by its eps and returns 1e12 times the upstream gradient.
    exact.embeddings[:3] = 0
    exact.weight[labels[2:5]] = 0
    largest = torch.cat((answer.embeddings[:3], answer.weight[labels[2:5]])).abs().max()
    checks.append(Check("zero rows, ArcFace: their gradient", float(largest), 0.0))
    error = _gradient_error(answer, exact)
    checks.append(Check("zero rows, ArcFace: gradient error of the others", error, 1e-5))

    # A third of the rows are near their own class, a third near a wrong one, and a third between. The fp32 spacing of
    # cosines near 1 is 6e-8; multiplied by 500 it changes an exponential by 3e-5.
    scale = 500.0
    own, wrong = weight[labels], weight[(labels + 1) % SHAPE.classes]
    share = (torch.arange(SHAPE.rows, device=device) % 3 / 2)[:, None]
    near = torch.lerp(own, wrong, share) + 1e-3 * noise
    for name, objective in (("NormFace", "normface"), ("ArcFace", "arcface")):
        answer = _answer(near, weight, labels, MARGINS[name], scale)
        error = _gradient_error(answer, truth(objective, near, weight, labels, scale))
        checks.append(Check(f"s·cos up to 500, {name}: gradient error", error, 1e-4))
    return checks
