"""Contestants of the comparison: fused_margin and the implementations in use today, each at its best settings."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_margin as fm
from fused_margin.benchmark.contestants import Build, Contestant, Loss
from fused_margin.benchmark.losses import WORKSPACE_MB, lean_arcface, selecting_arcface
from fused_margin.benchmark.problems import MARGIN, SCALE, Inputs

from ..common.steps import LossStep, loss_step

try:
    from pytorch_metric_learning.losses import ArcFaceLoss
    from pytorch_metric_learning.regularizers import RegularFaceRegularizer
except ImportError:  # its contestants are left out
    ArcFaceLoss = RegularFaceRegularizer = None

OURS = "ours"
OURS_SMALL = "ours, nothing kept"
OURS_NORMFACE = "ours, NormFace"
PRODUCTS = "three products"
COMPILED = "compiled lean"
LEAN = "eager lean"
TEXTBOOK = "eager textbook"
LINEAR = "F.linear_cross_entropy"
LINEAR_CHUNKED = "F.linear_cross_entropy, chunked"
PML = "PML ArcFaceLoss"
PML_EXCLUSIVE = "PML RegularFaceRegularizer"

# Enough for one chunk of classes and no saved exponentials (CHUNK_BYTES of fused_margin._ops.inputs).
SMALL_WORKSPACE_MB = {"cpu": 32, "cuda": 128}
CHUNK_ROWS = 32


class ProductsStep:
    """X·Wᵀ, P·W and Pᵀ·X into existing buffers: the matrix products of any exact step, and nothing else."""

    def __init__(self, inputs: Inputs, classes_first: bool):
        self.embeddings = [batch.detach() for batch in inputs.embeddings]
        self.weight = inputs.weight.detach()
        rows, classes = self.embeddings[0].shape[0], self.weight.shape[0]
        self.classes_first = classes_first
        self.product = self.weight.new_empty((classes, rows) if classes_first else (rows, classes))
        self.embedding_gradient = torch.empty_like(self.embeddings[0])
        self.weight_gradient = torch.empty_like(self.weight)

    def __call__(self, turn: int) -> None:
        embeddings = self.embeddings[turn % len(self.embeddings)]
        if self.classes_first:
            torch.mm(self.weight, embeddings.t(), out=self.product)
            torch.mm(self.product.t(), self.weight, out=self.embedding_gradient)
            torch.mm(self.product, embeddings, out=self.weight_gradient)
        else:
            torch.mm(embeddings, self.weight.t(), out=self.product)
            torch.mm(self.product, self.weight, out=self.embedding_gradient)
            torch.mm(self.product.t(), embeddings, out=self.weight_gradient)


def textbook_arcface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ArcFace as in most published heads: every operation on the full (N, C) matrix."""
    cosine = F.linear(F.normalize(embeddings), F.normalize(weight))
    sine = torch.sqrt((1.0 - torch.pow(cosine, 2)).clamp(0, 1))
    with_margin = cosine * math.cos(MARGIN) - sine * math.sin(MARGIN)
    fallback = cosine - math.sin(math.pi - MARGIN) * MARGIN
    with_margin = torch.where(cosine > math.cos(math.pi - MARGIN), with_margin, fallback)
    one_hot = torch.zeros_like(cosine)
    one_hot.scatter_(1, labels.view(-1, 1), 1)
    logits = one_hot * with_margin + (1.0 - one_hot) * cosine
    logits = logits * SCALE
    return F.cross_entropy(logits, labels)


def _compiled(loss: Loss, mode: str) -> Build:
    def build(inputs: Inputs) -> LossStep:
        # A function compiled for many shapes reaches the recompilation limit and runs uncompiled.
        torch.compiler.reset()
        return LossStep(torch.compile(loss, mode=mode, dynamic=False), inputs)

    return build


def _ours(margin: fm.Margin, workspace_mb: int = WORKSPACE_MB) -> Build:
    return loss_step(
        lambda embeddings, weight, labels: fm.functional.margin_cross_entropy(
            embeddings, weight, labels, margin, SCALE, workspace_mb=workspace_mb
        )
    )


def _linear_cross_entropy(rows: int | None, dtype: torch.dtype) -> Loss:
    """Normalized softmax by F.linear_cross_entropy, `rows` samples at a time, or unchunked if None."""
    options = None if rows is None else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return lambda embeddings, weight, labels: F.linear_cross_entropy(
        (F.normalize(embeddings) * SCALE).to(dtype),
        F.normalize(weight).to(dtype),
        labels,
        reduction="mean",
        options=options,
    )


def linear_losses(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Loss]:
    """F.linear_cross_entropy with several settings for `rows` embeddings; empty before torch 2.13."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    chunks = dict.fromkeys((rows, -(-rows // 2), -(-rows // 4)))
    return {"unchunked": _linear_cross_entropy(None, dtype)} | {
        f"batch_chunk_size={chunk}": _linear_cross_entropy(chunk, dtype) for chunk in chunks
    }


def _pml_arcface(inputs: Inputs) -> LossStep:
    """The margin is in degrees (28.6 in the documentation); the weight is a parameter of the loss, (D, C)."""
    classes, dim = inputs.weight.shape
    head = ArcFaceLoss(classes, dim, margin=math.degrees(MARGIN), scale=SCALE)
    head.W = torch.nn.Parameter(inputs.weight.detach().t().contiguous())
    return LossStep(lambda embeddings, _, labels: head(embeddings, labels), inputs, head.W)


def step_contestants(rows: int, device: str, compiled: bool = True) -> list[Contestant]:
    """Contestants that compute the loss and both gradients for `rows` embeddings."""
    arcface = fm.Margin(m2=MARGIN)
    layouts = {
        "product (N, C)": lambda inputs: ProductsStep(inputs, classes_first=False),
        "product (C, N)": lambda inputs: ProductsStep(inputs, classes_first=True),
    }
    compilations = {
        f"{form}, {mode}": _compiled(loss, mode)
        for form, loss in (("select", selecting_arcface), ("write", lean_arcface))
        for mode in ("default", "max-autotune-no-cudagraphs")
    }
    small = SMALL_WORKSPACE_MB[device]
    contestants = [
        Contestant(PRODUCTS, "products", layouts),
        Contestant(OURS, "arcface", {f"workspace_mb={WORKSPACE_MB}": _ours(arcface)}),
        Contestant(OURS_SMALL, "arcface", {f"workspace_mb={small}": _ours(arcface, small)}),
        Contestant(COMPILED, "arcface", compilations, compiled=True),
        Contestant(LEAN, "arcface", {"in place": loss_step(lean_arcface)}),
        Contestant(TEXTBOOK, "arcface", {"full matrices": loss_step(textbook_arcface)}),
    ]
    if ArcFaceLoss is not None:
        contestants.append(Contestant(PML, "arcface", {"defaults": _pml_arcface}))
    contestants.append(
        Contestant(
            OURS_NORMFACE,
            "normface",
            {f"workspace_mb={WORKSPACE_MB}": _ours(fm.Margin())},
            OURS_NORMFACE,
        )
    )
    if linear := {name: loss_step(loss) for name, loss in linear_losses(rows).items()}:
        chunked = {f"batch_chunk_size={CHUNK_ROWS}": loss_step(_linear_cross_entropy(CHUNK_ROWS, torch.float32))}
        contestants += [
            Contestant(LINEAR, "normface", linear, OURS_NORMFACE),
            Contestant(LINEAR_CHUNKED, "normface", chunked, OURS_NORMFACE),
        ]
    return [each for each in contestants if compiled or not each.compiled]


def _of_weight(loss: Callable[[Tensor], Tensor]) -> Build:
    return loss_step(lambda _, weight, __: loss(weight))


def lean_exclusive(weight: Tensor) -> Tensor:
    """The exclusive term from one (C, C) matrix, in place."""
    rows = F.normalize(weight)
    return (rows @ rows.t()).fill_diagonal_(-math.inf).max(dim=1).values.mean()


def searching_exclusive(weight: Tensor, chunk: int) -> Tensor:
    """The exclusive term as a careful user writes it: search in chunks under no_grad, then gather with gradients.

    Checkpointed chunks would need three more products of C×C.
    """
    rows = F.normalize(weight)
    with torch.no_grad():
        nearest = []
        for start in range(0, len(rows), chunk):
            similarity = rows[start : start + chunk] @ rows.t()
            similarity.diagonal(start).fill_(-math.inf)
            nearest.append(similarity.argmax(dim=1))
        index = torch.cat(nearest)
    return (rows * rows.index_select(0, index)).sum(dim=1).mean()


def exclusive_contestants() -> list[Contestant]:
    """Contestants that compute the exclusive term and its gradient."""
    searches = {
        f"{chunk} rows at a time": _of_weight(lambda w, chunk=chunk: searching_exclusive(w, chunk))
        for chunk in (512, 2048)
    }
    contestants = [
        Contestant(
            OURS,
            "exclusive",
            {"defaults": _of_weight(fm.functional.exclusive_regularization)},
        ),
        Contestant(LEAN, "exclusive", {"C×C matrix": _of_weight(lean_exclusive)}),
        Contestant("eager, chunked search", "exclusive", searches),
    ]
    if RegularFaceRegularizer is not None:
        contestants.append(Contestant(PML_EXCLUSIVE, "exclusive", {"defaults": _of_weight(RegularFaceRegularizer())}))
    return contestants


def find(suite: str, name: str, rows: int, device: str) -> Contestant:
    """The contestant with that name: a measuring process receives only names."""
    contestants = exclusive_contestants() if suite == "exclusive" else step_contestants(rows, device)
    return next(each for each in contestants if each.name == name)
