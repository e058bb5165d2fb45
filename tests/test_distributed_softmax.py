"""Losses over inner products with classes divided among ranks: the loss and gradients match one device."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from divided_classes import SAMPLE_COUNTS, check_losses, draw_division
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import leaf, problem, relative_error
from ranks import MAX_RANKS, RankError

import fused_margin as fm
from fused_margin.commands.consolidate import main as consolidate
from fused_margin.distributed import Shard, slice_of
from fused_margin.functional import linear_cross_entropy


def one_rank(group, num_classes, x, weight, y, bias, margin, upstream, options):
    """Loss and gradients of one rank's samples and classes."""
    x, weight, bias = leaf(x), leaf(weight), None if bias is None else leaf(bias)
    shard = None if num_classes is None else Shard(num_classes, group)
    loss = linear_cross_entropy(x, weight, y, bias, margin, shard=shard, **options)
    loss.backward(upstream if upstream is not None else torch.ones_like(loss))
    return loss.detach(), x.grad, weight.grad, None if bias is None else bias.grad


def compare(ranks, world_size, counts, num_classes, size, *, bias=True, margin=None, upstream=None, seed=0, **options):
    """Compare `world_size` ranks with one device; `counts` has the number of samples of each rank."""
    x, w, y = problem(sum(counts), num_classes, size, seed=seed, spread=2.0)
    if len(y) > 4:
        y[3] = -100
    if bias is True:
        bias = torch.randn(num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = one_rank(None, None, x, w, y, bias, margin, upstream, options)
    samples, arguments = torch.arange(len(y)).split(counts), []
    for rank, own in enumerate(samples):
        begin, end = slice_of(num_classes, rank, world_size)
        own_bias = None if bias is None else bias[begin:end]
        own_upstream = None if upstream is None else upstream[own]
        arguments.append((num_classes, x[own], w[begin:end], y[own], own_bias, margin, own_upstream, options))
    results = ranks.run(one_rank, arguments)
    check_losses(results, expected[0], options.get("reduction"))
    for k in range(1, 4 if bias is not None else 3):  # the gradient of a single class is 0 up to rounding
        torch.testing.assert_close(torch.cat([r[k] for r in results]), expected[k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("world_size", range(1, MAX_RANKS + 1))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("margin", [None, fm.Margin(m1=4.0)], ids=["softmax", "L-softmax"])
def test_reductions(ranks, world_size, reduction, margin):
    counts = [5, 3, 0, 9][:world_size]  # a rank without samples
    upstream = torch.randn(sum(counts), dtype=torch.float64) if reduction == "none" else None
    compare(ranks, world_size, counts, 103, 7, margin=margin, reduction=reduction, upstream=upstream)


PER_CLASS, ANNEALED = torch.rand(103, dtype=torch.float64), fm.Margin(m1=2.5, annealing=5.0)
CASES = {
    "no bias": {"bias": None},
    "class weights": {"class_weight": PER_CLASS},
    "smoothing": {"label_smoothing": 0.3},
    "smoothing, no bias": {"label_smoothing": 0.3, "bias": None},
    "full smoothing": {"label_smoothing": 1.0},
    "class weights and smoothing": {"label_smoothing": 0.1, "class_weight": PER_CLASS},
    "L-softmax, no bias": {"margin": ANNEALED, "bias": None},
    "L-softmax, class weights": {"margin": ANNEALED, "class_weight": PER_CLASS},
    "logits far from zero": {"bias": torch.linspace(-9e3, 9e3, 103, dtype=torch.float64)},
    "small workspace": {"workspace_mb": 1e-6},
    "L-softmax, small workspace": {"workspace_mb": 1e-6, "margin": ANNEALED},
    "per-sample upstream gradients": {"reduction": "none", "label_smoothing": 0.2, "upstream": torch.rand(17).double()},
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_options(ranks, world_size, case):
    compare(ranks, world_size, SAMPLE_COUNTS[world_size], 103, 7, **CASES[case])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_division_of_classes_and_samples(ranks, data):
    counts, num_classes = draw_division(data)
    margin = data.draw(st.sampled_from([None, fm.Margin(m1=3.0)]))
    smoothing = data.draw(st.sampled_from([0.0, 0.2])) if margin is None else 0.0
    size, seed = data.draw(st.integers(2, 9)), data.draw(st.integers(0, 99))
    compare(ranks, len(counts), counts, num_classes, size, seed=seed, margin=margin, label_smoothing=smoothing)


def test_zero_rows(ranks):
    """A zero embedding, and a zero class weight of a target."""
    x, w, y = problem(8, 11, 5, spread=1.0)
    x[2], w[y[5]] = 0, 0
    expected = one_rank(None, None, x, w, y, None, fm.Margin(m1=4.0), None, {})
    halves = [(11, x[:3], w[:6], y[:3]), (11, x[3:], w[6:], y[3:])]
    results = ranks.run(one_rank, [(*own, None, fm.Margin(m1=4.0), None, {}) for own in halves])
    for k in (1, 2):
        assert expected[k].isfinite().all()
        torch.testing.assert_close(torch.cat([r[k] for r in results]), expected[k], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("margin", [None, fm.Margin(m1=4.0)], ids=["softmax", "L-softmax"])
def test_gradients_have_the_dtype_of_the_parameters(ranks, dtype, margin):
    x, w, y = problem(12, 40, 9, spread=1.0)
    bias = torch.randn(40)
    x, w, bias = x.float(), w.to(dtype), bias.to(dtype)
    expected = one_rank(None, None, x.double(), w.double(), y, bias.double(), margin, None, {})
    halves = [(40, x[:7], w[:20], y[:7], bias[:20]), (40, x[7:], w[20:], y[7:], bias[20:])]
    results = ranks.run(one_rank, [(*own, margin, None, {}) for own in halves])
    for k, kind in ((1, torch.float32), (2, dtype), (3, dtype)):
        actual = torch.cat([r[k] for r in results])
        assert actual.dtype == kind and relative_error(actual, expected[k]) < 8 * torch.finfo(kind).eps


def bias_gradient(group, x, w, y, bias):
    bias = leaf(bias)
    fm.functional.linear_cross_entropy(x, w, y, bias, shard=Shard(4, group)).backward()
    return bias.grad


def test_gradient_of_a_half_bias_is_rounded_once(ranks):
    """Over many samples, the contribution of targets and that of other classes nearly cancel."""
    dtype = torch.bfloat16
    x, w, y = torch.randn(65536, 16).to(dtype), (torch.randn(4, 16) * 0.1).to(dtype), torch.randint(4, (65536,))
    exact = leaf(torch.zeros(4), torch.float64)
    fm.functional.linear_cross_entropy(x.double(), w.double(), y, exact).backward()
    halves = [(x[rank::2], w[2 * rank :][:2], y[rank::2], torch.zeros(2, dtype=dtype)) for rank in range(2)]
    actual = torch.cat(ranks.run(bias_gradient, halves))
    assert relative_error(actual, exact.grad) < torch.finfo(dtype).eps


MODULES = {
    "softmax": (fm.SoftmaxLoss, {}),
    "softmax, exclusive": (fm.SoftmaxLoss, {"exclusive_weight": 0.7, "label_smoothing": 0.1}),
    "L2-softmax": (fm.L2SoftmaxLoss, {}),
    "L2-softmax, fixed": (fm.L2SoftmaxLoss, {"alpha": 12.0, "bias": False}),
    "L-softmax": (fm.LSoftmaxLoss, {}),
}


def make(group, name, num_classes, weight, **options):
    """The loss and an optimizer for all its parameters; the bias is computed from the weights."""
    torch.manual_seed(0)
    module, own = MODULES[name]
    loss_fn = module(num_classes, weight.shape[1], process_group=group, dtype=torch.float64, **own, **options)
    with torch.no_grad():
        loss_fn.weight.copy_(weight)
        if loss_fn.bias is not None:
            loss_fn.bias.copy_(weight.sum(dim=1))
    return loss_fn, fm.optim.ProjectedSGD([{"params": list(loss_fn.parameters()), "project": False}], lr=0.1)


def train(group, name, num_classes, weight, batches):
    """A few steps; returns the losses, the state with a row per class, and all other state."""
    loss_fn, optimizer = make(group, name, num_classes, weight)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    divided = {key: value.detach() for key, value in loss_fn.class_parameters().items()}
    return losses, divided, {key: value for key, value in loss_fn.state_dict().items() if key not in divided}


@pytest.mark.parametrize("num_classes", [31, 2])  # with two classes one rank has none
@pytest.mark.parametrize("name", MODULES)
def test_modules_match_one_device(ranks, name, num_classes):
    world_size, w = 3, torch.randn(num_classes, 6, dtype=torch.float64)
    batches = [problem(14, num_classes, 6, seed=seed, spread=1.0)[::2] for seed in range(4)]
    expected = train(None, name, num_classes, w, batches)
    arguments = []
    for rank, part in enumerate([slice(0, 6), slice(6, 9), slice(9, 14)]):
        begin, end = slice_of(num_classes, rank, world_size)
        arguments.append((name, num_classes, w[begin:end], [(x[part], y[part]) for x, y in batches]))
    results = ranks.run(train, arguments)
    for losses, _, others in results:
        torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(others, expected[2], rtol=1e-9, atol=0)
    for key, value in expected[1].items():
        torch.testing.assert_close(torch.cat([r[1][key] for r in results]), value, rtol=1e-8, atol=1e-12)


def sampled(group, name, num_classes, weight, batches, rate, options):
    loss_fn, _ = make(group, name, num_classes, weight, sample_rate=rate, sparse=True, **options)
    results = []
    for x, y in batches:
        loss_fn.zero_grad()
        x = leaf(x)
        loss = loss_fn(x, y)
        loss.backward()
        assert loss_fn.weight.grad.is_sparse
        gradient = loss_fn.weight.grad.coalesce()
        assert gradient._nnz() == loss_fn.weight.grad._nnz()  # a row for a class
        bias = None if loss_fn.bias is None else loss_fn.bias.grad
        results.append((loss.item(), gradient.indices()[0], gradient.values(), x.grad, bias))
    loss_fn.eval()
    return results, loss_fn(*batches[0]).item()


@pytest.mark.parametrize(("name", "options"), [("softmax", {}), ("L-softmax", {"annealing": False})])
def test_sampled_classes(ranks, name, options):
    """The loss is over the sampled classes, which include the targets and depend on the seed."""
    num_classes, rate = 60, 0.3
    w = torch.randn(num_classes, 6, dtype=torch.float64)
    bias, margin = (w.sum(dim=1), None) if name == "softmax" else (None, fm.Margin(m1=4.0))
    batches = [problem(12, num_classes, 6, seed=seed, spread=1.0)[::2] for seed in range(3)]
    arguments = [
        (name, num_classes, w[:30], [(x[:5], y[:5]) for x, y in batches], rate, options),
        (name, num_classes, w[30:], [(x[5:], y[5:]) for x, y in batches], rate, options),
    ]
    results, again = ranks.run(sampled, arguments), ranks.run(sampled, arguments)
    for step, (x, y) in enumerate(batches):
        parts = [r[0][step] for r in results]
        for part, repeated in zip(parts, (r[0][step] for r in again), strict=True):
            assert part[0] == repeated[0] == parts[0][0]
            assert all(torch.equal(a, b) for a, b in zip(part[1:4], repeated[1:4], strict=True))
        sampled_classes = torch.cat([parts[0][1], parts[1][1] + 30])
        assert torch.isin(y, sampled_classes).all() and len(sampled_classes) < num_classes
        assert len(parts[0][1]) == max(9, int((y.unique() < 30).sum()))
        own_bias = None if bias is None else bias[sampled_classes]
        expected = one_rank(
            None, None, x, w[sampled_classes], torch.searchsorted(sampled_classes, y), own_bias, margin, None, {}
        )
        assert parts[0][0] == pytest.approx(expected[0].item(), rel=1e-10)
        assert relative_error(torch.cat([part[3] for part in parts]), expected[1]) < 1e-9
        assert relative_error(torch.cat([part[2] for part in parts]), expected[2]) < 1e-9
        if bias is not None:
            every = torch.zeros_like(bias).index_copy(0, sampled_classes, expected[3])
            assert relative_error(torch.cat([part[4] for part in parts]), every) < 1e-9
    assert not torch.equal(results[0][0][0][1], results[0][0][1][1])
    full = linear_cross_entropy(batches[0][0], w, batches[0][1], bias, margin)
    assert results[0][1] == pytest.approx(full.item(), rel=1e-10)  # evaluation uses all classes


def parameters_and_momentum(loss_fn, optimizer):
    """The parameters and their momentum."""
    return {name: (p.detach(), optimizer.state[p]["momentum_buffer"].clone()) for name, p in loss_fn.named_parameters()}


def checkpoint(group, folder, num_classes, weight, batches, load):
    """Train from a checkpoint or up to one."""
    loss_fn, optimizer = make(group, "L2-softmax", num_classes, weight)
    if load:
        for parameter in loss_fn.parameters():
            fm.optim.start_momentum(optimizer, parameter)
        dcp.load(loss_fn.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(x, y).backward()
        optimizer.step()
    if not load:
        dcp.save(loss_fn.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
    return parameters_and_momentum(loss_fn, optimizer)


@pytest.mark.parametrize("num_classes", [31, 2])
def test_checkpoints_load_on_other_numbers_of_ranks(ranks, tmp_path, num_classes):
    """Two ranks save; one to four load, as does a consolidated file: weights, biases, the length and their momentum."""
    w = torch.randn(num_classes, 5, dtype=torch.float64)
    batches = [problem(9, num_classes, 5, seed=seed)[::2] for seed in range(3)]
    half = slice_of(num_classes, 0, 2)[1]
    arguments = [(w[:half], [(x[:6], y[:6]) for x, y in batches]), (w[half:], [(x[6:], y[6:]) for x, y in batches])]
    saved = ranks.run(checkpoint, [(tmp_path, num_classes, *own, False) for own in arguments])
    expected = {name: [torch.cat([part[name][k] for part in saved]) for k in (0, 1)] for name in ("weight", "bias")}
    expected["alpha"] = saved[0]["alpha"]
    assert all(momentum.abs().max() > 0 for _, momentum in expected.values())
    for world_size in range(1, MAX_RANKS + 1):
        slices = [slice_of(num_classes, rank, world_size) for rank in range(world_size)]
        none = [(tmp_path, num_classes, torch.zeros(end - begin, 5), [], True) for begin, end in slices]
        loaded = ranks.run(checkpoint, none)
        for k in (0, 1):
            for name in ("weight", "bias"):
                assert torch.equal(torch.cat([part[name][k] for part in loaded]), expected[name][k])
            assert all(torch.equal(part["alpha"][k], expected["alpha"][k]) for part in loaded)
    one_file = tmp_path / "full.pt"
    assert consolidate([str(tmp_path), str(one_file)]) == 0
    full = torch.load(one_file, weights_only=True)
    loss_fn = fm.L2SoftmaxLoss(num_classes, 5, dtype=torch.float64)
    loss_fn.load_state_dict({name: full[name] for name in loss_fn.state_dict()})
    for name, parameter in loss_fn.named_parameters():
        assert torch.equal(parameter, expected[name][0])
        assert torch.equal(full[f"{name}.momentum_buffer"], expected[name][1])


def bad_label(group, labels):
    fm.SoftmaxLoss(10, 4, process_group=group)(torch.randn(len(labels), 4), torch.tensor(labels))


def test_errors(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(bad_label, [([1, 2],), ([3, 10],)])
    for rank in (0, 1):
        assert f"rank {rank}: ValueError: labels: expected values in [0, num_classes)" in str(caught.value)
    x, w, y = problem(3, 10, 4)
    with pytest.raises(ValueError, match="weight: expected the 10 rows that rank 0 of 1 has of 10 classes, got 9"):
        linear_cross_entropy(x, w[1:], y, shard=Shard(10))
    with pytest.raises(ValueError, match=r"bias: expected shape \(10,\)"):
        linear_cross_entropy(x, w, y, torch.zeros(9), shard=Shard(10))
    with pytest.raises(ValueError, match="label_smoothing: expected 0 with a sample_rate below 1"):
        fm.SoftmaxLoss(10, 4, sample_rate=0.5, label_smoothing=0.1)(x.float(), y)
