"""The nearest other class, RegularFace's exclusive term, and separability; the nearest rows of any two sets."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops import library
from fused_margin._ops.backends.select import select_backend
from fused_margin._ops.inputs import MIB, PORTABLE, LossInputs, compute_dtype
from fused_margin._ops.nearest.library import nearest_rows
from fused_margin._ops.nearest.search import MOST_NEAREST
from fused_margin.distributed import Shard

METRICS = ("cosine", "inner_product")


class NearestClass(NamedTuple):
    cosine: Tensor
    index: Tensor


class Separability(NamedTuple):
    mean: float
    std: float


def nearest_class(
    query: Tensor,
    reference: Tensor | None = None,
    *,
    k: int = 1,
    metric: str = "cosine",
    shard: Shard | None = None,
    workspace_mb: float = 256,
) -> NearestClass:
    """The rows that point most nearly the same way: of every class the nearest others, or of every query references.

    Exact: products screen, in int8 where the processor has instructions for it, and rows that they cannot tell apart
    are compared in float64 (on the CPU, and wherever there is a ``reference`` or ``k > 1``). Hard identities are the
    nearest of a class; identities that were labelled twice are classes whose cosine is above what two people have.

    Args:
        query: (C, D) class weights, or other rows; C >= 2 without a reference. Need not be normalised.
        reference: (R, D) rows to look among; None: the other rows of ``query``.
        k: how many, at most 32, and at most as many as there are.
        metric: ``"cosine"``, or ``"inner_product"``: the largest ``query_i . reference_j``, with their lengths.
        shard: which of the classes ``query`` holds, if they are divided among ranks; others are then looked for on
            all of them, and ``index`` counts over all. Shards go round, two at a time on every rank; on the CPU the
            result is that of one device, bit for bit. For the nearest other class by cosine only.
        workspace_mb: bound on scratch memory in MiB; int8 takes a byte an entry of the rows, and is used where that fits.

    Returns:
        ``NearestClass(cosine, index)``, both (C,), or (C, k) for k > 1, in descending order (inner products, if those
        are asked for). Ties go to the lowest index. A row with NaN has cosine NaN, and is no row's nearest; so has a float64
        row of a norm above 1e154. Inner products may be as large as their dtype allows: rows with elements beyond 2^55 are
        copied as float64. ``cosine`` of the nearest other class is differentiable; for all else
        take the rows of ``index`` and multiply.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes or devices, fewer than two classes, k out of range.
        RuntimeError: for CUDA tensors with a reference, k > 1 or inner products, which run on the CPU only yet, and for
            these where torch.func differentiates.
    """
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    _checks.one_of("metric", metric, METRICS)
    _checks.positive_index("k", k)
    plain = reference is None and k == 1 and metric == "cosine"
    if shard is not None:
        if not plain:
            raise ValueError("shard: expected None with a reference, k > 1 or inner products: those are of one device")
        if _checks.shard(shard, query, 1, 0.0) < 2:
            _checks.class_weights(query, at_least=2)
        return differentiable_nearest(query, None, shard, workspace_mb)
    if reference is None:
        _checks.class_weights(query, name="query", at_least=2)
        others = len(query) - 1
    else:
        _checks.class_weights(query, name="query", at_least=0)
        _checks.class_weights(reference, name="reference", at_least=1)
        _checks.same_device("reference", reference, query)
        others = len(reference)
        if reference.shape[1] != query.shape[1]:
            raise ValueError(f"reference: expected (R, {query.shape[1]}), as query, got {tuple(reference.shape)}")
    if k > min(MOST_NEAREST, others):
        raise ValueError(f"k: expected at most {min(MOST_NEAREST, others)}, got {k}")
    if plain:
        return differentiable_nearest(query, None, None, workspace_mb)
    _checks.searched_device("query", query)
    refuse_derivative(query, reference)
    if reference is not None and query.dtype != reference.dtype:
        query, reference = (t.to(compute_dtype(query, reference)) for t in (query, reference))
    cosine, index = nearest_rows(
        query.detach(), None if reference is None else reference.detach(), k, metric == "inner_product",
        int(workspace_mb * MIB),
    )  # fmt: skip
    return NearestClass(cosine, index) if k > 1 else NearestClass(cosine.squeeze(1), index.squeeze(1))


def refuse_derivative(query: Tensor, reference: Tensor | None) -> None:
    """An error where torch.func would differentiate cosines that have no derivative: it would be 0."""
    if torch.compiler.is_compiling():
        return
    try:
        library.refuse_unsupported([query, reference])
    except RuntimeError as error:
        raise RuntimeError(
            "nearest_class: with a reference, k > 1 or inner products its results have no derivative; call it with "
            "detached rows, take the rows of index and multiply"
        ) from error


def differentiable_nearest(
    weight: Tensor, known: NearestClass | None, shard: Shard | None, workspace_mb: float
) -> NearestClass:
    """Differentiable cosines to the nearest other classes, of all ranks, found here if they are not known."""
    group, classes = ("", len(weight)) if shard is None else (shard.name, shard.num_classes)
    if shard is not None:
        _checks.not_meta(weight)
    if shard is not None and not torch.compiler.is_compiling():
        library.refuse_transforms(weight)
    cosine, index = (None, None) if known is None else known
    inputs = LossInputs(
        None, weight, int(workspace_mb * MIB), PORTABLE if group else select_backend(None, weight), nearest=True,
        known_cosine=cosine, known_index=index, group=group, num_classes=classes,
    )  # fmt: skip
    output = library.run_forward(inputs, uniform=False, ignore_index=0)
    return NearestClass(output.nearest_cosine, output.nearest_index)


def exclusive_regularization(
    weight: Tensor, *, nearest: NearestClass | None = None, shard: Shard | None = None, workspace_mb: float = 256
) -> Tensor:
    """RegularFace's exclusive term: mean over the classes of the cosine to the nearest other class.

    ``1/C * sum_j max_{k != j} w_j . w_k`` with unit-length rows (RegularFace, CVPR 2019, eq. 8). Time is that of half
    of W @ W.T, in int8 where that is fastest; memory O(C * D), never O(C^2).

    Args:
        weight: (C, D), C >= 2; need not be normalised.
        nearest: every class's nearest other, where they are known already; their cosines are taken as they are, and
            differentiated. Where classes are divided, of the own ones, with numbers over all.
        shard: as in :func:`nearest_class`; every rank gets the mean over all classes.
        workspace_mb: bound on scratch memory in MiB.

    Returns:
        Scalar, differentiable; float64 if ``weight`` is, else float32.

    Raises:
        ValueError, TypeError: for wrong shapes or dtypes, or fewer than two classes.
    """
    if nearest is None:
        cosine = nearest_class(weight, shard=shard, workspace_mb=workspace_mb).cosine
    else:
        _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
        _checks.class_weights(weight, at_least=2 if shard is None or shard.group is None else 0)
        _checks.nearest(nearest, weight, shard)
        cosine = differentiable_nearest(weight, nearest, shard, workspace_mb).cosine
    if shard is None:
        return cosine.mean()
    return library.all_reduce_forward(cosine.sum(), shard.name) / shard.num_classes


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
