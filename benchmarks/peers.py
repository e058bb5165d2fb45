"""The contestants: ours and what is used today, each at its best settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import fused_margin as fm

from .problems import MARGIN, SCALE, Answer, Inputs

try:
    from pytorch_metric_learning.losses import ArcFaceLoss
    from pytorch_metric_learning.regularizers import RegularFaceRegularizer
except ImportError:  # then it does not take part
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

WORKSPACE_MB = 256
# Room for the chunk of classes at work and for no exponentials (CHUNK_BYTES of fused_margin._ops.plan).
SMALL_WORKSPACE_MB = {"cpu": 32, "cuda": 128}
CHUNK_ROWS = 32

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (embeddings, weight, labels) -> scalar


class LossStep:
    """Forward and backward of a scalar loss, with gradients set to None first, as optimisers do.

    Gradients of half-precision logits would vanish in fp16: `loss_scale` multiplies the loss, as a GradScaler does.
    """

    def __init__(self, loss: Loss, inputs: Inputs, parameter: Tensor | None = None, loss_scale: float = 1.0):
        self.loss = loss
        self.loss_scale = loss_scale
        self.upstream = None if loss_scale == 1.0 else torch.tensor(loss_scale, device=inputs.weight.device)
        self.embeddings = inputs.embeddings
        self.labels = inputs.labels
        self.parameter = inputs.weight if parameter is None else parameter
        self.transposed = parameter is not None  # a parameter of the peer's own is (D, C)

    def __call__(self, turn: int) -> Tensor:
        batch = turn % len(self.embeddings)
        embeddings, labels = self.embeddings[batch], self.labels[batch]
        embeddings.grad = self.parameter.grad = None
        loss = self.loss(embeddings, self.parameter, labels)
        loss.backward(self.upstream)
        return loss.detach()

    def answer(self, turn: int) -> Answer:
        """Run the step once and hand over what it computed."""
        loss = self(turn)
        gradients = self.embeddings[turn % len(self.embeddings)].grad, self.parameter.grad
        if self.upstream is not None:
            gradients = [gradient / self.loss_scale for gradient in gradients]
        embeddings, parameter = gradients
        return Answer(loss, embeddings, parameter.t() if self.transposed else parameter)

    def touch_gradients(self) -> None:
        """Let every gradient buffer exist in memory, as it does during training."""
        for leaf in (*self.embeddings, self.parameter):
            leaf.grad = torch.ones_like(leaf)


class ProductsStep:
    """X·Wᵀ, P·W and Pᵀ·X into buffers that exist: what any exact step multiplies, and no more."""

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


Build = Callable[[Inputs], LossStep | ProductsStep]


@dataclass(frozen=True)
class Contestant:
    """One row of the tables. Of several variants the fastest is reported, and named."""

    name: str
    objective: str  # "arcface", "normface", "exclusive", or "products" for the floor
    variants: Mapping[str, Build]
    reference: str = OURS  # whose time the ratio is taken against
    compiled: bool = False
    # who is beyond these relative errors does not compute what it is compared for, and is not timed
    loss_tolerance: float = 1e-5
    tolerance: float = 1e-3  # of gradients, and of what a kernel computes
    work: float | None = None  # bytes or operations of one step, where its rate is what is asked for


def textbook_arcface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ArcFace as most published heads write it: every step on the full N×C matrix."""
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


def _with_margin(logits: Tensor) -> Tensor:
    """Target logits, (N,), with their margin."""
    return SCALE * torch.cos(torch.acos((logits / SCALE).clamp(-1, 1)) + MARGIN)


def lean_arcface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ArcFace as a careful user writes it: the scale on N×D, the margin on N numbers, in place."""
    logits = F.linear(F.normalize(embeddings) * SCALE, F.normalize(weight))
    target = torch.arange(len(labels), device=labels.device), labels
    return F.cross_entropy(logits.index_put_(target, _with_margin(logits[target]).to(logits.dtype)), labels)


def selecting_arcface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with a selection instead of a write, which a compiler fuses into its loops."""
    logits = F.linear(F.normalize(embeddings) * SCALE, F.normalize(weight))
    target = _with_margin(logits[torch.arange(len(labels), device=labels.device), labels])
    is_target = torch.arange(len(weight), device=weight.device) == labels[:, None]
    return F.cross_entropy(torch.where(is_target, target[:, None], logits), labels)


def _of(loss: Loss) -> Build:
    return lambda inputs: LossStep(loss, inputs)


def _compiled(loss: Loss, mode: str) -> Build:
    def build(inputs: Inputs) -> LossStep:
        # One function compiled for many shapes would reach the limit and run uncompiled instead.
        torch.compiler.reset()
        return LossStep(torch.compile(loss, mode=mode, dynamic=False), inputs)

    return build


def _ours(margin: fm.Margin, workspace_mb: int = WORKSPACE_MB) -> Build:
    return _of(
        lambda embeddings, weight, labels: fm.functional.margin_cross_entropy(
            embeddings, weight, labels, margin, SCALE, workspace_mb=workspace_mb
        )
    )


def _linear_cross_entropy(rows: int | None, dtype: torch.dtype) -> Loss:
    """Normalised softmax by torch's own fusion; `rows` at a time, or its unchunked path."""
    options = None if rows is None else torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return lambda embeddings, weight, labels: F.linear_cross_entropy(
        (F.normalize(embeddings) * SCALE).to(dtype),
        F.normalize(weight).to(dtype),
        labels,
        reduction="mean",
        options=options,
    )


def linear_losses(rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Loss]:
    """It at its settings for `rows` embeddings; none before torch 2.13, which brought it."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    chunks = dict.fromkeys((rows, -(-rows // 2), -(-rows // 4)))
    return {"unchunked": _linear_cross_entropy(None, dtype)} | {
        f"batch_chunk_size={chunk}": _linear_cross_entropy(chunk, dtype) for chunk in chunks
    }


def _pml_arcface(inputs: Inputs) -> LossStep:
    """Its margin is in degrees (28.6 in its documentation); its weight is its own, (D, C)."""
    classes, dim = inputs.weight.shape
    head = ArcFaceLoss(classes, dim, margin=math.degrees(MARGIN), scale=SCALE)
    head.W = torch.nn.Parameter(inputs.weight.detach().t().contiguous())
    return LossStep(lambda embeddings, _, labels: head(embeddings, labels), inputs, head.W)


def step_contestants(rows: int, device: str, compiled: bool = True) -> list[Contestant]:
    """Everyone who computes the loss and both gradients for `rows` embeddings."""
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
        Contestant(LEAN, "arcface", {"in place": _of(lean_arcface)}),
        Contestant(TEXTBOOK, "arcface", {"full matrices": _of(textbook_arcface)}),
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
    if linear := {name: _of(loss) for name, loss in linear_losses(rows).items()}:
        chunked = {f"batch_chunk_size={CHUNK_ROWS}": _of(_linear_cross_entropy(CHUNK_ROWS, torch.float32))}
        contestants += [
            Contestant(LINEAR, "normface", linear, OURS_NORMFACE),
            Contestant(LINEAR_CHUNKED, "normface", chunked, OURS_NORMFACE),
        ]
    return [each for each in contestants if compiled or not each.compiled]


def _of_weight(loss: Callable[[Tensor], Tensor]) -> Build:
    return _of(lambda _, weight, __: loss(weight))


def lean_exclusive(weight: Tensor) -> Tensor:
    """The exclusive term through one C×C matrix, changed in place."""
    rows = F.normalize(weight)
    return (rows @ rows.t()).fill_diagonal_(-math.inf).max(dim=1).values.mean()


def searching_exclusive(weight: Tensor, chunk: int) -> Tensor:
    """The best a careful user writes: search in chunks without a graph, then gather with one.

    Checkpointing the chunks instead would multiply C×C three times more.
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
    """Everyone who computes the exclusive term and its gradient."""
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
    """The contestant of that name, for a process that was told only the name."""
    everyone = exclusive_contestants() if suite == "exclusive" else step_contestants(rows, device)
    return next(each for each in everyone if each.name == name)
