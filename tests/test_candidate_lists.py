"""Candidate lists without an order, which the exact search uses on the CPU for many neighbors."""

import pytest
import torch

import fused_margin.functional as F
from fused_margin import _C
from fused_margin._ops.nearest.quantized import CandidateLists, search_lists
from fused_margin.nearest import NearestIndex

CPU = torch.device("cpu")


def update(products, rows, columns, tile_columns):
    """Insert products (Q, R) into the lists of rows and of columns, in tiles of some columns."""
    queries, references = products.shape
    for begin in range(0, references, tile_columns):
        tile = products[:, begin : begin + tile_columns].contiguous()
        _C.cpu.update_candidates(
            0, scores=tile, row_index=None, row_begin=0, row_id=None, column_begin=begin, column_first_id=0,
            same_set=False, row_scale=torch.ones(queries), column_scale=torch.ones(references),
            row_candidates=rows.arguments(), column_candidates=columns.arguments(), refreshed=None,
        )  # fmt: skip


def check(lists, products, capacity):
    """Every product is in the list of its row, or not above the upper bound; the list has half of its capacity."""
    for row, own in enumerate(products):
        count = lists.count[row]
        entries, values = lists.candidate[row, :count].long(), lists.value[row, :count]
        assert torch.equal(values, own[entries]) and len(entries.unique()) == count
        assert min(len(own), capacity // 2) <= count <= capacity
        left_out = torch.ones(len(own), dtype=torch.bool).index_fill_(0, entries, False)
        assert (own[left_out] <= lists.upper_bound[row]).all()
        # The bound is tight: so many entries are not below it.
        assert (values >= lists.upper_bound[row]).sum() >= min(len(own), capacity // 2)


@pytest.mark.parametrize("levels", [1, 2, 7, 10**6])
@pytest.mark.parametrize("capacity", [1, 2, 64, 301])
def test_lists_hold_the_largest_products(levels, capacity):
    """With few levels most products are equal."""
    generator = torch.Generator().manual_seed(capacity)
    products = torch.randint(-levels, levels, (37, 1000), generator=generator).float()
    products[0], products[1] = products[0].sort().values, products[1].sort(descending=True).values
    rows = CandidateLists.empty(37, capacity, CPU, ordered=False)
    columns = CandidateLists.empty(1000, min(capacity, 20), CPU, ordered=False)
    update(products, rows, columns, 333)
    check(rows, products, capacity)
    check(columns, products.t().contiguous(), min(capacity, 20))


@pytest.mark.parametrize("same_set", [False, True])
@pytest.mark.parametrize("k", [2, 9, 32])
def test_search_with_long_lists_is_exact(k, same_set):
    """Clustered rows, repeated rows and zero rows, in float64 by brute force."""
    generator = torch.Generator().manual_seed(k)
    centers = torch.randn(12, 24, generator=generator)
    reference = centers[torch.arange(900) % 12] + 0.05 * torch.randn(900, 24, generator=generator)
    reference[100:160] = reference[0]
    reference[7] = 0.0
    query = reference if same_set else reference[::9] + 0.01
    found = F.nearest_class(query, None if same_set else reference, k=k)
    unit = torch.nn.functional.normalize(reference.double(), dim=1)
    cosine = torch.nn.functional.normalize(query.double(), dim=1) @ unit.t()
    if same_set:
        cosine.fill_diagonal_(-2.0)
    torch.testing.assert_close(found.cosine.double(), cosine.topk(k).values, rtol=0, atol=2e-7)
    torch.testing.assert_close(cosine.gather(1, found.index), cosine.topk(k).values, rtol=0, atol=1e-12)
    assert all(len(row.unique()) == k for row in found.index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_index_of_blocks_of_queries(dtype):
    generator = torch.Generator().manual_seed(0)
    reference, query = (torch.randn(n, 40, generator=generator, dtype=dtype) for n in (700, 90))
    reference[13] = reference[400]
    query[2] = reference[13]
    index = NearestIndex(reference, workspace_mb=1.0)
    found = [index.search(block, 5) for block in query.split(37)]
    cosine, row = (torch.cat(parts) for parts in zip(*found, strict=True))
    unit = [torch.nn.functional.normalize(rows.double(), dim=1) for rows in (query, reference)]
    # One product per reference, so that equal references have equal cosines.
    products = torch.stack([(unit[0] * other).sum(1) for other in unit[1]], dim=1)
    expected = products.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(cosine, expected.values[:, :5], rtol=0, atol=1e-14)
    assert torch.equal(row, expected.indices[:, :5])
    assert row[2, :2].tolist() == [13, 400] and cosine[2, 0] == cosine[2, 1]


def test_lists_fit_in_the_workspace():
    lists = search_lists(10_000, 32, 1_000_000, True, CPU, workspace_bytes=8 << 20)
    assert lists.candidate.numel() * 8 <= 8 << 20
    assert search_lists(10, 32, 1_000_000, True, CPU, workspace_bytes=8 << 20).candidate.shape[1] > 2 * 32
