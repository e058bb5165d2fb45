"""The torch.library ops of the exact search."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_margin._ops.backends.select import kernels_on
from fused_margin._ops.inputs import compute_dtype
from fused_margin._ops.library import register
from fused_margin._ops.nearest import cache, search
from fused_margin._ops.recomputation import current_age, recomputing
from fused_margin.distributed import named_shard


def _nearest_rows(
    query: Tensor, reference: Tensor | None, number: int, inner_product: bool, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosines or inner products (Q, number) of queries to their nearest references, and the rows of these.

    Without references, the other queries are searched.
    """
    dtype = compute_dtype(query, reference)
    with kernels_on(query.device) as run:
        result = search.find_nearest(run, query, reference, number, inner_product, workspace_bytes)
    return result.answers(dtype)


def _nearest_rows_fake(query, reference, number, *_):
    shape = (query.shape[0], number)
    return query.new_empty(shape, dtype=compute_dtype(query, reference)), query.new_empty(shape, dtype=torch.int64)


def _certified_nearest(
    weight: Tensor,
    code: Tensor,
    scale: Tensor,
    candidate: Tensor,
    value: Tensor,
    ceiling: Tensor,
    swept: Tensor,
    workspace_bytes: int,
    group: str,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Cosine (C,) float64 of every class to its nearest other class, and that class, with the cache of earlier steps."""
    swept = swept.clone() if recomputing() else swept  # so that a recomputed forward is not counted twice
    state = cache.NearestCache(code, scale, candidate, value, ceiling, swept)
    shard = named_shard(group, num_classes)
    with kernels_on(weight.device) as run:
        return cache.certified_nearest(run, shard, weight, state, workspace_bytes)


def _certified_nearest_fake(weight, *_):
    return weight.new_empty(weight.shape[0], dtype=torch.float64), weight.new_empty(weight.shape[0], dtype=torch.int64)


def _periodic_nearest(
    weight: Tensor,
    index: Tensor,
    age: Tensor,
    every: int,
    is_training: bool,
    workspace_bytes: int,
    group: str,
    num_classes: int,
) -> Tensor:
    """Cosine (C,) float64 of every class to `index`, its nearest other class in the last periodic search."""
    shard, age = named_shard(group, num_classes), current_age(age)
    with kernels_on(weight.device) as run:
        return cache.periodic_nearest(run, shard, weight, index, age, every, is_training, workspace_bytes)


def _periodic_nearest_fake(weight, *_):
    return weight.new_empty(weight.shape[0], dtype=torch.float64)


nearest_rows = register("nearest_rows", _nearest_rows, _nearest_rows_fake)
certified_nearest = register(
    "certified_nearest", _certified_nearest, _certified_nearest_fake, mutates=cache.NearestCache._fields
)
periodic_nearest = register("periodic_nearest", _periodic_nearest, _periodic_nearest_fake, mutates=("index", "age"))
