"""Cached nearest classes where classes are divided among ranks: equal bit for bit to those of one device."""

import copy
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from loss_inputs import problem, relative_error
from ranks import MAX_RANKS, RankError
from test_search import full_search, same, training
from torch.nn import functional as F

import fused_margin as fm
from fused_margin._ops.backends.select import kernels
from fused_margin._ops.forward_backward import forward_chunks
from fused_margin._ops.inputs import PORTABLE, LossInputs
from fused_margin._ops.nearest import cache, quantized, search, tiles
from fused_margin.distributed import Shard, slice_of
from fused_margin.functional import NearestClass, exclusive_regularization, nearest_class


@pytest.fixture(params=[True, False], ids=["int8", "float"])
def int8(request):
    return request.param


@contextmanager
def with_codes(int8):
    """Select candidates by int8 or by floating-point products on any machine; remote blocks have few rows."""
    with (
        patch.object(quantized, "int8_is_fastest", lambda rows: int8),
        patch.object(cache, "int8_is_fastest", lambda rows: int8),
        patch.object(search, "MIN_CHUNK", 1),
    ):
        yield


def short_lists(capacity):
    """Limit candidate lists to this capacity; None: the default."""
    if capacity is None:
        return nullcontext()
    return patch.object(cache, "capacity_for", lambda _: capacity)


def find_on_rank(group, int8, refresh, weights, dtype=torch.float32, workspace_mb=256, capacity=None):
    """The results and the counts of this rank's regularizer for all the weights."""
    classes = len(weights[0])
    regularizer = fm.ExclusiveRegularizer(refresh=refresh, shard=Shard(classes, group), workspace_mb=workspace_mb)
    begin, end = slice_of(classes, group.rank(), group.size())
    with with_codes(int8), short_lists(capacity):
        results = [tuple(regularizer.find(weight[begin:end].to(dtype))) for weight in weights]
    return results, regularizer.swept.tolist() if refresh == "certified" else None


def concatenate(results, step):
    """Concatenate the results of all ranks."""
    return NearestClass(*(torch.cat([result[step][k] for result, _ in results]) for k in (0, 1)))


def compare(ranks, world_size, int8, weights, dtype=torch.float32, workspace_mb=256, capacity=None):
    results = ranks.run(find_on_rank, [(int8, "certified", weights, dtype, workspace_mb, capacity)] * world_size)
    for step, weight in enumerate(weights):
        assert same(concatenate(results, step), full_search(weight.to(dtype))), step
    assert all(swept == results[0][1] for _, swept in results)
    return results[0][1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("steps", [25, pytest.param(80, marks=pytest.mark.slow)])
def test_certified_equals_full_search_on_one_device(ranks, world_size, int8, steps):
    weights = [weight.clone() for _, weight in training(500, 48, steps)]  # 500 = 167 + 167 + 166
    searched, skipped, full = compare(ranks, world_size, int8, weights)
    assert searched + skipped == 500 * steps and skipped > 3 * searched and full < 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_certified_of_other_dtypes(ranks, int8, dtype):
    weights = [weight.clone() for _, weight in training(304, 20, 10)]
    compare(ranks, 3, int8, weights, dtype, workspace_mb=1e-3)  # and tiles of 64 rows


def test_certified_after_arbitrary_weight_changes(ranks, int8):
    weights = []
    for step, weight in training(400, 32, 25):
        if step == 5:
            weight[7] = float("nan")
            weight[300] = float("nan")
        if step == 10:  # ties between ranks, and zero rows
            weight[[7, 150, 399]], weight[[0, 8, 210]] = weight[3].clone(), 0.0
        if step == 15:
            weight.copy_(torch.randn_like(weight))  # not by the optimizer
        if step == 20:
            weight.mul_(torch.rand(400, 1) * 1e3 + 1e-3)  # cosines do not change
        weights.append(weight.clone())
    assert compare(ranks, 3, int8, weights)[1] > 0


@pytest.mark.parametrize("capacity", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_short_lists(ranks, int8, capacity):
    """Bounds come from products outside the lists, and near-duplicates, which codes cannot separate, stay undecided."""
    apart = 3e-3 if int8 else 3e-7
    weight = torch.randn(304, 48)
    weight[200:240] = weight[100:140] + apart * torch.randn(40, 48)
    weight[300:] = weight[120:124] + apart * torch.randn(4, 48)
    weights, last = [weight], 0
    for _ in range(25):
        weight = weights[-1].clone()
        moved, near = torch.randint(304, (2, 4))
        moved[3] = full_search(weight).index[last]  # the nearest class of the row that moved last moves away
        last = int(moved[2])
        weight[moved[:2]] = weight[near[0]] + apart * torch.randn(2, 48)
        weight[moved[2:]] = weight[near[2:]] + 1.5 * torch.randn(2, 48)
        weights.append(weight)
    searched, skipped, full = compare(ranks, 3, int8, weights, capacity=capacity)
    assert capacity == 1 or skipped > searched > full * 304


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(ranks, int8, classes):
    """Ranks with one class, or none."""
    for world_size in range(1, MAX_RANKS + 1):
        weights = [torch.randn(classes, 6) for _ in range(3)]
        weights += [weights[-1] + 1e-4, torch.eye(6)[[k % 2 for k in range(classes)]], torch.zeros(classes, 6)]
        weights[-1][-1] = float("nan")
        weights += [torch.full((classes, 6), float("nan"))]
        compare(ranks, world_size, int8, weights)


def search_every_step(group, int8, weights):
    run, exact, rounded = kernels("cpu"), [], []
    for weight in weights:
        shard = Shard(len(weight), group)
        own = weight[shard.begin : shard.begin + shard.size]
        with with_codes(int8):
            exact.append(search.find_nearest_others(run, shard, own, 1 << 22))
        inputs = LossInputs(None, own, 1 << 22, PORTABLE, nearest=True, group=shard.name, num_classes=len(weight))
        rounded.append(tiles.find_by_tiles(run, shard, inputs, forward_chunks))
    return (exact, None), (rounded, None)


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_every_step(ranks, int8, world_size):
    """The search is exact on the CPU; the tiled search of CUDA devices compares rounded products."""
    weights = [torch.randn(203, 24), torch.eye(5)[torch.arange(3) % 5], torch.eye(5)[torch.arange(31) % 5]]
    results = ranks.run(search_every_step, [(int8, weights)] * world_size)
    for step, weight in enumerate(weights):
        expected = full_search(weight)
        assert same(concatenate([exact for exact, _ in results], step), expected)
        rounded = concatenate([rounded for _, rounded in results], step)
        assert torch.equal(rounded.index, expected.index)
        torch.testing.assert_close(rounded.cosine.double(), expected.cosine, rtol=0, atol=1e-6)


def test_periodic_refresh(ranks):
    weights = [weight.clone() for _, weight in training(200, 16, 12)]
    results = ranks.run(find_on_rank, [(False, 5, weights)] * 3)
    for step, weight in enumerate(weights):
        actual = concatenate(results, step)
        if step % 5 == 0:
            index = nearest_class(weight).index
        unit = F.normalize(weight.double())
        assert torch.equal(actual.index, index)
        torch.testing.assert_close(actual.cosine, (unit * unit[index]).sum(1), rtol=0, atol=1e-12)
        one = cache.cosines_with(kernels("cpu"), Shard(len(weight)), weight, index)
        assert torch.equal(actual.cosine, one)


def ranks_with_different_state(group, weights):
    """One rank loses its cache, and another returns to an earlier copy of its own."""
    classes = len(weights[0])
    certified = fm.ExclusiveRegularizer(refresh="certified", shard=Shard(classes, group))
    periodic = fm.ExclusiveRegularizer(refresh=100, shard=Shard(classes, group))
    begin, end = slice_of(classes, group.rank(), group.size())
    neighbors, steps, late = [], [], []
    for step, weight in enumerate(weights):
        if step == 4:
            old = copy.deepcopy(certified)
        if step == 6 and group.rank() == 0:
            certified = fm.ExclusiveRegularizer(refresh="certified", shard=Shard(classes, group))
            periodic.load_state_dict({"index": torch.zeros(3), "age": torch.ones(1)})
        if step == 8 and group.rank() == 1:
            certified = old
        neighbors.append(tuple(certified.find(weight[begin:end])))
        late.append(tuple(periodic.find(weight[begin:end])))
        steps.append(int(certified.swept[:2].sum()) / classes)
    assert not certified.state_dict() and not periodic.state_dict()
    return (neighbors, None), (late, None), steps


def test_rank_that_has_lost_its_state(ranks):
    weights = [weight.clone() for _, weight in training(304, 24, 10)]
    results = ranks.run(ranks_with_different_state, [(weights,)] * 2)
    for step, weight in enumerate(weights):
        assert same(concatenate([actual for actual, *_ in results], step), full_search(weight))
        index = full_search(weights[0 if step < 6 else 6]).index
        assert torch.equal(concatenate([late for _, late, _ in results], step).index, index)
    for *_, steps in results:
        assert steps == [1, 2, 3, 4, 5, 6, 1, 2, 1, 2]  # restarted at steps 0, 6 and 8


def other_rows(group, size):
    shard = Shard(10, group)
    fm.ExclusiveRegularizer(refresh="certified", shard=shard)(torch.randn(shard.size, size))


def test_different_rows_raise_on_every_rank(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(other_rows, [(4,), (5,)])
    for rank in (0, 1):
        assert (
            f"rank {rank}: ValueError: weight: expected the same on all ranks, got embedding_size 4, torch.float32"
            in str(caught.value)
        )


def train(group, kind, refresh, weight, batches, folder=None, rate=1.0):
    """Losses and gradients of a few steps, and the state after them."""
    loss_fn = kind(
        len(weight), weight.shape[1], process_group=group, exclusive_weight=3.0, exclusive_refresh=refresh,
        dtype=torch.float64, sample_rate=rate,
    )  # fmt: skip
    own = slice(loss_fn.shard.begin, loss_fn.shard.begin + loss_fn.shard.size)
    with torch.no_grad():
        loss_fn.weight.copy_(weight[own])
    results = []
    for x, y in batches:
        loss_fn.zero_grad()
        torch.manual_seed(0)
        loss = loss_fn(x, y)
        loss.backward()
        results.append((loss.item(), loss_fn.weight.grad.to_dense().clone()))
        torch.optim.SGD(loss_fn.parameters(), lr=0.05).step()
    swept = loss_fn.exclusive.swept.tolist() if refresh == "certified" else None
    if folder is not None:
        dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=folder, process_group=group)
    return results, swept, loss_fn.state_dict()


@pytest.mark.parametrize("kind", [fm.ArcFaceLoss, fm.SoftmaxLoss], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("refresh", "rate"), [("certified", 1.0), (1, 1.0), ("certified", 0.5)])
def test_losses(ranks, kind, refresh, rate):
    weight = torch.randn(120, 16, dtype=torch.float64)
    batches = [problem(9, 120, 16, seed=seed)[::2] for seed in range(4)]
    parts = [[(x[k::2], y[k::2]) for x, y in batches] for k in (0, 1)]
    certified = ranks.run(train, [(kind, refresh, weight, part, None, rate) for part in parts])
    plain = ranks.run(train, [(kind, "every_step", weight, part, None, rate) for part in parts])
    for (actual, swept, _), (expected, *_) in zip(certified, plain, strict=True):
        for (loss, gradient), (other, other_gradient) in zip(actual, expected, strict=True):
            assert loss == pytest.approx(other, rel=1e-12)
            assert relative_error(gradient, other_gradient) < 1e-12
        assert refresh != "certified" or swept[1] > 0


def step_with_damaged_index(group):
    """The error of a step after the last rank's index of nearest classes was damaged."""
    loss_fn = fm.ArcFaceLoss(9, 4, process_group=group, exclusive_weight=1.0, exclusive_refresh=3)
    x, y = torch.randn(2, 4), torch.tensor([0, 8])
    loss_fn(x, y)
    if group.rank() == group.size() - 1:
        loss_fn.exclusive.index[0] = -4
    with pytest.raises(ValueError, match=r"exclusive.index: expected classes in \[0, 9\), got -4") as caught:
        loss_fn(x, y)
    return str(caught.value)


def test_damaged_index_raises_on_every_rank(ranks):
    assert len(ranks.run(step_with_damaged_index, [()] * 3)) == 3


def load_and_evaluate(group, folder, classes, states, refresh):
    """Exclusive terms after loading a checkpoint of other ranks, and the state dict of one device."""
    loss_fn = fm.ArcFaceLoss(classes, 16, process_group=group, exclusive_weight=1.0, exclusive_refresh=refresh)
    loss_fn = loss_fn.double()
    own = slice(loss_fn.shard.begin, loss_fn.shard.begin + loss_fn.shard.size)
    terms = []
    for _ in range(2):
        dcp.load(loss_fn.sharded_state_dict(), checkpoint_id=folder, process_group=group)
        terms.append(loss_fn.exclusive(loss_fn.weight).item())
        state = {name: value[own] if name == "weight" else value for name, value in states.items()}
        loss_fn.load_state_dict(state)
        terms.append(loss_fn.exclusive(loss_fn.weight).item())
    return terms


@pytest.mark.parametrize("refresh", ["certified", 3])
def test_state_loads_on_other_numbers_of_ranks(ranks, tmp_path, refresh):
    weight = torch.randn(122, 16, dtype=torch.float64)
    batches = [problem(6, 122, 16, seed=seed)[::2] for seed in range(2)]
    saved = ranks.run(
        train,
        [(fm.ArcFaceLoss, refresh, weight, [(x[k::3], y[k::3]) for x, y in batches], tmp_path) for k in range(3)],
    )
    assert all(list(state) == ["weight"] for *_, state in saved)
    full = torch.cat([state["weight"] for *_, state in saved])
    one = fm.ArcFaceLoss(122, 16, exclusive_weight=1.0, exclusive_refresh=refresh, dtype=torch.float64)
    one.load_state_dict({"weight": torch.randn(122, 16)})
    one.exclusive(one.weight)
    states = one.state_dict()
    assert len(states) > 1
    for world_size in (1, 2, 3):
        for terms in ranks.run(load_and_evaluate, [(tmp_path, 122, states, refresh)] * world_size):
            for term, weights in zip(terms, [full, states["weight"]] * 2, strict=True):
                if refresh == "certified":
                    assert term == pytest.approx(exclusive_regularization(weights).item(), rel=1e-12)
    dcp.load(one.sharded_state_dict(), checkpoint_id=tmp_path)  # also on one device
    assert torch.equal(one.weight, full)
    if refresh == "certified":
        assert same(one.exclusive.find(one.weight), full_search(full))
