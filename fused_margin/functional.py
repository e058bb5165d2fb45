"""Functional interface: margin softmax losses and the exclusive term over (C, D) class weights."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin import checks
from fused_margin.margins import BEYOND_PI, Margin
from fused_margin.ops import library
from fused_margin.ops.dispatch import products_of
from fused_margin.ops.problem import compute_dtype


class NearestClass(NamedTuple):
    cosine: Tensor
    index: Tensor


class Separability(NamedTuple):
    mean: float
    std: float


def margin_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    margin: Margin = Margin(),  # noqa: B008 - immutable
    scale: float | Tensor | None = 64.0,
    *,
    exclusive_weight: float = 0.0,
    class_weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    workspace_mb: float = 256,
) -> Tensor:
    """Cross-entropy over scaled cosines with a margin on the target, plus RegularFace's exclusive term.

    With unit-length rows x and w, ``cos_ij = x_i . w_j`` and ``theta_i`` the angle to the sample's own class::

        z_i    = scale_i * psi(theta_i)                                  (psi: fused_margin.Margin)
        loss_i = log(exp z_i + sum_{j != y_i} exp(scale_i * cos_ij)) - z_i
        result = reduce(loss_i) + exclusive_weight / C * sum_j max_{k != j} w_j . w_k

    (ArcFace, arXiv:1801.07698, eq. 4; exclusive term: RegularFace, CVPR 2019, eq. 8.) Neither the (N, C)
    logits nor the (C, C) cosines are ever whole; scratch stays within ``workspace_mb`` plus O(N * D + C).
    A row shorter than 1e-12 counts as zero: its cosines and gradients are 0.

    Args:
        embeddings: (N, D), float32, float64, float16 or bfloat16, any strides.
        weight: (C, D) class weights, same device; dtype may differ. Need not be normalised.
        labels: (N,) integers in [0, C), or ``ignore_index``.
        margin: the margin; its numbers may be (N,) tensors.
        scale: positive number, or an (N,) tensor of non-negative numbers (differentiable), or None for the
            embedding's norm, as SphereFace does.
        exclusive_weight: lambda of the exclusive term. Found in the same sweep over the weights.
        class_weight, reduction, ignore_index, label_smoothing: as in ``torch.nn.functional.cross_entropy``.
        workspace_mb: bound on scratch memory in MiB. Exponentials that fit in it are kept for the
            backward, the others are computed again. At least 64 classes are always taken at a time.

    Returns:
        Scalar, or (N,) for ``reduction="none"``; float64 if an input is, else float32.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes, devices or values. Labels on a CUDA device are
            checked there and reported by the next call (``fused_margin.set_debug(True)``: at once).
        RuntimeError: for CUDA tensors in a build without CUDA kernels, and for second derivatives.
    """
    checks.batch(embeddings, weight, labels)
    checks.margin(margin)
    checks.scale(scale)
    checks.number("exclusive_weight", exclusive_weight, 0.0)
    checks.class_weight(class_weight, weight)
    checks.reduction(reduction, exclusive_weight)
    checks.index("ignore_index", ignore_index)
    checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    compute = compute_dtype(embeddings, weight)
    exclusive, smooth = exclusive_weight > 0, label_smoothing > 0
    if exclusive:
        checks.class_weights(weight, at_least=2)

    labels = labels.to(torch.int64).contiguous()
    class_weight = None if class_weight is None else class_weight.detach().to(torch.float64).contiguous()
    scales, scale_value = _scales(scale, embeddings)
    nlse, target_cosine, uniform_cosine, nearest_cosine = _sweep(
        embeddings, weight, labels, scales, scale_value, workspace_mb, class_weight if smooth else None, smooth,
        exclusive, ignore_index,
    )  # fmt: skip
    numbers = {"m1": margin.m1, "m2": margin.m2, "m3": margin.m3, "annealing": margin.annealing}
    per_sample = [scales] + [checks.per_sample(f"margin.{name}", value, embeddings) for name, value in numbers.items()]
    values = [scale_value] + [0.0 if isinstance(value, Tensor) else float(value) for value in numbers.values()]
    loss, row_weight, _ = library.margin_rows(
        nlse, target_cosine, uniform_cosine if smooth else None, labels, class_weight,
        class_weight.sum() if smooth and class_weight is not None else None, *per_sample, values,
        BEYOND_PI.index(margin.beyond_pi), margin.easy, margin.gradient == "straight_through", math.sqrt(torch.finfo(compute).eps),
        float(label_smoothing), weight.shape[0], ignore_index,
    )  # fmt: skip
    if reduction == "mean":
        loss = loss.sum() / row_weight.sum()
    elif reduction == "sum":
        loss = loss.sum()
    if exclusive:
        loss = loss + exclusive_weight * nearest_cosine.mean(dtype=torch.float64)
    return loss.to(compute)


def cosine_logsumexp(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: float | Tensor | None = 64.0,
    *,
    workspace_mb: float = 256,
) -> tuple[Tensor, Tensor]:
    """What any margin loss needs of the N x C cosines, differentiable: write your own margin on (N,) tensors.

    Args:
        embeddings, weight, labels, scale, workspace_mb: as in :func:`margin_cross_entropy`; no label is ignored.

    Returns:
        ``(negative_logsumexp, target_cosine)``, each (N,): ``log sum_{j != y_i} exp(scale_i * cos_ij)`` (-inf if
        there is one class only) and ``cos_{i, y_i}``. The loss of a target logit z is
        ``torch.nn.functional.softplus(negative_logsumexp - z)``.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`margin_cross_entropy`.
    """
    checks.batch(embeddings, weight, labels)
    checks.scale(scale)
    scales, scale_value = _scales(scale, embeddings)
    labels = labels.to(torch.int64).contiguous()
    nothing_ignored = torch.iinfo(torch.int64).min
    nlse, target_cosine, _, _ = _sweep(
        embeddings, weight, labels, scales, scale_value, workspace_mb, None, False, False, nothing_ignored
    )
    compute = compute_dtype(embeddings, weight)
    return nlse.to(compute), target_cosine.to(compute)


def nearest_class(weight: Tensor, *, workspace_mb: float = 256) -> NearestClass:
    """For every class, the other class whose weight points most nearly the same way.

    Args:
        weight: (C, D), C >= 2; need not be normalised.
        workspace_mb: bound on scratch memory in MiB; W @ W.T goes through in tiles of its upper triangle.

    Returns:
        ``NearestClass(cosine, index)``, both (C,). ``cosine`` is differentiable; ties go to the lowest index. A row
        with NaN has cosine NaN.

    Raises:
        ValueError, TypeError: for wrong shapes or dtypes, or fewer than two classes.
    """
    checks.class_weights(weight, at_least=2)
    checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    output = library.sweep(
        None, weight, None, None, 1.0, None, True, int(workspace_mb * 2**20), products_of(None, weight), False, 0, False
    )
    return NearestClass(output[3], output[4])


def exclusive_regularization(weight: Tensor, *, workspace_mb: float = 256) -> Tensor:
    """RegularFace's exclusive term: mean over the classes of the cosine to the nearest other class.

    ``1/C * sum_j max_{k != j} w_j . w_k`` with unit-length rows (RegularFace, CVPR 2019, eq. 8). Time is that of half
    of W @ W.T; memory O(C * D), never O(C^2).

    Args:
        weight: (C, D), C >= 2; need not be normalised.
        workspace_mb: bound on scratch memory in MiB.

    Returns:
        Scalar, differentiable; float64 if ``weight`` is, else float32.

    Raises:
        ValueError, TypeError: for wrong shapes or dtypes, or fewer than two classes.
    """
    return nearest_class(weight, workspace_mb=workspace_mb).cosine.mean()


@torch.no_grad()
def separability(weight: Tensor, *, workspace_mb: float = 256) -> Separability:
    """Mean and standard deviation of Sep_j, the cosine of class j to its nearest other class (RegularFace, eq. 5).

    Args:
        weight: (C, D), C >= 2; need not be normalised.

    Returns:
        ``Separability(mean, std)``, Python floats; std is that of the C values (divided by C). Lower is better
        separated. Uniform random directions, C = 10,575 and D = 512, give 0.170 and 0.0134.

    Raises:
        ValueError, TypeError: for wrong shapes or dtypes, or fewer than two classes.
    """
    cosine = nearest_class(weight, workspace_mb=workspace_mb).cosine.double()
    return Separability(cosine.mean().item(), cosine.std(correction=0).item())


def _scales(scale: float | Tensor | None, embeddings: Tensor) -> tuple[Tensor | None, float]:
    """Per-sample scales (N,) float64, or None and the one number."""
    if scale is None:
        norm = torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float64)
        return torch.where(norm.isnan(), 0.0, norm), 0.0  # the loss of that row is NaN by its cosines
    return checks.per_sample("scale", scale, embeddings), 0.0 if isinstance(scale, Tensor) else float(scale)


def _sweep(
    embeddings: Tensor,
    weight: Tensor,
    labels: Tensor,
    scales: Tensor | None,
    scale_value: float,
    workspace_mb: float,
    class_weight: Tensor | None,
    uniform: bool,
    nearest: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (embeddings, weight, scales))
    output = library.sweep(
        embeddings, weight, labels, scales, scale_value, class_weight, nearest, math.floor(workspace_mb * 2**20),
        products_of(embeddings, weight), uniform, ignore_index, keep,
    )  # fmt: skip
    return output[:4]
