"""Triplet, contrastive and DeepID2's losses against the papers' formulas, written out pair by pair in float64."""

import itertools
import math
from functools import partial

import pytest
import torch
from loss_inputs import LargestTensor, in_layout, leaf, relative_error
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

import fused_margin as fm
from fused_margin.losses.pairs import AVERAGES, FORMS, verification_threshold
from fused_margin.losses.triplet import MINING

DISTANCES = {
    "squared": lambda a, b: (a - b).square().sum(),
    "euclidean": lambda a, b: (a - b).norm(),
    "angle": lambda a, b: torch.acos((a @ b).clamp(-1, 1)),
}


def samples(count=14, classes=4, size=3, seed=0):
    """Embeddings of different norms near each other, so that all kinds of triplets occur; labels with repeats."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, size, generator=generator, dtype=torch.float64)
    return embeddings + 1.5, torch.randint(-1, classes - 1, (count,), generator=generator)


def distance_table(x, distance, normalize):
    x = [row / row.norm() if normalize else row for row in x]
    return [[DISTANCES[distance](a, b) if a is not b else None for b in x] for a in x]


@pytest.mark.parametrize("sigma", [1e5, 1e9])
@pytest.mark.parametrize(
    "loss_fn",
    [
        fm.ContrastiveLoss(2.0, normalize=False, form="squared-distance"),
        fm.DeepID2Loss(0.1),
        fm.TripletLoss(normalize=False, distance="euclidean", mining="all"),
    ],
    ids=lambda loss_fn: type(loss_fn).__name__,
)
def test_common_offset_of_raw_embeddings(loss_fn, sigma):
    """Distances of embeddings that have a large mean are those of their differences."""
    x, y = samples()
    far = (x + sigma).requires_grad_()
    near = ((x + sigma) - sigma).requires_grad_()  # exact
    far_loss, near_loss = loss_fn(far, y), loss_fn(near, y)
    far_loss.backward()
    near_loss.backward()
    torch.testing.assert_close(far_loss, near_loss, rtol=1e-6, atol=0)
    assert relative_error(far.grad, near.grad) < 1e-6 and near.grad.abs().max() > 0


def plain_triplets(x, y, margin, mining, distance, normalize=True):
    """The losses of the triplets of each anchor, and the number of summands of the mean."""
    d = distance_table(x, distance, normalize)
    chosen = []
    for a in range(len(x)):
        positives = [p for p in range(len(x)) if y[p] == y[a] and p != a]
        negatives = [n for n in range(len(x)) if y[n] != y[a]]
        semihard = {p: [n for n in negatives if d[a][p] < d[a][n] < d[a][p] + margin] for p in positives}
        if mining == "batch-hard":
            far, near = partial(max, key=lambda p: d[a][p]), partial(min, key=lambda n: d[a][n])
            pairs = [(far(positives), near(negatives))] if positives and negatives else []
        elif mining == "nearest-semihard":
            pairs = [(p, min(semihard[p], key=lambda n: d[a][n])) for p in positives if semihard[p]]
        elif mining == "semihard":
            pairs = [(p, n) for p in positives for n in semihard[p]]
        elif mining == "hard":
            pairs = [(p, n) for p in positives for n in negatives if d[a][n] <= d[a][p]]
        else:
            pairs = itertools.product(positives, negatives)
        chosen.append([torch.relu(d[a][p] - d[a][n] + margin) for p, n in pairs])
    every = [loss for losses in chosen for loss in losses]
    return chosen, sum(1 for loss in every if mining == "batch-hard" or loss > 0)


def plain_pairs(x, y, margin, positive_margin, form, normalize):
    """The losses of genuine and of impostor pairs, each with the numbers of its two samples."""
    d = distance_table(x, "squared" if form == "squared-distance" else "euclidean", normalize)
    kinds = [], []
    for i, j in itertools.combinations(range(len(x)), 2):
        genuine = bool(y[i] == y[j])
        value = torch.relu(d[i][j] - positive_margin if genuine else margin - d[i][j])
        loss = {"hadsell": value**2 / 2, "squared-distance": value / 2, "double-margin": value}[form]
        kinds[0 if genuine else 1].append((loss, i, j))
    return kinds


def total(values):
    return torch.stack(list(values)).sum()


def assert_same(loss, plain, x, tolerance=1e-10):
    """Values and gradients of two functions of the embeddings, the second in float64."""
    ours, theirs = leaf(x), leaf(x.double())
    value, expected = loss(ours), plain(theirs)
    upstream = torch.linspace(1, 2, value.numel(), dtype=torch.float64).view(value.shape)
    value.backward(upstream.to(value.dtype))
    expected.backward(upstream)
    assert expected.count_nonzero() > 0 and theirs.grad.count_nonzero() > 0
    assert relative_error(value, expected) < tolerance and relative_error(ours.grad, theirs.grad) < tolerance


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("ignored", [False, True])
def test_triplets(mining, distance, ignored):
    x, y = samples()
    kept = torch.arange(14) % 5 != 2 if ignored else torch.ones(14, dtype=torch.bool)
    labels = y.masked_fill(~kept, -100)
    margin = 0.3
    chosen, _ = plain_triplets(x[kept], y[kept], margin, mining, distance)
    assert len([loss for losses in chosen for loss in losses if loss > 0]) > 3

    def plain(a, reduction):
        chosen, count = plain_triplets(a[kept], y[kept], margin, mining, distance)
        sums = torch.stack([total(losses) if losses else a.sum() * 0 for losses in chosen])
        if reduction == "none":
            return sums.new_zeros(14).masked_scatter(kept, sums)
        return sums.sum() / (count if reduction == "mean" else 1)

    for reduction in ("mean", "sum", "none"):
        loss_fn = fm.TripletLoss(margin, mining=mining, distance=distance, reduction=reduction)
        assert_same(lambda a, loss_fn=loss_fn: loss_fn(a, labels), partial(plain, reduction=reduction), x)
    if distance == "angle":
        assert torch.equal(
            fm.AngularTripletLoss(margin, mining=mining, reduction="none")(x, labels), loss_fn(x, labels)
        )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("normalize", [False, True])
def test_contrastive(form, average, normalize):
    x, y = samples()
    kept = torch.arange(14) != 3
    labels, margins = y.masked_fill(~kept, -100), (0.6, 0.2)

    def plain(a, reduction):
        genuine, impostor = plain_pairs(a[kept], y[kept], *margins, form, normalize)
        if reduction == "none":
            own = [total(loss for loss, *pair in genuine + impostor if i in pair) / 2 for i in range(13)]
            return torch.zeros(14, dtype=torch.float64).masked_scatter(kept, torch.stack(own))
        kinds = [genuine + impostor] if average == "all" or reduction == "sum" else [genuine, impostor]
        kinds = [[loss for loss, *_ in kind if average != "separate-nonzero" or loss > 0] for kind in kinds]
        return total(total(kind) / (1 if reduction == "sum" else len(kind)) for kind in kinds)

    for reduction in ("mean", "sum", "none"):
        loss_fn = fm.ContrastiveLoss(*margins, form=form, normalize=normalize, average=average, reduction=reduction)
        assert_same(lambda a, loss_fn=loss_fn: loss_fn(a, labels), partial(plain, reduction=reduction), x)


def test_lecture_and_paper_by_hand():
    x = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.0, 2.0]])  # 0.5 apart, and 2 and 1.628 from the third
    y = torch.tensor([0, 0, 1])
    far = 0.3**2 + 1.6**2
    for form, impostors in (("hadsell", (3 - 2) ** 2 + (3 - far**0.5) ** 2), ("squared-distance", 0 + 3 - far)):
        loss = fm.ContrastiveLoss(3.0, form=form, normalize=False, reduction="sum")(x, y)
        assert loss.item() == pytest.approx((0.25 + impostors) / 2)


@pytest.mark.parametrize("mining", ["semihard", "hard", "all"])
def test_triplets_are_those_of_pytorch_metric_learning(mining):
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    from pytorch_metric_learning import losses, miners

    distance = distances.LpDistance(normalize_embeddings=True, p=2, power=2)
    miner = miners.TripletMarginMiner(0.2, type_of_triplets=mining, distance=distance)
    theirs = losses.TripletMarginLoss(0.2, distance=distance)
    x, y = samples(40, 6, 8)
    assert_same(lambda a: fm.TripletLoss(mining=mining)(a, y), lambda a: theirs(a, y, miner(a, y)), x)


LOSSES = [
    *(fm.TripletLoss(mining=mining) for mining in MINING),
    *(fm.TripletLoss(distance=distance, mining="all") for distance in ("euclidean", "angle")),
    *(fm.ContrastiveLoss(1.2, form=form) for form in FORMS),
    fm.DeepID2Loss(2.0),
]


@pytest.mark.parametrize("loss_fn", LOSSES, ids=repr)
def test_edge_cases(loss_fn):
    x, y = samples()
    assert gradcheck(lambda a: loss_fn(a, y), (leaf(x),))
    expected = leaf(x.float())
    reference = loss_fn(expected, y)
    reference.backward()
    assert reference.dtype == torch.float32
    for layout in ("transposed", "misaligned"):
        strided = in_layout(x.float(), layout).requires_grad_()
        assert torch.equal(loss_fn(strided, y.to(torch.int16)), reference)
    for dtype in (torch.float16, torch.bfloat16):
        half = leaf(x.to(dtype))
        same = leaf(half.float())
        loss, full = loss_fn(half, y), loss_fn(same, y)
        assert loss.dtype == torch.float32 and torch.equal(loss, full)
        loss.backward()
        full.backward()
        assert torch.equal(half.grad, same.grad.to(dtype))
    # no pairs or no triplets of both kinds: 0 with a gradient of 0
    for count, labels in ((0, []), (1, [3]), (3, [-100] * 3), (4, [-100, 1, -100, -100])):
        nothing = leaf(x[:count])
        loss = loss_fn(nothing, torch.tensor(labels, dtype=torch.int64))
        loss.backward()
        assert loss == 0 and nothing.grad.count_nonzero() == 0
    broken = x.clone()
    broken[3, 1] = math.nan
    assert loss_fn(broken, y).isnan()
    y[3] = -100
    ignored = leaf(broken)
    loss_fn(ignored, y).backward()
    assert ignored.grad.isfinite().all() and ignored.grad[3].count_nonzero() == 0


@pytest.mark.parametrize("loss_fn", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_distances_have_none(loss_fn, dtype):
    x = torch.eye(4, dtype=dtype)[[0, 0, 0, 1, 1, 2, 2]]
    x[1], x[6] = -x[1], 0.0  # equal, opposite and zero rows, within and between classes
    a = leaf(x)
    loss_fn(a, torch.tensor([0, 0, 1, 1, 2, 2, 3])).backward()
    assert a.grad.isfinite().all() and a.grad.abs().max() < 60


def test_distances_are_accurate_beside_long_embeddings():
    generator = torch.Generator().manual_seed(0)
    x = 1000 + 1e-3 * torch.randn(6, 16, generator=generator)  # float32 products would cancel to noise
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    for form in FORMS:
        loss_fn = fm.ContrastiveLoss(1e-2, form=form, normalize=False, reduction="sum")

        def plain(a, form=form):
            return total(loss for kind in plain_pairs(a, y, 1e-2, 0.0, form, False) for loss, *_ in kind)

        assert_same(lambda a, loss_fn=loss_fn: loss_fn(a, y), plain, x, 1e-4)


@pytest.mark.parametrize("mining", MINING)
def test_no_tensor_grows_with_the_number_of_triplets(mining):
    count = 240
    x, y = torch.randn(count, 4, requires_grad=True), torch.arange(count) % 2
    with LargestTensor() as largest:
        fm.TripletLoss(mining=mining)(x, y).backward()
    assert count**2 <= largest.elements <= count * (count + 1)


def verification_error(distance, genuine, threshold):
    accepted = distance < threshold
    return ((~accepted & genuine).sum() / genuine.sum() + (accepted & ~genuine).sum() / (~genuine).sum()).item()


def test_verification_threshold_has_the_smallest_error():
    generator = torch.Generator().manual_seed(0)
    genuine = torch.arange(60) % 6 == 0
    distance = (torch.rand(60, generator=generator) * 8).round() / 4 + ~genuine  # with ties
    threshold = verification_threshold(distance, genuine)
    candidates = [verification_error(distance, genuine, t) for t in torch.linspace(-1, 5, 2001)]
    assert 0 < verification_error(distance, genuine, threshold) == pytest.approx(min(candidates))
    assert verification_threshold(distance[:1], genuine[:1]).isnan()
    assert verification_threshold(distance[genuine], genuine[genuine]).isnan()


def pair_distances(x, y):
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (x[i] - x[j]).norm(dim=1), y[i] == y[j]


def test_margin_is_the_threshold_of_the_pairs_seen_since_the_last_update():
    loss_fn = fm.DeepID2Loss(update_every=200, reduction="sum")
    batches = [samples(seed=seed) for seed in range(5)]  # of 91 pairs each
    batches[1][1][0] = -100
    margin = verification_threshold(*pair_distances(*batches[0]))  # of the first batch
    seen = []
    for x, y in batches:
        loss = loss_fn(x, y)
        genuine, impostor = plain_pairs(x[y != -100], y[y != -100], margin, 0.0, "hadsell", False)
        assert relative_error(loss, total(value for value, *_ in genuine + impostor)) < 1e-10
        seen.append(pair_distances(x[y != -100], y[y != -100]))
        if sum(len(distance) for distance, _ in seen) >= 200:
            margin = verification_threshold(*map(torch.cat, zip(*seen, strict=True)))
            seen = []
        assert loss_fn.margin.item() == pytest.approx(margin.item(), rel=1e-6)
    assert loss_fn.recent_count == 91 * 2
    assert loss_fn.half().margin.dtype == loss_fn.recent_distance.dtype == torch.float64
    state = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    loss_fn.eval()(*batches[0])
    assert all(torch.equal(value, state[name]) for name, value in loss_fn.state_dict().items())
    other = fm.DeepID2Loss(update_every=200, reduction="sum")
    other.load_state_dict(state)
    assert torch.equal(other(*batches[2]), loss_fn.train()(*batches[2])) and torch.equal(other.margin, loss_fn.margin)


def test_repeated_forward_of_a_checkpoint_counts_pairs_once():
    plain, recomputed = (fm.DeepID2Loss(update_every=150) for _ in range(2))
    for seed in range(3):
        x, y = samples(seed=seed)
        a, b = leaf(x), leaf(x)
        plain(a, y).backward()
        checkpoint(recomputed, b, y, use_reentrant=False).backward()
        assert torch.equal(a.grad, b.grad)
    for name, value in plain.state_dict().items():
        assert torch.equal(recomputed.state_dict()[name], value)
    assert plain.recent_count == 91


@pytest.mark.slow
@pytest.mark.parametrize("make", [fm.TripletLoss, fm.AngularTripletLoss, fm.ContrastiveLoss, fm.DeepID2Loss])
def test_compiled_calls(make):
    torch._dynamo.reset()
    eager, compiled = make(), make()
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, y = samples(seed=seed)
        a, b = leaf(x), leaf(x)
        eager(a, y).backward()
        step(b, y).backward()
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in eager.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value)


RANK_LOSSES = {
    **{mining: partial(fm.TripletLoss, mining=mining) for mining in ("batch-hard", "all")},
    "angular": partial(fm.AngularTripletLoss, mining="semihard"),
    "contrastive": partial(fm.ContrastiveLoss, 1.0, form="double-margin", average="separate"),
    "deepid2": partial(fm.DeepID2Loss, update_every=150),
}


def rank_steps(group, name, batches):
    """Losses and gradients of steps on the samples of one rank, and the state after them."""
    results, loss_fns = [], [RANK_LOSSES[name](reduction=r, process_group=group) for r in ("mean", "sum", "none")]
    for x, y in batches:
        for loss_fn in loss_fns:
            a = leaf(x)
            loss = loss_fn(a, y)
            loss.sum().backward()
            results.append((loss.detach(), a.grad))
    return results, {key: value for loss_fn in loss_fns for key, value in loss_fn.state_dict().items()}


@pytest.mark.parametrize("name", RANK_LOSSES)
@pytest.mark.parametrize("counts", [[7, 7], [0, 9, 5]])
def test_ranks_equal_one_device(ranks, name, counts):
    batches = [samples(seed=seed) for seed in range(3)]
    parts = [[(x.split(counts)[r], y.split(counts)[r]) for x, y in batches] for r in range(len(counts))]
    answers = ranks.run(rank_steps, [(name, part) for part in parts])
    expected, state = rank_steps(None, name, batches)
    for number, (loss, gradient) in enumerate(expected):
        losses, gradients = zip(*(results[number] for results, _ in answers), strict=True)
        if loss.dim():
            torch.testing.assert_close(torch.cat(losses), loss)
        else:
            for of_rank in losses:
                torch.testing.assert_close(of_rank, loss)
        torch.testing.assert_close(torch.cat(gradients), gradient)
    for _, of_rank in answers:
        assert all(torch.equal(of_rank[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    "loss_fn",
    [
        *(fm.TripletLoss(mining=mining) for mining in MINING),
        fm.AngularTripletLoss(),
        fm.ContrastiveLoss(),
        fm.DeepID2Loss(),
    ],
    ids=repr,
)
def test_training_separates_classes(loss_fn):
    x, y = samples(24, 4, 6)
    x = leaf(x - 1.5)
    optimizer = torch.optim.SGD([x], lr=2.0 if isinstance(loss_fn, fm.TripletLoss) else 20.0)

    def share_of_correct_neighbours():
        unit = torch.nn.functional.normalize(x.detach())
        return (y[(unit @ unit.t()).fill_diagonal_(-2).argmax(1)] == y).double().mean().item()

    before, losses = share_of_correct_neighbours(), []
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(loss_fn(x, y))
        losses[-1].backward()
        optimizer.step()
    assert before < 0.5 and share_of_correct_neighbours() > 0.9


X, Y = torch.randn(4, 3), torch.tensor([0, 0, 1, -100])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.TripletLoss(-0.1), ValueError, "margin"),
        (lambda: fm.TripletLoss("0.2"), TypeError, "margin"),
        (lambda: fm.TripletLoss(mining="easy"), ValueError, "mining: expected one of 'batch-hard'"),
        (lambda: fm.TripletLoss(distance="cosine"), ValueError, "distance"),
        (lambda: fm.TripletLoss(distance="angle", normalize=False), ValueError, "normalize"),
        (lambda: fm.TripletLoss(normalize="no"), TypeError, "normalize"),
        (lambda: fm.TripletLoss(reduction="max"), ValueError, "reduction"),
        (lambda: fm.TripletLoss(ignore_index=None), TypeError, "ignore_index"),
        (lambda: fm.TripletLoss(process_group="world"), TypeError, "process_group"),
        (lambda: fm.TripletLoss()(X[0], Y), ValueError, "embeddings"),
        (lambda: fm.TripletLoss()(X.long(), Y), TypeError, "embeddings"),
        (lambda: fm.TripletLoss()(X, Y[:3]), ValueError, "labels"),
        (lambda: fm.AngularTripletLoss()(X, Y.float()), TypeError, "labels"),
        (lambda: setattr(fm.AngularTripletLoss(), "distance", "squared"), ValueError, "distance"),
        (lambda: fm.ContrastiveLoss(1.0, 1.5), ValueError, "positive_margin"),
        (lambda: setattr(fm.ContrastiveLoss(1.0, 0.5), "margin", 0.2), ValueError, "positive_margin"),
        (lambda: fm.ContrastiveLoss(form="l1"), ValueError, "form"),
        (lambda: fm.ContrastiveLoss(average="none"), ValueError, "average"),
        (lambda: fm.DeepID2Loss(-1.0), ValueError, "margin"),
        (lambda: fm.DeepID2Loss(update_every=0), ValueError, "update_every"),
        (lambda: setattr(fm.DeepID2Loss(), "update_every", 5), AttributeError, "update_every"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
