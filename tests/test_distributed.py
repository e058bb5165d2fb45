"""Classes divided among ranks: the loss and gradients match one device for any division of classes and samples."""

import copy

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
from fused_margin.margins import FilteredNegatives, HardNegatives


def split(tensor, counts):
    return None if tensor is None else list(tensor.split(counts))


def one_rank(group, num_classes, x, weight, y, margin, scale, upstream, options):
    """Loss and gradients of one rank's samples and classes."""
    shard = Shard(num_classes, group)
    x, weight = leaf(x), leaf(weight)
    per_sample = isinstance(scale, torch.Tensor)
    scale = leaf(scale) if per_sample else scale
    loss = fm.functional.margin_cross_entropy(x, weight, y, margin, scale, shard=shard, **options)
    loss.backward(upstream if upstream is not None else torch.ones_like(loss))
    return loss.detach(), x.grad, weight.grad, scale.grad if per_sample else None


def compare(ranks, world_size, counts, num_classes, size, *, scale=20.0, margin=None, upstream=None, seed=0, **options):
    """Compare `world_size` ranks with one device; `counts` has the number of samples of each rank."""
    samples, centers = sum(counts), options.get("sub_centers", 1)
    x, w, y = problem(samples, num_classes * centers, size, seed=seed)
    y = y % num_classes
    if samples > 4:
        y[3] = -100
    if "threshold" in options:
        threshold = options.pop("threshold")
        options["hard_negatives"] = HardNegatives(threshold, 0.3)
    margin = margin or fm.Margin(m2=0.3)
    a, b = leaf(x), leaf(w)
    full_scale = leaf(scale) if isinstance(scale, torch.Tensor) else scale
    loss = fm.functional.margin_cross_entropy(a, b, y, margin, full_scale, **options)
    loss.backward(upstream if upstream is not None else torch.ones_like(loss))

    bounds = [slice_of(num_classes, rank, world_size) for rank in range(world_size)]
    arguments = []
    for rank, (begin, end) in enumerate(bounds):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        given = dict(options)
        if isinstance(given.get("hard_negatives"), HardNegatives):
            given["hard_negatives"] = HardNegatives(threshold[own], 0.3)
        own_margin = fm.Margin(m2=margin.m2[own]) if isinstance(margin.m2, torch.Tensor) else margin
        arguments.append(
            (
                num_classes, x[own], w[begin * centers : end * centers], y[own], own_margin,
                scale[own] if isinstance(scale, torch.Tensor) else scale,
                None if upstream is None else upstream[own], given,
            )
        )  # fmt: skip
    results = ranks.run(one_rank, arguments)
    check_losses(results, loss.detach(), options.get("reduction"))
    for gathered, full in ((1, a), (2, b)):  # gradients in one dimension are 0 up to rounding
        torch.testing.assert_close(torch.cat([r[gathered] for r in results]), full.grad, rtol=1e-9, atol=1e-12)
    if isinstance(scale, torch.Tensor):
        assert relative_error(torch.cat([r[3] for r in results]), full_scale.grad) < 1e-9


@pytest.mark.parametrize("world_size", range(1, MAX_RANKS + 1))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(ranks, world_size, reduction):
    counts = [5, 3, 0, 9][:world_size]  # a rank without samples
    upstream = torch.randn(sum(counts), dtype=torch.float64) if reduction == "none" else None
    compare(ranks, world_size, counts, 103, 7, reduction=reduction, upstream=upstream)


CASES = {
    "class weights and smoothing": {"label_smoothing": 0.1, "class_weight": torch.rand(103, dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.3},
    "feature norm": {"scale": None},
    "large scale": {"scale": 300.0},
    "per-sample scales": {"scale": torch.rand(17, dtype=torch.float64) * 30 + 1},
    "per-sample margins": {"margin": fm.Margin(m2=torch.rand(17, dtype=torch.float64))},
    "sub-centers": {"sub_centers": 3},
    "two sub-centers": {"sub_centers": 2},
    "hard negatives": {"threshold": torch.linspace(-0.5, 0.5, 17, dtype=torch.float64)},
    "filtered": {"hard_negatives": FilteredNegatives(0.4)},
    "filtered sub-centers, per-sample scales": {
        "hard_negatives": FilteredNegatives(0.4),
        "sub_centers": 3,
        "scale": torch.rand(17, dtype=torch.float64) * 30 + 1,
    },
    "exclusive": {"exclusive_weight": 2.0},
    "small workspace": {"workspace_mb": 1e-6, "exclusive_weight": 2.0},
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_options(ranks, world_size, case):
    compare(ranks, world_size, SAMPLE_COUNTS[world_size], 103, 7, **CASES[case])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_division_of_classes_and_samples(ranks, data):
    counts, num_classes = draw_division(data)
    exclusive = data.draw(st.sampled_from([0.0, 0.7])) if num_classes > 1 else 0.0
    size, seed = data.draw(st.integers(2, 9)), data.draw(st.integers(0, 99))
    compare(ranks, len(counts), counts, num_classes, size, seed=seed, exclusive_weight=exclusive)


def nearest(group, num_classes, weight):
    result = fm.functional.nearest_class(weight, shard=Shard(num_classes, group), workspace_mb=0.001)
    return result.cosine, result.index


@pytest.mark.parametrize("world_size", range(1, MAX_RANKS + 1))
@pytest.mark.parametrize("num_classes", [2, 5, 301])
def test_nearest_class_with_ties(ranks, world_size, num_classes):
    for w in (torch.eye(5)[torch.arange(num_classes) % 5], torch.randn(num_classes, 12)):
        expected = fm.functional.nearest_class(w)
        slices = [slice_of(num_classes, rank, world_size) for rank in range(world_size)]
        actual = ranks.run(nearest, [(num_classes, w[begin:end]) for begin, end in slices])
        torch.testing.assert_close(torch.cat([cosine for cosine, _ in actual]), expected.cosine)
        assert torch.equal(torch.cat([index for _, index in actual]), expected.index)


LOSSES = ["ArcFaceLoss", "SphereFaceLoss", "AdaFaceLoss", "MagFaceLoss", "CurricularFaceLoss", "SubCenterArcFaceLoss"]


def train(group, name, num_classes, weight, batches):
    """A few steps of projected gradient descent; the losses, the weights and the buffers."""
    torch.manual_seed(0)
    loss_fn = getattr(fm, name)(num_classes, weight.shape[1], process_group=group, dtype=torch.float64)
    with torch.no_grad():
        loss_fn.weight.copy_(weight)
    optimizer = fm.optim.ProjectedSGD([loss_fn.weight], lr=0.1)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = loss_fn(x, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert group is None or copy.deepcopy(loss_fn).shard.group is group
    buffers = {k: v for k, v in loss_fn.named_buffers() if v is not None}
    return losses, loss_fn.weight.detach(), buffers


@pytest.mark.parametrize("name", LOSSES)
def test_modules_match_one_device(ranks, name):
    num_classes, world_size = 31, 3
    centers = 3 if name == "SubCenterArcFaceLoss" else 1
    w = torch.randn(num_classes * centers, 6, dtype=torch.float64)
    batches = [problem(14, num_classes, 6, seed=seed)[::2] for seed in range(4)]
    expected = train(None, name, num_classes, w, batches)
    parts = [slice(0, 6), slice(6, 9), slice(9, 14)]
    arguments = []
    for rank, part in enumerate(parts):
        begin, end = slice_of(num_classes, rank, world_size)
        own = [(x[part], y[part]) for x, y in batches]
        arguments.append((name, num_classes, w[begin * centers : end * centers], own))
    results = ranks.run(train, arguments)
    for losses, _, buffers in results:
        torch.testing.assert_close(losses, expected[0], rtol=1e-9, atol=0)
        torch.testing.assert_close(buffers, expected[2])
    assert relative_error(torch.cat([weight for _, weight, _ in results]), expected[1]) < 1e-9


def learned_scale(group, weight, x, y, reduction):
    scale = torch.nn.Parameter(torch.tensor(20.0, dtype=torch.float64))
    loss_fn = fm.ArcFaceLoss(
        23, weight.shape[1], scale=scale, process_group=group, reduction=reduction, dtype=torch.float64
    )
    with torch.no_grad():
        loss_fn.weight.copy_(weight)
    loss_fn(x, y).sum().backward()
    return loss_fn.scale.grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_learned_scale_has_the_gradient_of_all_samples(ranks, reduction):
    x, w, y = problem(9, 23, 6)
    expected = learned_scale(None, w, x, y, reduction)
    parts = [(slice(0, 12), slice(0, 7)), (slice(12, 23), slice(7, 9))]
    actual = ranks.run(learned_scale, [(w[own], x[part], y[part], reduction) for own, part in parts])
    for gradient in actual:
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=0)


def bad_label(group, labels):
    x = torch.randn(len(labels), 4)
    fm.ArcFaceLoss(10, 4, process_group=group)(x, torch.tensor(labels))


def bad_size(group, size):
    fm.functional.margin_cross_entropy(
        torch.randn(3, size), torch.randn(5, size), torch.zeros(3, dtype=torch.int64), shard=Shard(10, group)
    )


def test_bad_input_raises_on_every_rank(ranks):
    """No rank is left waiting."""
    with pytest.raises(RankError) as caught:
        ranks.run(bad_label, [([1, 2],), ([3, 10],)])
    for rank in (0, 1):
        assert (
            f"rank {rank}: ValueError: labels: expected values in [0, num_classes) or ignore_index, got 10 on rank 1"
            in str(caught.value)
        )
    with pytest.raises(RankError) as caught:
        ranks.run(bad_size, [(4,), (5,)])
    for rank in (0, 1):
        assert (
            f"rank {rank}: ValueError: embeddings: expected the same on all ranks, got embedding_size 4, torch.float32"
            in str(caught.value)
        )
    with pytest.raises(ValueError, match="weight: expected the 10 rows that rank 0 of 1 has of 10 classes, got 9"):
        fm.functional.margin_cross_entropy(
            torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, dtype=torch.int64), shard=Shard(10)
        )


def sampled(group, num_classes, weight, batches, rate):
    torch.manual_seed(0)
    loss_fn = fm.ArcFaceLoss(
        num_classes, weight.shape[1], scale=8.0, process_group=group, sample_rate=rate, sparse=True, dtype=torch.float64
    )
    with torch.no_grad():
        loss_fn.weight.copy_(weight)
    results = []
    for x, y in batches:
        loss_fn.weight.grad, x = None, leaf(x)
        loss = loss_fn(x, y)
        loss.backward()
        gradient = loss_fn.weight.grad.coalesce()
        results.append((loss.item(), gradient.indices()[0], gradient.values(), x.grad))
    loss_fn.eval()
    return results, loss_fn(*batches[0]).item()


def test_sampled_classes(ranks):
    """The loss is over the sampled classes, which include the targets and depend on the seed."""
    num_classes, rate = 60, 0.3
    w = torch.randn(num_classes, 6, dtype=torch.float64)
    batches = [problem(12, num_classes, 6, seed=seed)[::2] for seed in range(3)]
    arguments = [(num_classes, w[:30], [(x[:5], y[:5]) for x, y in batches], rate)]
    arguments += [(num_classes, w[30:], [(x[5:], y[5:]) for x, y in batches], rate)]
    results, again = ranks.run(sampled, arguments), ranks.run(sampled, arguments)
    for step, (x, y) in enumerate(batches):
        (loss, rows, gradient, dx), (loss_1, rows_1, gradient_1, dx_1) = (r[0][step] for r in results)
        assert torch.equal(rows, again[0][0][step][1]) and loss == loss_1 == again[0][0][step][0]
        drawn = torch.cat([rows, rows_1 + 30])
        assert torch.isin(y, drawn).all() and len(rows) == max(9, int((y.unique() < 30).sum()))
        a, b = leaf(x), leaf(w[drawn])
        expected = fm.functional.margin_cross_entropy(a, b, torch.searchsorted(drawn, y), fm.Margin(m2=0.5), 8.0)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        assert relative_error(torch.cat([gradient, gradient_1]), b.grad) < 1e-9
        assert relative_error(torch.cat([dx, dx_1]), a.grad) < 1e-9
    assert not torch.equal(results[0][0][0][1], results[0][0][1][1])
    x, y = batches[0]
    full = fm.functional.margin_cross_entropy(x, w, y, fm.Margin(m2=0.5), 8.0)
    assert results[0][1] == pytest.approx(full.item(), rel=1e-10)  # evaluation uses all classes


def trained(group, folder, num_classes, centers, batches, load):
    """Train from a checkpoint or up to one; returns the rank's weight and momentum, and the bytes of each rank."""
    torch.manual_seed(1)
    loss_fn = fm.CurricularFaceLoss(num_classes, 5, sub_centers=centers, process_group=group)
    optimizer = fm.optim.ProjectedSGD([loss_fn.weight], lr=0.1)
    if load:
        fm.optim.start_momentum(optimizer, loss_fn.weight)
        dcp.load(loss_fn.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(x.float(), y).backward()
        optimizer.step()
    if not load:
        dcp.save(loss_fn.sharded_state_dict(optimizer), checkpoint_id=folder, process_group=group)
    return loss_fn.weight.detach(), optimizer.state[loss_fn.weight]["momentum_buffer"], loss_fn.t


@pytest.mark.parametrize(("num_classes", "centers"), [(31, 1), (10, 3), (2, 1)])
def test_checkpoints_load_on_other_numbers_of_ranks(ranks, tmp_path, num_classes, centers):
    """Three ranks save, one to four load; with two classes one of the three has none."""
    batches = [problem(9, num_classes, 5, seed=seed)[::2] for seed in range(3)]
    parts = [[(x[k::3], y[k::3]) for x, y in batches] for k in range(3)]
    saved = ranks.run(trained, [(tmp_path, num_classes, centers, part, False) for part in parts])
    for world_size in range(1, MAX_RANKS + 1):
        loaded = ranks.run(trained, [(tmp_path, num_classes, centers, [], True)] * world_size)
        for k in (0, 1):
            assert torch.equal(torch.cat([part[k] for part in loaded]), torch.cat([part[k] for part in saved]))
        assert all(torch.equal(part[2], saved[0][2]) for part in loaded)
    one_file = tmp_path / "full.pt"
    assert consolidate([str(tmp_path), str(one_file)]) == 0
    full = torch.load(one_file, weights_only=True)
    assert torch.equal(full["weight"], torch.cat([part[0] for part in saved]))
    loss_fn = fm.CurricularFaceLoss(num_classes, 5, sub_centers=centers)
    loss_fn.load_state_dict({name: full[name] for name in loss_fn.state_dict()})


def test_consolidate_errors(tmp_path, capsys):
    assert consolidate([str(tmp_path / "none"), str(tmp_path / "one.pt")]) == 1
    assert "is not a checkpoint of torch.distributed.checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        consolidate([])


def test_sampling_without_a_process_group():
    loss_fn = fm.CosFaceLoss(50, 6, scale=8.0, sample_rate=0.2, sparse=True)
    loss_fn(torch.randn(4, 6), torch.tensor([1, 1, 7, 30])).backward()
    assert loss_fn.weight.grad.is_sparse and loss_fn.weight.grad._nnz() == 10
    with pytest.raises(ValueError, match="label_smoothing: expected 0 with a sample_rate below 1"):
        fm.CosFaceLoss(50, 6, sample_rate=0.2, label_smoothing=0.1)(torch.randn(4, 6), torch.tensor([1, 1, 7, 30]))
    with pytest.raises(ValueError, match="sample_rate: expected a number in"):
        fm.CosFaceLoss(50, 6, sample_rate=0.0)


def test_sparse_steps_change_only_their_rows():
    """A row's momentum depends on the steps of that row only, as with dense steps over that row."""
    weight = torch.nn.Parameter(fm.optim.project_(torch.randn(6, 4)))
    before = weight.detach().clone()
    optimizer = fm.optim.ProjectedSGD([weight], lr=0.1, momentum=0.9, weight_decay=0.01)
    rows, values = [torch.tensor([1, 4]), torch.tensor([4])], [torch.randn(2, 4), torch.randn(1, 4)]
    for index, value in zip(rows, values, strict=True):
        weight.grad = torch.sparse_coo_tensor(index.unsqueeze(0), value, weight.shape, check_invariants=True)
        optimizer.step()
    untouched = [0, 2, 3, 5]
    assert torch.equal(weight[untouched], before[untouched])
    alone = torch.nn.Parameter(before[[4]].clone())
    dense = fm.optim.ProjectedSGD([alone], lr=0.1, momentum=0.9, weight_decay=0.01)
    for value in (values[0][[1]], values[1]):
        alone.grad = value
        dense.step()
    torch.testing.assert_close(weight[[4]], alone)
    one = torch.nn.Parameter(before[[1]].clone())
    dense = fm.optim.ProjectedSGD([one], lr=0.1, momentum=0.9, weight_decay=0.01)
    one.grad = values[0][[0]]
    dense.step()
    torch.testing.assert_close(weight[[1]], one)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("fraction", [0, 0.5])
def test_consolidate_names_damaged_checkpoints(tmp_path, capsys, name, fraction):
    folder = tmp_path / "sharded"
    dcp.save({"weight": torch.ones(50, 4)}, checkpoint_id=folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(fraction * len(content))])
    assert consolidate([str(folder), str(tmp_path / "one.pt")]) == 1
    assert f"error: cannot read the checkpoint {folder}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]
