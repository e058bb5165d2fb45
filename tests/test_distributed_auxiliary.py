"""Auxiliary losses of several ranks: loss, gradients and state match one device for any division of classes and samples."""

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from divided_classes import check_losses, draw_division
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_inputs import LargestTensor, leaf, problem
from ranks import MAX_RANKS, RankError
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin._ops import collectives, divided_pair_sums
from fused_margin.commands.consolidate import main as consolidate
from fused_margin.distributed import Shard, slice_of

SIZE = 6
# How to make each loss for a number of classes, and its arguments: embeddings, weight, labels.
LOSSES = {
    "center": (lambda classes, **options: fm.CenterLoss(classes, SIZE, dtype=torch.float64, **options), "xy"),
    "ring": (lambda _, **options: fm.RingLoss(dtype=torch.float64, **options), "xy"),
    "ring without labels": (lambda _, **options: fm.RingLoss(2.0, dtype=torch.float64, **options), "x"),
    "intra": (lambda _, **options: fm.IntraLoss(**options), "xwy"),
    "inter": (lambda _, **options: fm.InterLoss(workspace_mb=0.01, **options), "wy"),
    "uniform": (lambda _, **options: fm.UniformLoss(workspace_mb=0.01, **options), "w"),
    "uniform of a batch": (lambda _, **options: fm.UniformLoss(batch_classes=True, **options), "wy"),
}
NOT_REDUCED = ["uniform", "uniform of a batch"]  # they have no reduction over samples


def steps(group, name, num_classes, batches, options):
    """Losses and gradients of every step, and the state and gradients of the loss after the last."""
    make, takes = LOSSES[name]
    loss_fn = make(num_classes, process_group=group, **options)
    results = []
    for x, w, y, upstream in batches:
        tensors = {"x": leaf(x), "w": leaf(w), "y": y}
        loss = loss_fn(*(tensors[argument] for argument in takes))
        loss.backward(upstream if loss.dim() else torch.ones_like(loss))
        results.append((loss.detach(), *(tensors[argument].grad for argument in takes if argument != "y")))
    gradients = {name: parameter.grad for name, parameter in loss_fn.named_parameters()}
    return results, dict(loss_fn.state_dict()), gradients


def compare(ranks, name, counts, num_classes, *, seed=0, labels=None, **options):
    """Compare ranks with one device for two steps; `counts` has the number of samples of each rank."""
    bounds = [slice_of(num_classes, rank, len(counts)) for rank in range(len(counts))]
    batches = []
    for step in range(2):
        x, w, y = problem(sum(counts), num_classes, SIZE, seed=seed + step)
        y[3:4] = -100
        y = y if labels is None else labels
        batches.append((x, w, y, torch.rand(len(x), dtype=torch.float64)))
    arguments = []
    for rank, (begin, end) in enumerate(bounds):
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        parts = [(x[own], w[begin:end], y[own], upstream[own]) for x, w, y, upstream in batches]
        arguments.append((name, num_classes, parts, options))
    expected, state, gradients = steps(None, name, num_classes, batches, options)
    results = ranks.run(steps, arguments)
    for step, one_device in enumerate(expected):
        divided = [losses[step] for losses, _, _ in results]
        check_losses(divided, one_device[0], options.get("reduction"))
        for parts, whole in zip(zip(*(rest for _, *rest in divided), strict=True), one_device[1:], strict=True):
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-9, atol=1e-12)
    for key, value in state.items():
        parts = [part[key] for _, part, _ in results]
        for part in [torch.cat(parts)] if key == "centers" else parts:
            torch.testing.assert_close(part, value, rtol=1e-12, atol=1e-14)
    for _, _, own_gradients in results:
        torch.testing.assert_close(own_gradients, gradients, rtol=1e-10, atol=0)


REDUCED = [(name, reduction) for name in LOSSES if name not in NOT_REDUCED for reduction in ("mean", "sum", "none")]


@pytest.mark.parametrize(("name", "reduction"), REDUCED + [(name, None) for name in NOT_REDUCED])
def test_ranks_match_one_device(ranks, name, reduction):
    """A rank without samples; the small workspace makes several blocks of classes per rank."""
    compare(ranks, name, [5, 0, 9], 403, **({} if reduction is None else {"reduction": reduction}))


@pytest.mark.parametrize("name", LOSSES)
def test_ranks_without_classes_or_samples(ranks, name):
    compare(ranks, name, [2, 0, 1, 3], 3)
    compare(ranks, name, [0, 0], 5)


@pytest.mark.parametrize("name", [name for name, (_, takes) in LOSSES.items() if "y" in takes])
def test_unsigned_labels(ranks, name):
    """A label is not the ignored one because it equals it after conversion to its dtype."""
    compare(ranks, name, [2, 2], 203, labels=torch.tensor([156, 3, 3, 200], dtype=torch.uint8))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_division_of_classes_and_samples(ranks, data):
    counts, num_classes = draw_division(data)
    name = data.draw(st.sampled_from(list(LOSSES)))
    if name.startswith(("inter", "uniform")):
        num_classes += 1
    compare(ranks, name, counts, num_classes, seed=data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("function", ["angle", "potential"])
def test_pair_sums_of_several_blocks(ranks, world_size, function):
    """Any upstream gradient, not the same for all classes, and several remote blocks per rank."""
    _, w, _ = problem(1, 403, SIZE)
    upstream = torch.rand(403, dtype=torch.float64)
    expected = leaf(w)
    sums = fm._ops.class_pair_sums.other_class_sums(None, expected, None, function)
    sums.backward(upstream)
    slices = [slice(*slice_of(403, rank, world_size)) for rank in range(world_size)]
    results = ranks.run(pair_sums, [(w[own], upstream[own], function) for own in slices])
    torch.testing.assert_close(torch.cat([sums for sums, *_ in results]), sums.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([gradient for _, gradient, _ in results]), expected.grad)
    assert all(blocks > world_size for _, _, blocks in results)


def pair_sums(group, weight, upstream, function):
    weight, shard, workspace = leaf(weight), Shard(403, group), 1 << 10
    sums = divided_pair_sums.divided_pair_sums(weight, function, workspace, shard.name, 403)
    sums.backward(upstream)
    return sums.detach(), weight.grad, len(list(divided_pair_sums._blocks(shard, [weight.detach()], workspace)))


def computed_pairs(group):
    """How often this rank computes each pair of classes of different ranks."""
    shard = Shard(9, group)
    seen = torch.zeros(9, 9)
    for block in divided_pair_sums._blocks(shard, [torch.zeros(shard.size, 1000)], 1):
        first = slice_of(9, block.owner, shard.world_size)[0] + block.classes.start
        rows, columns = torch.arange(9)[shard.begin :][block.own], torch.arange(9)[first:][block.part]
        seen[rows.unsqueeze(1), columns] += 1
    return seen


@pytest.mark.parametrize("world_size", [2, 4])
def test_each_pair_is_computed_once(ranks, world_size):
    owner = torch.cat(
        [
            torch.full((end - begin,), rank)
            for rank in range(world_size)
            for begin, end in [slice_of(9, rank, world_size)]
        ]
    )
    seen = sum(ranks.run(computed_pairs, [()] * world_size))
    assert torch.equal(seen + seen.t(), (owner.unsqueeze(1) != owner).float())


def largest_tensors(group, num_classes, workspace):
    """The elements of the largest tensors of forward and backward."""
    shard = Shard(num_classes, group)
    weight = torch.randn(shard.size, 4)
    with LargestTensor() as forward:
        sums = divided_pair_sums.forward(weight, "potential", workspace, shard)
    with LargestTensor() as backward:
        divided_pair_sums.backward(sums, weight, "potential", workspace, shard)
    return forward.elements, backward.elements


@pytest.mark.slow
def test_cosine_matrix_is_never_materialized(ranks):
    num_classes, workspace = 3000, 1 << 18
    for elements in ranks.run(largest_tensors, [(num_classes, workspace)] * 2):
        for most in elements:
            assert num_classes // 2 * 4 <= most <= max(num_classes // 2 * 4, workspace // 12) < num_classes**2 // 400


def half_precision(group, name, x, w, y):
    make, takes = LOSSES[name]
    tensors = {"x": leaf(x), "w": leaf(w), "y": y}
    loss = make(30, process_group=group)(*(tensors[argument] for argument in takes))
    loss.backward()
    return loss.detach(), *(tensors[argument].grad for argument in takes if argument != "y")


@pytest.mark.parametrize("name", ["intra", "inter", "uniform"])
def test_half_precision(ranks, name):
    x, w, y = problem(12, 30, SIZE)
    x, w = x.bfloat16(), w.bfloat16()
    expected = half_precision(None, name, x, w, y)
    results = ranks.run(half_precision, [(name, x[:5], w[:15], y[:5]), (name, x[5:], w[15:], y[5:])])
    torch.testing.assert_close([loss for loss, *_ in results], [expected[0]] * 2)
    for parts, whole in zip(zip(*(rest for _, *rest in results), strict=True), expected[1:], strict=True):
        torch.testing.assert_close(torch.cat(parts), whole)


def recomputed(group, x, y):
    """Center loss under activation checkpointing; its gradient and centers with and without."""
    plain = fm.CenterLoss(10, SIZE, process_group=group, dtype=torch.float64)
    other, a, b = copy.deepcopy(plain), leaf(x), leaf(x)
    for _ in range(2):
        plain(a, y).backward()
        checkpoint(other, b, y, use_reentrant=False).backward()
    return a.grad, b.grad, plain.centers, other.centers


def test_center_loss_is_recomputed_on_all_ranks(ranks):
    x, _, y = problem(9, 10, SIZE)
    for plain_gradient, gradient, plain_centers, centers in ranks.run(recomputed, [(x[:2], y[:2]), (x[2:], y[2:])]):
        assert torch.equal(plain_gradient, gradient) and torch.equal(plain_centers, centers)
        assert centers.abs().min() > 0 or len(centers)


def state(group, folder, num_classes, batch, load):
    loss_fn = fm.CenterLoss(num_classes, SIZE, process_group=group)
    if load:
        dcp.load(loss_fn.sharded_state_dict(), checkpoint_id=folder, process_group=group)
    else:
        loss_fn(*batch)
        dcp.save(loss_fn.sharded_state_dict(), checkpoint_id=folder, process_group=group)
    return loss_fn.centers


@pytest.mark.parametrize("num_classes", [31, 2])
def test_centers_load_on_other_numbers_of_ranks(ranks, tmp_path, num_classes):
    """Three ranks save, one to four load; with two classes one of the three has none."""
    x, _, y = problem(9, num_classes, SIZE)
    saved = ranks.run(state, [(tmp_path, num_classes, (x[k::3].float(), y[k::3]), False) for k in range(3)])
    whole = torch.cat(saved)
    assert whole.count_nonzero()
    for world_size in range(1, MAX_RANKS + 1):
        loaded = ranks.run(state, [(tmp_path, num_classes, None, True)] * world_size)
        assert torch.equal(torch.cat(loaded), whole)
    assert consolidate([str(tmp_path), str(tmp_path / "full.pt")]) == 0
    alone = fm.CenterLoss(num_classes, SIZE)
    alone.load_state_dict(torch.load(tmp_path / "full.pt", weights_only=True))
    assert torch.equal(alone.centers, whole)


def wrong_call(group, name, x, w, y):
    make, takes = LOSSES[name]
    tensors = {"x": x, "w": w, "y": y}
    make(10, process_group=group)(*(tensors[argument] for argument in takes))


X, W, Y = torch.randn(2, SIZE), torch.randn(5, SIZE), torch.tensor([1, 2])
BAD_LABEL = r"labels: expected values in \[0, num_classes\) or ignore_index, got 10 on rank 1 for 10 classes"


@pytest.mark.parametrize(
    ("name", "second", "message"),
    [
        ("center", (X, W, Y + 8), BAD_LABEL),
        ("intra", (X, W, Y + 8), BAD_LABEL),
        ("inter", (X, W, Y + 8), BAD_LABEL),
        ("uniform of a batch", (X, W, Y + 8), BAD_LABEL),
        ("center", (X.double(), W, Y), "embeddings: expected the same on all ranks, got .* torch.float64"),
        ("inter", (X, W[:, :3], Y), "weight: expected the same on all ranks, got embedding_size 6.* embedding_size 3"),
        ("uniform", (X, W[:3], Y), r"weight: expected \[4, 4\] of 8 classes on the ranks.* got \[5, 3\]"),
    ],
)
def test_bad_input_raises_on_every_rank(ranks, name, second, message):
    """No rank is left waiting."""
    with pytest.raises(RankError, match=f"(?s)rank 0: ValueError: {message}.*rank 1: ValueError: {message}"):
        ranks.run(wrong_call, [(name, X, W, Y), (name, *second)])


def too_few_classes(group, weight):
    fm.UniformLoss(process_group=group)(weight)


def test_one_class_of_all_ranks_is_too_few(ranks):
    with pytest.raises(RankError, match="weight: expected at least 2 classes on all ranks together, got 1"):
        ranks.run(too_few_classes, [(W[:1],), (W[:0],)])


def refusals(group):
    loss_fn = fm.CenterLoss(10, SIZE, process_group=group)
    arcface = fm.ArcFaceLoss(10, SIZE, process_group=group)
    fm.optim.step_in_backward(arcface, fm.optim.ProjectedSGD(arcface.parameters(), lr=0.1))
    errors = []
    for call in (
        lambda: setattr(loss_fn, "process_group", None),
        lambda: fm.IntraLoss(process_group=group)(X, arcface.weight, Y),
        lambda: fm.InterLoss(process_group=group)(arcface.weight, Y),
        lambda: fm.UniformLoss(process_group=group)(arcface.weight),
        lambda: torch.func.vmap(loss_fn)(X[None], Y[None]),
    ):
        try:
            call()
            errors.append("no error")
        except (AttributeError, RuntimeError) as error:
            errors.append(str(error))
    return errors


def test_refusals(ranks):
    for fixed, *stepped, transformed in ranks.run(refusals, [()] * 2):
        assert fixed.startswith("process_group: cannot be changed")
        assert all("another term of the loss uses the class weights" in error for error in stepped)
        assert "the transforms of torch.func are not supported" in transformed


def compiled_center_loss(group, x, y):
    """Losses, gradients and centers of two steps, eager and compiled."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        loss_fn, a = fm.CenterLoss(10, SIZE, process_group=group), leaf(x.float())
        step = torch.compile(loss_fn, backend="aot_eager") if compiled else loss_fn
        losses = [step(a, y) for _ in range(2)]
        sum(losses).backward()
        results.append([*losses, a.grad, loss_fn.centers])
    return [[tensor.detach() for tensor in result] for result in results]


@pytest.mark.slow
def test_compiled_center_loss(ranks):
    x, _, y = problem(9, 10, SIZE)
    for eager, compiled in ranks.run(compiled_center_loss, [(x[:2], y[:2]), (x[2:], y[2:])]):
        torch.testing.assert_close(compiled, eager)


def run_opcheck(group):
    shard = Shard(23, group)
    own = slice(shard.begin, shard.begin + shard.size)
    weight = problem(1, 23, SIZE)[1][own].requires_grad_()
    place = (shard.name, 23)
    torch.library.opcheck(divided_pair_sums.divided_pair_sums, (weight, "potential", 1 << 20, *place))
    upstream = torch.rand(shard.size, dtype=torch.float64)
    arguments = (upstream, weight.detach(), "angle", 1 << 20, *place)
    torch.library.opcheck(divided_pair_sums.divided_pair_sums_backward, arguments)
    counts = [3, 2]
    rows = torch.randn(counts[shard.rank], 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(collectives.gather_rows, (rows, counts, shard.name))
    rows = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(collectives.scatter_rows, (rows, counts, shard.name))


@pytest.mark.slow
def test_opcheck(ranks):
    ranks.run(run_opcheck, [()] * 2)
