"""The exact search for nearest rows, and its certified refresh over training steps, against float64 matrices."""

import copy
import math
from pathlib import Path

import pytest
import torch
from loss_inputs import leaf, problem
from torch.nn import functional as F

import fused_margin as fm
from fused_margin._ops.backends.select import kernels_on
from fused_margin._ops.nearest import cache, quantized, search
from fused_margin.functional import NearestClass, nearest_class


@pytest.fixture(params=[True, False], ids=["int8", "float"])
def codes(request, monkeypatch):
    """Select candidates by int8 or by floating-point products on any machine."""
    for module in (quantized, cache):
        monkeypatch.setattr(module, "int8_is_fastest", lambda rows: request.param)
    return request.param


def similarities(query, reference, metric):
    query, reference = query.double(), reference.double()
    if metric == "cosine":
        query, reference = F.normalize(query), F.normalize(reference)
    return query @ reference.t()


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5), (301, 37, 45), (70, 1500, 64)], ids=str)
def test_top_k(codes, shape, dtype, metric):
    rows, others, size = shape
    torch.manual_seed(0)
    query = torch.randn(rows, size).to(dtype)
    for reference in (None, torch.randn(others, size).to(dtype)):
        expected = similarities(query, query if reference is None else reference, metric)
        if reference is None:
            expected.fill_diagonal_(-torch.inf)
        for k in (1, 2, 7, 32):
            if k > expected.shape[1] - (reference is None):
                continue
            value, index = expected.topk(k)
            actual = nearest_class(query, reference, k=k, metric=metric, workspace_mb=1)
            assert torch.equal(actual.index.view(rows, k), index)
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            torch.testing.assert_close(actual.cosine.double().view(rows, k), value, rtol=tolerance, atol=tolerance)


def test_ragged_tiles_and_strides(codes, monkeypatch):
    torch.manual_seed(1)
    query, reference = torch.randn(21, 300).t(), torch.randn(21, 211).t()
    index = similarities(query, reference, "cosine").topk(3).indices
    monkeypatch.setitem(quantized.SCORE_TILE_BYTES, "cpu", 1)  # tiles of 64 rows and columns
    actual = nearest_class(query, reference, k=3)
    assert torch.equal(actual.index, index)
    assert torch.equal(nearest_class(query).index, similarities(query, query, "cosine").fill_diagonal_(-1).argmax(1))


def test_references_that_differ_only_in_float64(codes):
    """A hundred references that neither float32 nor int8 products can order."""
    torch.manual_seed(2)
    direction, other = torch.randn(2, 64).double()
    reference = direction + 1e-5 * torch.randperm(100).unsqueeze(1).double() * other
    reference = torch.cat([torch.randn(500, 64).double(), reference]).float()
    query = direction.float().unsqueeze(0).repeat(3, 1)
    expected = similarities(query, reference, "cosine").topk(5)
    actual = nearest_class(query, reference, k=5)
    assert torch.equal(actual.index, expected.indices)


def test_ties_zero_rows_and_nan(codes):
    w = torch.randn(40, 8)
    w[[5, 9, 30]] = w[2].clone()
    w[[11, 12]] = 0.0
    w[0] = float("nan")
    actual = nearest_class(w, k=3)
    assert actual.index[5].tolist() == [2, 9, 30] and actual.index[2].tolist() == [5, 9, 30]
    assert actual.index[11].tolist() == [1, 2, 3] and (actual.cosine[11] == 0).all()  # not class 0, which is NaN
    assert actual.cosine[0].isnan().all() and not actual.cosine[1:].isnan().any()
    assert not (actual.index[1:] == 0).any()
    assert nearest_class(w).index[30] == 2
    actual = nearest_class(w, k=3, metric="inner_product")
    assert actual.cosine[0].isnan().all() and not actual.cosine[1:].isnan().any() and not (actual.index[1:] == 0).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: nearest_class(w, k=0), ValueError, "k: "),
        (lambda w: nearest_class(w, k=33), ValueError, "k: expected at most 9, got 33"),
        (lambda w: nearest_class(w, torch.randn(50, 4), k=33), ValueError, "k: expected at most 32, got 33"),
        (lambda w: nearest_class(w, torch.randn(5, 3)), ValueError, "reference: expected shape .R, 4."),
        (lambda w: nearest_class(w, torch.randn(0, 4)), ValueError, "reference"),
        (lambda w: nearest_class(w, [1]), TypeError, "reference"),
        (lambda w: nearest_class(w, metric="dot"), ValueError, "metric: expected one of 'cosine', 'inner_product'"),
        (lambda w: fm.ExclusiveRegularizer(refresh="never"), ValueError, "refresh: expected one of"),
        (lambda w: fm.ExclusiveRegularizer(refresh=0), ValueError, "refresh"),
        (lambda w: fm.ExclusiveRegularizer(refresh=2.5), TypeError, "refresh"),
        (lambda w: fm.ArcFaceLoss(5, 3, exclusive_refresh="x"), ValueError, "exclusive_refresh"),
        (
            lambda w: fm.functional.exclusive_regularization(w, nearest=NearestClass(w[:, 0], torch.arange(10) + 1)),
            ValueError,
            "got 10",
        ),
        (
            lambda w: fm.functional.exclusive_regularization(w, nearest=NearestClass(w[:3, 0], torch.arange(10))),
            ValueError,
            "nearest.cosine",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(10, 4))


def training(classes, size, steps, seed=0):
    """Class weights during training with momentum, weight decay and projection, with few classes in each step."""
    torch.manual_seed(seed)
    centers = torch.randn(-(-classes // 8), size).repeat_interleave(8, 0)[:classes]
    weight = leaf(centers + 0.7 * torch.randn(classes, size))
    optimizer = fm.optim.ProjectedSGD([weight], lr=0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        yield step, weight.detach()
        weight.grad = torch.zeros_like(weight)
        weight.grad[torch.randint(classes, (6,))] = torch.randn(6, size)
        weight.grad += 1e-3 * torch.randn_like(weight)
        optimizer.step()


def full_search(weight):
    """A full search in float64, as for the certified refresh."""
    with kernels_on(weight.device) as run:
        result = search.find_nearest(run, weight, None, 1, False, 1 << 22)
    return NearestClass(*(answer.squeeze(1) for answer in result.answers(torch.float64)))


def same(actual, expected):
    """Whether two results are equal bit for bit."""
    equal = (actual.cosine == expected.cosine) | (actual.cosine.isnan() & expected.cosine.isnan())
    return bool(equal.all()) and torch.equal(actual.index, expected.index)


@pytest.mark.parametrize("steps", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_certified_equals_full_search(codes, steps):
    regularizer, stale = fm.ExclusiveRegularizer(refresh="certified"), fm.ExclusiveRegularizer(refresh=10**6)
    changed = 0
    for _, weight in training(800, 48, steps):
        expected, actual = full_search(weight), regularizer.find(weight)
        assert same(actual, expected)
        assert torch.equal(actual.cosine.float(), nearest_class(weight).cosine)
        changed += int((stale.find(weight).index != expected.index).sum())
    assert changed > 2.5 * steps  # neighbors change
    searched, skipped, full = regularizer.swept.tolist()
    assert skipped > 4 * searched and full < 10


def test_two_classes_that_rotate_towards_each_other(codes, monkeypatch):
    """Each rotates by less than the gap between candidates and other classes, both together by more."""
    monkeypatch.setattr(cache, "CANDIDATES", 1)

    def classes(degrees):
        one, two, turned = (math.radians(angle) for angle in (50.0, 60.0 - degrees, degrees))
        first = [math.cos(turned), 0.0, math.sin(turned), 0.0]
        candidate = [math.cos(one), math.sin(one), 0.0, 0.0]
        nearer = [math.cos(two), 0.0, math.sin(two), 0.0]
        return torch.tensor([first, candidate, nearer, [0.475, 0.0, 0.8227, 0.3122]])

    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    assert regularizer.find(classes(0.0)).index.tolist() == [1, 0, 3, 2]
    actual = regularizer.find(classes(6.0))
    assert actual.index[0] == 2 and same(actual, full_search(classes(6.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_certified_of_other_dtypes(codes, dtype):
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    for _, weight in training(304, 20, 40):
        assert same(regularizer.find(weight.to(dtype)), full_search(weight.to(dtype)))


def test_certified_after_arbitrary_weight_changes(codes):
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    for step, weight in training(400, 32, 60):
        if step == 10:
            weight[7] = float("nan")
        if step == 20:
            weight[7], weight[8], weight[9] = weight[3].clone(), 0.0, weight[3].clone()
        if step == 30:
            weight.copy_(torch.randn_like(weight))  # not by the optimizer
        if step == 40:
            weight.mul_(torch.rand(400, 1) * 1e3 + 1e-3)  # cosines do not change
        assert same(regularizer.find(weight), full_search(weight))


def test_number_of_threads(codes):
    weights = [weight.clone() for _, weight in training(2000, 48, 4)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            regularizer = fm.ExclusiveRegularizer(refresh="certified")
            results.append([nearest_class(weights[0], k=3), *(regularizer.find(weight) for weight in weights)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(same(actual, expected) for actual, expected in zip(other, results[0], strict=True))


def test_state_dict_and_deepcopy(codes):
    regularizer = fm.ExclusiveRegularizer(refresh="certified")
    steps = [(step, weight.clone()) for step, weight in training(400, 32, 30)]
    for _, weight in steps[:20]:
        regularizer.find(weight)
    resumed = fm.ExclusiveRegularizer(refresh="certified")
    resumed.load_state_dict(regularizer.state_dict())
    copied = copy.deepcopy(regularizer)
    for _, weight in steps[20:]:
        expected = regularizer.find(weight)
        for other in (resumed, copied):
            assert same(other.find(weight), expected)
    assert torch.equal(resumed.swept, regularizer.swept) and torch.equal(copied.swept, regularizer.swept)
    assert regularizer.swept[2] == 1
    resumed.load_state_dict({})  # a checkpoint from before the option was set
    assert same(resumed.find(weight), full_search(weight)) and resumed.swept.tolist() == [400, 0, 1]
    smaller = torch.randn(50, 32)
    assert same(resumed.find(smaller), full_search(smaller))
    assert resumed.half().find(smaller) is not None and resumed.value.dtype == torch.float32


def test_periodic_refresh():
    regularizer = fm.ExclusiveRegularizer(refresh=5)
    for step, weight in training(200, 16, 12):
        actual = regularizer.find(weight)
        if step % 5 == 0:
            index = nearest_class(weight).index
        unit = F.normalize(weight.double())
        assert torch.equal(actual.index, index)
        torch.testing.assert_close(actual.cosine, (unit * unit[index]).sum(1), rtol=0, atol=1e-12)
    age = regularizer.age.clone()
    regularizer.eval().find(weight)
    assert torch.equal(regularizer.age, age)


@pytest.mark.parametrize("kind", [fm.ArcFaceLoss, fm.SoftmaxLoss], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("backend", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_losses(codes, kind, backend):
    x, w, y = (t.float() if t.is_floating_point() else t for t in problem(9, 120, 16))
    plain = kind(120, 16, exclusive_weight=3.0)
    certified = kind(120, 16, exclusive_weight=3.0, exclusive_refresh="certified")
    with torch.no_grad():
        plain.weight.copy_(w)
    certified.load_state_dict(plain.state_dict())
    call = torch.compile(certified, fullgraph=True, backend=backend) if backend else certified
    for _ in range(3):
        for loss_fn, forward in ((plain, plain), (certified, call)):
            loss_fn.zero_grad()
            forward(x, y).backward()
            torch.optim.SGD(loss_fn.parameters(), lr=0.1).step()
        assert torch.equal(plain.weight.grad, certified.weight.grad)
    assert certified.exclusive.swept[1] > 0


def test_sampled_classes():
    loss_fn = fm.ArcFaceLoss(60, 8, exclusive_weight=1.0, exclusive_refresh="certified", sample_rate=0.5)
    without = fm.ArcFaceLoss(60, 8, sample_rate=0.5)
    without.weight = loss_fn.weight
    x, y = torch.randn(5, 8), torch.arange(5)
    losses = []
    for loss in (loss_fn, without):
        torch.manual_seed(0)
        losses.append(loss(x, y))
    torch.testing.assert_close(losses[0] - losses[1], nearest_class(loss_fn.weight).cosine.mean(), rtol=0, atol=1e-4)


def test_opcheck():
    weight = torch.randn(30, 6)
    torch.library.opcheck(torch.ops.fused_margin.nearest_rows, (weight, torch.randn(9, 6), 3, True, 1 << 20))
    state = cache.new_cache(weight, len(weight))
    torch.library.opcheck(torch.ops.fused_margin.certified_nearest, (weight, *state, 1 << 20, "", len(weight)))
    index, age = torch.zeros(30, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.fused_margin.periodic_nearest, (weight, index, age, 3, True, 1 << 20, "", len(weight))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [2, 3, 17, 129, 2049])
def test_rows_with_one_element(classes, dtype):
    """Cosines are 1 or -1 for any previous content of memory."""
    weight = torch.randn(classes, 1, dtype=dtype)
    used = torch.full((1 << 16,), -7, dtype=torch.int32)  # memory that the allocator will reuse
    del used
    cosine = fm.functional.nearest_class(weight).cosine
    sign = weight.sign().flatten()
    expected = (sign[:, None] * sign).fill_diagonal_(-2.0).amax(1)
    assert torch.equal(cosine, expected)


@pytest.mark.parametrize("size", [2.0**90, 2.0**300, 2.0**500])
def test_large_rows_with_one_element(size):
    weight = torch.randn(30, 1, dtype=torch.float64) * size
    sign = weight.sign().flatten()
    expected = (sign[:, None] * sign).fill_diagonal_(-2.0).amax(1)
    assert torch.equal(fm.functional.nearest_class(weight).cosine, expected)


def test_int8_products_of_torch_are_correct():
    """They are a private function of torch: where it changes, the search does not use it, and this test fails."""
    assert quantized.int8_products_are_right()


def test_processors_with_int8_instructions_are_detected():
    """Detection relies on a private function of torch; where it changes, the search is slower, and this test fails."""
    processor = Path("/proc/cpuinfo")
    if not (processor.exists() and "avx512_vnni" in processor.read_text(encoding="utf-8")):
        pytest.skip("the processor has no AVX512-VNNI, or does not report it")
    assert quantized.int8_is_fastest(torch.ones(3, 64))


def test_wrong_int8_products_are_not_used(monkeypatch):
    quantized.int8_products_are_right.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", lambda left, right, out: out)
    try:
        assert not quantized.int8_products_are_right() and not quantized.int8_is_fastest(torch.ones(3, 64))
        weight = torch.randn(70, 16)
        assert torch.equal(fm.functional.nearest_class(weight).index, fm.reference.nearest_class(weight.double())[1])
    finally:
        quantized.int8_products_are_right.cache_clear()


@pytest.mark.parametrize("size", [1, 3, quantized.INT8_SIZES.stop])
def test_certified_refresh_of_sizes_without_int8(size):
    weight = torch.randn(4, size)
    actual = fm.ExclusiveRegularizer(refresh="certified").find(weight)
    assert torch.equal(actual.index, fm.reference.nearest_class(weight.double())[1])


@pytest.mark.parametrize(("refresh", "buffer"), [(3, "index"), ("certified", "candidate")])
def test_damaged_cache_is_not_loaded(refresh, buffer):
    loss_fn = fm.ArcFaceLoss(40, 8, exclusive_weight=1.0, exclusive_refresh=refresh)
    loss_fn(torch.randn(3, 8), torch.arange(3))
    state = loss_fn.state_dict()
    state[f"exclusive.{buffer}"] = state[f"exclusive.{buffer}"] + 1000
    with pytest.raises(RuntimeError, match=rf"exclusive.{buffer}: expected classes in \[0, 40\)"):
        loss_fn.load_state_dict(state)


def test_index_that_is_no_class_is_an_error():
    loss_fn = fm.ArcFaceLoss(40, 8, exclusive_weight=1.0, exclusive_refresh=3)
    x, y = torch.randn(3, 8), torch.arange(3)
    loss_fn(x, y)
    loss_fn.exclusive.index[7] = 40
    with pytest.raises(ValueError, match=r"exclusive.index: expected classes in \[0, 40\), got 40"):
        loss_fn(x, y)
