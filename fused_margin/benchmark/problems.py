"""Problems that all contestants solve: inputs, and answers in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN = 0.5  # radians
COSINE_MARGIN = 0.35
SCALE = 64.0
MARGINS = {
    "arcface": lambda cosine: (cosine.acos() + MARGIN).cos(),
    "cosface": lambda cosine: cosine - COSINE_MARGIN,
}  # of the target's cosine; NormFace has none
BLOCK = 1 << 16  # rows converted to float64 at a time


@dataclass(frozen=True)
class Shape:
    """N embeddings of dimension D against C classes."""

    rows: int
    dim: int
    classes: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"a shape is NxDxC, such as 256x512x100000; got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.rows}x{self.dim}x{self.classes}"

    @property
    def label(self) -> str:
        return f"N={self.rows:,}, D={self.dim:,}, C={self.classes:,}"


@dataclass
class Inputs:
    """Several batches and one weight. Embeddings and weight are leaves that require gradients."""

    embeddings: list[Tensor]  # each [N, D]
    labels: list[Tensor]  # each [N]
    weight: Tensor  # [C, D]


@dataclass
class Answer:
    """A loss and its gradients; the exclusive term has none for embeddings."""

    loss: Tensor  # []
    embeddings: Tensor | None  # [N, D]
    weight: Tensor  # [C, D]


def make_inputs(shape: Shape, device: str, batches: int = 4, seed: int = 0) -> Inputs:
    """Embeddings from N(0, 1), weights from N(0, 0.01), labels uniform.

    Steps rotate through the batches, so that embeddings and target rows are not in the cache.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator, dtype=torch.float32)

    def labels() -> Tensor:
        return torch.randint(shape.classes, (shape.rows,), device=device, generator=generator)

    weight = normal(shape.classes, shape.dim).mul_(0.01)
    return Inputs(
        embeddings=[normal(shape.rows, shape.dim).requires_grad_() for _ in range(batches)],
        labels=[labels() for _ in range(batches)],
        weight=weight.requires_grad_(),
    )


def truth(objective: str, embeddings: Tensor, weight: Tensor, labels: Tensor, scale: float = SCALE) -> Answer:
    """Loss and gradients of `objective` from its definition, in float64.

    A million classes in float64 take 4 GiB at D = 512, so at most two arrays of that size exist at once.
    """
    unit_w = torch.empty_like(weight, dtype=torch.float64)
    for unit, rows in zip(unit_w.split(BLOCK), weight.detach().split(BLOCK), strict=True):
        unit.copy_(F.normalize(rows.double()))
    unit_w.requires_grad_()
    if objective == "exclusive":
        similarity = unit_w @ unit_w.t()
        loss = similarity.fill_diagonal_(-math.inf).max(dim=1).values.mean()
        loss.backward()
        return Answer(loss.detach(), None, _before_normalization(weight, unit_w.grad))

    x = embeddings.detach().double().requires_grad_()
    total = x.new_zeros(())
    for rows in torch.arange(len(x), device=x.device).split(32):  # float64 (N, C) may not fit
        cosine = F.normalize(x[rows]) @ unit_w.t()
        if objective in MARGINS:
            target = labels[rows, None]
            cosine = cosine.scatter(1, target, MARGINS[objective](cosine.gather(1, target)))
        loss = F.cross_entropy(scale * cosine, labels[rows], reduction="sum") / len(x)
        loss.backward()
        total += loss.detach()
    return Answer(total, x.grad, _before_normalization(weight, unit_w.grad))


def _before_normalization(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """Convert the gradient of the normalized rows into the gradient of `weight`, in place."""
    assert gradient is not None
    for block, rows in zip(gradient.split(BLOCK), weight.detach().split(BLOCK), strict=True):
        rows = rows.double().requires_grad_()
        block.copy_(*torch.autograd.grad(F.normalize(rows), rows, block))
    return gradient


def relative_error(value: Tensor, exact: Tensor) -> float:
    """‖value − exact‖ / ‖exact‖ in float64."""
    values, exacts = value.reshape(-1).split(BLOCK * 512), exact.reshape(-1).split(BLOCK * 512)
    error = sum(float((v.double() - e).square().sum()) for v, e in zip(values, exacts, strict=True))
    return math.sqrt(error / sum(float(e.square().sum()) for e in exacts))
