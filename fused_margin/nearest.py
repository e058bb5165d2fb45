"""The nearest other class, RegularFace's exclusive term, and separability; the nearest rows of any two sets."""

from typing import NamedTuple

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops import collectives, library
from fused_margin._ops.backends.select import kernels_on, select_backend
from fused_margin._ops.inputs import MIB, PORTABLE, LossInputs, compute_dtype
from fused_margin._ops.nearest.library import nearest_rows
from fused_margin._ops.nearest.quantized import QuantizedRows, int8_is_fastest
from fused_margin._ops.nearest.search import MAX_NEAREST, search_quantized
from fused_margin.distributed import Shard

__all__ = ["NearestClass", "Separability", "exclusive_regularization", "nearest_class", "separability"]

METRICS = ("cosine", "inner_product")


class NearestClass(NamedTuple):
    """Result of :func:`nearest_class`.

    Attributes:
        cosine: (C,) or (C, k), the cosine of each class to its nearest other classes.
        index: int64 of the same shape, the nearest other classes.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> found = F.nearest_class(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]))
        >>> found.index
        tensor([1, 0, 1])
    """

    cosine: Tensor
    index: Tensor  # type: ignore[assignment]  # the public name, although tuples have a method index


class Separability(NamedTuple):
    """Result of :func:`separability`.

    Attributes:
        mean: mean over the classes of the cosine to the nearest other class.
        std: population standard deviation of these cosines.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> mean, std = F.separability(torch.eye(4))
        >>> mean, std
        (0.0, 0.0)
    """

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
    """Searches for the k nearest other classes of every class, or the k nearest references of every query.

    The search is exact on the CPU, and on every device with a ``reference`` or ``k > 1``: candidates are selected by
    matrix products (in int8 on processors with instructions for it), and candidates too close to distinguish are
    compared in float64. The nearest classes of a class are its hardest negatives. A very high cosine between two
    classes suggests that they are one identity with two labels.

    Args:
        query: (C, D) class weights or other rows; C >= 2 without a reference. They need not be normalized.
        reference: (R, D) rows to search. None searches the other rows of ``query``.
        k: number of nearest rows, at most 32 and at most the number of rows that are searched.
        metric: ``"cosine"``, or ``"inner_product"`` for the largest ``query_i . reference_j`` of unnormalized rows.
        shard: the slice of the classes in ``query``, if classes are divided among ranks. The search is then over the
            classes of all ranks, and so is ``index``. At most two remote blocks of classes are resident on a rank. On
            the CPU the result equals that of one device, bit for bit. Supports only k = 1, ``"cosine"`` and no reference.
        workspace_mb: bound on scratch memory in MiB. int8 codes take one byte per element of the rows, and are used if
            they fit.

    Returns:
        ``NearestClass(cosine, index)``, both (C,), or (C, k) for k > 1, in descending order. With
        ``metric="inner_product"``, ``cosine`` holds inner products. The lowest index wins a tie. A row that contains NaN,
        or a float64 row with a norm above 1e154, has cosine NaN and is never the nearest of another row. Inner products
        may be as large as their dtype allows; rows with elements above 2^55 are copied as float64. ``cosine`` is
        differentiable for k = 1, ``"cosine"`` and no reference. Otherwise, multiply by the rows of ``index`` for a
        differentiable result.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes or devices, fewer than two classes, or k out of range.
        RuntimeError: for a reference, k > 1 or inner products, with CUDA tensors on a compute capability without the
            exact search (see :func:`fused_margin.build_info`), or under a torch.func derivative.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> F.nearest_class(weight)
        NearestClass(cosine=tensor([ 0.7071,  0.7071, -0.7071]), index=tensor([1, 0, 1]))

        The two nearest rows of another set:

        >>> F.nearest_class(torch.tensor([[0.0, 2.0]]), weight, k=2).index
        tensor([[1, 0]])
    """
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    _checks.one_of("metric", metric, METRICS)
    _checks.positive_index("k", k)
    is_differentiable = reference is None and k == 1 and metric == "cosine"
    if shard is not None:
        if not is_differentiable:
            raise ValueError(f"shard: expected None with a reference, k > 1 or inner products, got {shard}")
        _checks.several_classes("query", query, shard)
        return differentiable_nearest(query, None, shard, workspace_mb)
    if reference is None:
        _checks.several_classes("query", query, None)
        others = len(query) - 1
    else:
        _checks.class_weights(query, name="query", at_least=0)
        _checks.class_weights(reference, name="reference", at_least=1)
        _checks.same_device("reference", reference, query)
        others = len(reference)
        if reference.shape[1] != query.shape[1]:
            raise ValueError(
                f"reference: expected shape (R, {query.shape[1]}) as query has, got {tuple(reference.shape)}"
            )
    if k > min(MAX_NEAREST, others):
        raise ValueError(f"k: expected at most {min(MAX_NEAREST, others)}, got {k}")
    if is_differentiable:
        return differentiable_nearest(query, None, None, workspace_mb)
    _checks.exact_search_device("query", query)
    refuse_derivative(query, reference)
    if reference is not None and query.dtype != reference.dtype:
        query, reference = (t.to(compute_dtype(query, reference)) for t in (query, reference))
    cosine, index = nearest_rows(
        query.detach(), None if reference is None else reference.detach(), k, metric == "inner_product",
        int(workspace_mb * MIB),
    )  # fmt: skip
    return NearestClass(cosine, index) if k > 1 else NearestClass(cosine.squeeze(1), index.squeeze(1))


class NearestIndex:
    """An exact index of rows by their cosines, as FAISS's IndexFlatIP is of inner products.

    int8 codes, where they are fastest, take one byte per element of the references.

    Args:
        reference: (R, D) float32 or float64, finite. The index refers to it.
        workspace_mb: bound on scratch memory of a search in MiB, beside the codes.

    Raises:
        RuntimeError: the device does not have the exact search.
    """

    def __init__(self, reference: Tensor, workspace_mb: float):
        _checks.exact_search_device("reference", reference)
        self.workspace_bytes = int(workspace_mb * MIB)
        with kernels_on(reference.device) as run:
            self.rows = QuantizedRows.of(run, reference, int8_is_fastest(reference))

    def search(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines (Q, k) float64 of queries (Q, D) to the k nearest references, descending, and these (Q, k) int64.

        The lowest row wins a tie. Equal rows have equal cosines, bit for bit.
        """
        with kernels_on(query.device) as run:
            rows = QuantizedRows.of(run, query, self.rows.codes.dtype == torch.int8)
            return search_quantized(run, rows, self.rows, k, self.workspace_bytes).answers(torch.float64)


def refuse_derivative(query: Tensor, reference: Tensor | None) -> None:
    """Raises RuntimeError if torch.func differentiates the result, which would silently have the derivative 0."""
    if torch.compiler.is_compiling():
        return
    try:
        library.refuse_unsupported([query, reference])
    except RuntimeError as error:
        raise RuntimeError(
            "nearest_class: with a reference, k > 1 or inner products its results have no derivative; call it with "
            "detached rows, and multiply by the rows of index"
        ) from error


def differentiable_nearest(
    weight: Tensor, known: NearestClass | None, shard: Shard | None, workspace_mb: float
) -> NearestClass:
    """Differentiable cosines to the nearest other classes of all ranks; searches for these unless they are known."""
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
    """RegularFace's exclusive term: the mean cosine of the classes to their nearest other class.

    ``1/C * sum_j max_{k != j} w_j . w_k`` with unit-length rows (RegularFace, CVPR 2019, eq. 8). It takes the time of
    half of W @ W.T, in int8 where that is fastest, and O(C * D) memory.

    Args:
        weight: (C, D), C >= 2. Rows need not be normalized.
        nearest: the nearest other class of every class, if it is known; the given cosines are used, and differentiated.
            If classes are divided among ranks: of this rank's classes, with indices over all classes.
        shard: as in :func:`nearest_class`. Every rank gets the mean over all classes.
        workspace_mb: bound on scratch memory in MiB.

    Returns:
        Differentiable scalar; float64 if ``weight`` is, else float32.

    Raises:
        ValueError, TypeError: for wrong shapes or dtypes, or fewer than two classes.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> weight = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> round(F.exclusive_regularization(weight).item(), 4)  # (cos 45 + cos 45 + cos 135 degrees) / 3
        0.2357
    """
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    _checks.several_classes("weight", weight, shard)
    _checks.nearest(nearest, weight, shard)
    cosine = differentiable_nearest(weight, nearest, shard, workspace_mb).cosine
    if shard is None:
        return cosine.mean()
    return collectives.all_reduce_forward(cosine.sum(), shard.name) / shard.num_classes


@torch.no_grad()
def separability(weight: Tensor, *, workspace_mb: float = 256) -> Separability:
    """Mean and standard deviation of the cosine of a class to its nearest other class.

    RegularFace's Sep_j (CVPR 2019, eq. 5), over all classes j.

    Args:
        weight: (C, D), C >= 2. Rows need not be normalized.
        workspace_mb: bound on scratch memory in MiB.

    Returns:
        ``Separability(mean, std)``, Python floats. std is the population standard deviation (divided by C). A lower mean
        is a better separation. Uniform random directions with C = 10,575 and D = 512 give 0.170 and 0.0134.

    Raises:
        ValueError, TypeError: for wrong shapes or dtypes, or fewer than two classes.

    Examples:
        >>> import torch, fused_margin.functional as F
        >>> result = F.separability(torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]))
        >>> round(result.mean, 4), round(result.std, 4)
        (0.2357, 0.6667)
    """
    _checks.number("workspace_mb", workspace_mb, 0.0, open_low=True)
    _checks.several_classes("weight", weight, None)
    cosine = differentiable_nearest(weight, None, None, workspace_mb).cosine.double()
    return Separability(cosine.mean().item(), cosine.std(correction=0).item())
