"""Half-precision steps on a GPU: ours, bare matrix products, eager and compiled heads, and fused cross-entropies."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin._ops.backends import select
from fused_margin.benchmark.contestants import Build, Contestant, Loss
from fused_margin.benchmark.problems import MARGIN, SCALE, Answer, Inputs, Shape

from ..common.steps import LossStep, loss_step
from ..comparison import peers
from .names import (
    COMPILED,
    CUT,
    DEFAULT,
    FOUR,
    LEAN,
    LIGER,
    LINEAR,
    NORMFACE,
    NOTHING_KEPT,
    RECOMPUTING,
    TEXTBOOK,
    THREE,
    ours,
)

LOSS_SCALE = 64.0  # per sample, as a GradScaler would choose: small gradients stay normal in fp16, large ones finite
LOOSE = {"loss_tolerance": 5e-3, "tolerance": 5e-2}  # for fp16 logits


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class HalfProducts:
    """Products of a step by cuBLAS, fp16 operands, into existing buffers: X·Wᵀ `forward` times, P·W and Pᵀ·X."""

    def __init__(self, inputs: Inputs, forward: int, gradients: torch.dtype):
        self.embeddings = [batch.detach().half() for batch in inputs.embeddings]
        self.weight = inputs.weight.detach().half()
        self.forward = forward
        self.product = self.weight.new_empty(len(self.embeddings[0]), len(self.weight))
        self.d_embeddings = torch.empty_like(self.embeddings[0], dtype=gradients)
        self.d_weight = torch.empty_like(self.weight, dtype=gradients)

    def __call__(self, turn: int) -> None:
        embeddings = self.embeddings[turn % len(self.embeddings)]
        for _ in range(self.forward):
            torch.mm(embeddings, self.weight.t(), out=self.product)
        into = {} if self.d_weight.dtype == torch.float16 else {"out_dtype": self.d_weight.dtype}
        torch.mm(self.product, self.weight, **into, out=self.d_embeddings)
        torch.mm(self.product.t(), embeddings, **into, out=self.d_weight)


class GraphStep(LossStep):
    """A step as one CUDA graph. Every batch is copied to the inputs of the graph."""

    def __init__(self, loss: Loss, inputs: Inputs):
        self.batches = [batch.detach() for batch in inputs.embeddings], inputs.labels
        embeddings = self.batches[0][0].clone().requires_grad_()
        weight = inputs.weight.detach().requires_grad_()  # shares the memory, has a separate gradient
        super().__init__(loss, Inputs([embeddings], [self.batches[1][0].clone()], weight))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                super().__call__(0)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.result = super().__call__(0)

    def __call__(self, turn: int) -> Tensor:
        for mine, batches in zip((self.embeddings[0].detach(), self.labels[0]), self.batches, strict=True):
            mine.copy_(batches[turn % len(batches)])
        self.graph.replay()
        return self.result

    def answer(self, turn: int) -> Answer:
        return Answer(self(turn), self.embeddings[0].grad, self.parameter.grad)


def our_loss(backend: str, margin: fm.Margin, workspace_mb: int = peers.WORKSPACE_MB) -> Loss:
    """Our loss on one backend. A name that ends in SPLIT splits every operand into two halves."""
    name, split = backend.removesuffix(f" {select.SPLIT}"), backend.endswith(select.SPLIT)

    def loss(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with select.force_backend(name), precision("highest" if split else "high"):
            return fm.functional.margin_cross_entropy(
                embeddings, weight, labels, margin, SCALE, workspace_mb=workspace_mb
            )

    return loss


def autocast(loss: Loss) -> Loss:
    def half(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, torch.float16):
            return loss(embeddings, weight, labels)

    return half


def _scaled(loss: Loss) -> Build:
    return lambda inputs: LossStep(loss, inputs, loss_scale=LOSS_SCALE * len(inputs.labels[0]))


def _compiled(loss: Loss) -> Build:
    return lambda inputs: _scaled(autocast(torch.compile(loss, dynamic=False)))(inputs)


def recomputing_arcface(embeddings: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """ArcFace with checkpointing: nothing of size (N, C) is saved for the backward."""
    return checkpoint(peers.selecting_arcface, embeddings, weight, labels, use_reentrant=False)


def our_steps(backends: Sequence[str], *, normface: bool = False) -> list[Contestant]:
    arcface, contestants = fm.Margin(m2=MARGIN), []
    small = peers.SMALL_WORKSPACE_MB["cuda"]
    for backend in backends:
        settings = {"reference": ours(backends[0]), "loss_tolerance": 1e-4}
        if backend.endswith(select.SPLIT):
            settings["tolerance"] = 1e-4
        for detail, workspace in ((DEFAULT, peers.WORKSPACE_MB), (NOTHING_KEPT, small)):
            build = {f"workspace_mb={workspace}": loss_step(our_loss(backend, arcface, workspace))}
            contestants.append(Contestant(ours(backend, detail), "arcface", build, **settings))
        if normface:
            settings["reference"] = ours(backends[0], NORMFACE)
            build = {f"workspace_mb={peers.WORKSPACE_MB}": loss_step(our_loss(backend, fm.Margin()))}
            contestants.append(Contestant(ours(backend, NORMFACE), "normface", build, **settings))
    return contestants


def eager(reference: str) -> list[Contestant]:
    return [
        Contestant(name, "arcface", {variant: _scaled(autocast(loss))}, reference, **LOOSE)
        for name, variant, loss in (
            (TEXTBOOK, "full matrices", peers.textbook_arcface),
            (LEAN, "in place", peers.lean_arcface),
        )
    ]


def compilations(reference: str) -> list[Contestant]:
    keeping = {"select": _compiled(peers.selecting_arcface), "write": _compiled(peers.lean_arcface)}
    recomputing = {"select": _compiled(recomputing_arcface)}
    return [
        Contestant(name, "arcface", variants, reference, compiled=True, **LOOSE)
        for name, variants in ((COMPILED, keeping), (RECOMPUTING, recomputing))
    ]


def normface_peers(shape: Shape, reference: str) -> list[Contestant]:
    """Normalized softmax by the fused implementations that are installed."""

    def of_halves(loss: Loss) -> Build:
        return _scaled(lambda x, w, labels: loss((F.normalize(x) * SCALE).half(), F.normalize(w).half(), labels))

    def cut(inputs: Inputs) -> LossStep:
        from cut_cross_entropy import linear_cross_entropy

        return of_halves(partial(linear_cross_entropy, filter_eps=None))(inputs)

    def liger(inputs: Inputs, budget: int) -> LossStep:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        def loss(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
            # Liger computes the gradient in the forward, before the loss scale: that of a mean would vanish in fp16.
            options = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32, False, False, False, None, None)
            return LigerFusedLinearCrossEntropyFunction.apply(x, w, labels, *options, budget)[0] / len(x)

        return of_halves(loss)(inputs)

    whole = -(-shape.classes // shape.dim)
    budgets = {f"chunk_mem_const={b}": partial(liger, budget=b) for b in dict.fromkeys((1, -(-whole // 4), whole))}
    linear = {name: _scaled(loss) for name, loss in peers.linear_losses(shape.rows, torch.float16).items()}
    found = {"cut_cross_entropy": (CUT, {"filter_eps=None": cut}), "liger_kernel": (LIGER, budgets)}
    chosen = [found[module] for module in found if importlib.util.find_spec(module)]
    chosen += [(LINEAR, linear)] if linear else []
    return [
        Contestant(name, "normface", variants, reference, compiled=name in (CUT, LIGER), **LOOSE)
        for name, variants in chosen
    ]


def products(reference: str) -> list[Contestant]:
    """Products of a step that saves the exponentials (three), and that recomputes them (four), as ours does here."""

    def build(forward: int, gradients: torch.dtype) -> Build:
        return lambda inputs: HalfProducts(inputs, forward, gradients)

    return [
        Contestant(
            name,
            "products",
            {"fp16 gradients": build(forward, torch.float16), "fp32 gradients": build(forward, torch.float32)},
            reference,
        )
        for name, forward in ((THREE, 1), (FOUR, 2))
    ]
