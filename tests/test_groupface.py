"""GroupFace against its paper's equations, written out sample by sample, and the state of its loss."""

import copy
import math
import warnings

import pytest
import torch
from loss_inputs import leaf, relative_error
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fused_margin as fm

N, SHARED, D, K = 7, 6, 5, 4


def features(samples=N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, SHARED, generator=generator, dtype=torch.float64)


def group_logits(samples=N, groups=K, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, groups, generator=generator, dtype=torch.float64) * spread


def head(aggregation="soft", dtype=torch.float64):
    torch.manual_seed(0)
    module = fm.GroupFace(SHARED, D, K, aggregation=aggregation, hidden_features=8, dtype=torch.float64)
    with torch.no_grad():
        for layer in module.decision[::2]:  # probabilities far from 1 / K
            layer.weight.mul_(3.0)
            layer.bias.zero_()
    return module.to(dtype)


def prelu(x, slope):
    return torch.where(x > 0, x, slope * x)


def plain_embedding(module, z):
    """One embedding (D,) and the logits (K,) of one sample z (SHARED,), by a loop over the groups."""
    state = dict(module.named_parameters())
    v = state["instance.weight"] @ z + state["instance.bias"]
    hidden = v
    for layer, activation in ((0, 1), (2, 3)):
        hidden = state[f"decision.{layer}.weight"] @ hidden + state[f"decision.{layer}.bias"]
        hidden = prelu(hidden, state[f"decision.{activation}.weight"])
    logits = state["decision.4.weight"] @ hidden + state["decision.4.bias"]
    representations = []
    for k in range(module.num_groups):
        rows = slice(k * module.embedding_size, (k + 1) * module.embedding_size)
        representations.append(state["groups.weight"][rows] @ z + state["groups.bias"][rows])
    exponentials = logits.exp()
    if module.aggregation == "hard":
        return v + representations[int(exponentials.argmax())], logits
    total = exponentials.sum()
    return v + sum(e / total * r for e, r in zip(exponentials, representations, strict=True)), logits


@pytest.mark.parametrize("aggregation", ["soft", "hard"])
def test_head_formula(aggregation):
    module, z = head(aggregation), features()
    assert len({int(plain_embedding(module, row)[1].argmax()) for row in z}) > 1
    upstream, upstream_logits = torch.randn(N, D, dtype=torch.float64), torch.randn(N, K, dtype=torch.float64)

    def run(forward):
        module.zero_grad()
        x = leaf(z)
        embeddings, logits = forward(x)
        ((embeddings * upstream).sum() + (logits * upstream_logits).sum()).backward()
        return [embeddings.detach(), logits.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]

    ours = run(module)
    theirs = run(
        lambda x: [torch.stack(rows) for rows in zip(*(plain_embedding(module, row) for row in x), strict=True)]
    )
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape and relative_error(mine, expected) < 1e-12


def test_decision_network_is_trained_by_the_embeddings_only_with_soft_aggregation():
    for aggregation, trained in (("soft", True), ("hard", False)):
        module = head(aggregation)
        module(features()).embeddings.square().sum().backward()
        assert all((p.grad is not None) == trained for p in module.decision.parameters())
    assert gradcheck(lambda x: tuple(head()(x)), (leaf(features(3)),))


def test_evaluation_mode_returns_embeddings():
    module = head()
    output = module(features())
    assert isinstance(output, fm.GroupFaceOutput) and output.group_logits.shape == (N, K)
    assert torch.equal(module.eval()(features()), output.embeddings)
    assert module(features(0)).shape == (0, D)
    torch.testing.assert_close(module(features().t().contiguous().t()), module(features()))  # strided


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_head_in_lower_precision(dtype):
    exact, module = head(), head(dtype=dtype)
    output = module(features().to(dtype))
    assert output.embeddings.dtype == output.group_logits.dtype == dtype
    assert relative_error(output.embeddings, exact(features()).embeddings) < 8 * torch.finfo(dtype).eps
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head(dtype=torch.float32)(features().float())
    assert relative_error(mixed.embeddings, exact(features()).embeddings) < 8 * torch.finfo(torch.bfloat16).eps


@pytest.mark.slow
@pytest.mark.parametrize("aggregation", ["soft", "hard"])
def test_compiled_head(aggregation):
    torch._dynamo.reset()
    module, x = head(aggregation), features()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(tuple(compiled), tuple(module(x)))
    again = checkpoint(module, leaf(x), use_reentrant=False)
    torch.testing.assert_close(tuple(again), tuple(module(x)))


class PlainGrouping:
    """The labels and the loss of the paper, with lists of the probabilities of recent batches."""

    def __init__(self, batches):
        self.batches, self.recent = batches, []

    def __call__(self, logits, ignored=()):
        probability = [[math.exp(v) / sum(math.exp(w) for w in row) for v in row] for row in logits.tolist()]
        kept = [row for i, row in enumerate(probability) if i not in ignored]
        self.recent = [*self.recent, kept][-self.batches :] if kept else self.recent
        seen = [row for batch in self.recent for row in batch]
        groups = logits.shape[1]
        mean = [sum(row[k] for row in seen) / len(seen) for k in range(groups)]
        labels = []
        for row in probability:
            normalized = [(p - e) / groups + 1 / groups for p, e in zip(row, mean, strict=True)]
            labels.append(max(range(groups), key=normalized.__getitem__))
        losses = [-math.log(row[label]) for row, label in zip(probability, labels, strict=True)]
        return labels, [0.0 if i in ignored else loss for i, loss in enumerate(losses)]


def test_self_grouping_over_several_batches():
    loss_fn, plain = fm.SelfGroupingLoss(K, batches=3, reduction="none"), PlainGrouping(3)
    differs = 0
    for step in range(6):
        logits = group_logits(N + step, seed=step, spread=0.5) + torch.tensor([3.0, 0.0, 0.0, 1.0])
        ignored = {1, 4} if step == 2 else set()
        identities = torch.full((len(logits),), 9).index_fill_(0, torch.tensor(sorted(ignored), dtype=torch.long), -100)
        expected_labels, expected = plain(logits, ignored)
        x = leaf(logits)
        loss = loss_fn(x, identities)
        torch.testing.assert_close(loss.detach(), torch.tensor(expected, dtype=torch.float64))
        assert loss_fn.group_labels(logits).tolist() == expected_labels
        differs += (logits.argmax(1) != torch.tensor(expected_labels)).sum()
        loss.sum().backward()  # the labels are constants: softmax minus one-hot
        gradient = logits.softmax(1) - F.one_hot(torch.tensor(expected_labels), K)
        gradient[sorted(ignored)] = 0.0
        torch.testing.assert_close(x.grad, gradient)
    assert differs > 10 and loss_fn.recent.sum() == pytest.approx(sum(N + step for step in (3, 4, 5)))
    before = loss_fn.recent.clone()
    logits = group_logits(seed=9)
    mean = (before / before.sum()).sum(0)
    target = (logits.softmax(1) - mean).argmax(1)
    loss = copy.deepcopy(loss_fn).eval()(logits)
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none"))
    assert torch.equal(loss_fn.recent, before)


def test_reductions_and_gradient():
    logits = group_logits()
    none = fm.SelfGroupingLoss(K, reduction="none")(logits)
    torch.testing.assert_close(fm.SelfGroupingLoss(K)(logits), none.mean())
    torch.testing.assert_close(fm.SelfGroupingLoss(K, reduction="sum")(logits), none.sum())
    loss_fn = fm.SelfGroupingLoss(K).eval()
    assert torch.equal(loss_fn.expectation, torch.full((K,), 0.25, dtype=torch.float64))
    assert gradcheck(loss_fn, (leaf(logits),))


def test_labels_balance_groups():
    """One group has by far the largest probability everywhere; naive labels are all of this group."""
    loss_fn, counts, naive = fm.SelfGroupingLoss(8, batches=4), torch.zeros(8), torch.zeros(8)
    for seed in range(30):
        logits = group_logits(64, 8, seed=seed, spread=0.5) + 4.0 * F.one_hot(torch.tensor(2), 8)
        loss_fn(logits)
        counts += torch.bincount(loss_fn.group_labels(logits), minlength=8)
        naive += torch.bincount(logits.argmax(1), minlength=8)
    assert naive[2] == naive.sum() and counts[2] < 0.6 * counts.sum() and (counts > 0.03 * counts.sum()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype):
    logits = leaf(group_logits().to(dtype))
    loss, expected = fm.SelfGroupingLoss(K)(logits), fm.SelfGroupingLoss(K)(logits.detach().double())
    assert loss.dtype == torch.float32 and relative_error(loss, expected) < 1e-6
    loss.backward()
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


def test_nan_and_rejected_batches_do_not_change_the_expectation():
    loss_fn, logits = fm.SelfGroupingLoss(K, batches=2), group_logits()
    bad = logits.clone()
    bad[2, 1] = math.nan
    assert loss_fn(bad).isnan()
    torch.testing.assert_close(loss_fn.recent[-1], logits[[0, 1, 3, 4, 5, 6]].softmax(1).sum(0))
    before = loss_fn.recent.clone()
    with pytest.raises(ValueError, match="reduction"):
        loss_fn.reduction = "max"
    with pytest.raises(TypeError, match="labels"):
        loss_fn(logits, [1])
    loss_fn(logits, torch.full((N,), -100))
    loss_fn(logits[:0])
    assert torch.equal(loss_fn.recent, before)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_and_accumulated_loss(use_reentrant):
    """A recomputation reads the state of the first run and does not change the current one."""
    plain, other = (fm.SelfGroupingLoss(K, batches=2) for _ in range(2))
    for step in range(3):
        parts = [group_logits(seed=2 * step + part) for part in range(2)]
        ours, theirs = ([leaf(part) for part in parts] for _ in range(2))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sum(checkpoint(other, part, use_reentrant=use_reentrant) for part in ours).backward()
        sum(plain(group_logits=part) for part in theirs).backward()
        for mine, expected in zip(ours, theirs, strict=True):
            assert torch.equal(mine.grad, expected.grad)
    assert torch.equal(plain.recent, other.recent)


@pytest.mark.slow
def test_compiled_loss_updates_its_state():
    torch._dynamo.reset()
    eager, compiled = (fm.SelfGroupingLoss(K, batches=2) for _ in range(2))
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.testing.assert_close(step(group_logits(seed=seed)), eager(group_logits(seed=seed)))
    assert torch.equal(compiled.recent, eager.recent) and eager.recent.all()


def test_state_keeps_its_dtype_and_is_saved():
    loss_fn = fm.SelfGroupingLoss(K, batches=2).half()
    loss_fn(group_logits().half())
    other = fm.SelfGroupingLoss(K, batches=2)
    other.load_state_dict(loss_fn.state_dict())
    assert other.recent.dtype == torch.float64 and torch.equal(other.recent, loss_fn.recent)
    with pytest.raises(RuntimeError, match="recent"):
        fm.SelfGroupingLoss(K, batches=3).load_state_dict(loss_fn.state_dict())


def grouped_step(group, logits, reduction):
    loss_fn, results = fm.SelfGroupingLoss(K, batches=2, process_group=group, reduction=reduction), []
    for batch in logits:
        x = leaf(batch)
        loss = loss_fn(x)
        loss.sum().backward()
        results.append((loss.detach(), x.grad))
    return results, loss_fn.recent


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ranks_share_the_expectation(ranks, reduction):
    batches, counts = [group_logits(12, seed=seed) for seed in range(3)], [5, 0, 7]
    whole, recent = grouped_step(None, batches, reduction)
    parts = ranks.run(grouped_step, [([b.split(counts)[rank] for b in batches], reduction) for rank in range(3)])
    for step, (loss, gradient) in enumerate(whole):
        own = [results[step] for results, _ in parts]
        torch.testing.assert_close(torch.cat([rows for _, rows in own]), gradient)
        if reduction == "none":
            torch.testing.assert_close(torch.cat([rows for rows, _ in own]), loss)
        else:
            for mine, _ in own:
                torch.testing.assert_close(mine, loss)
    for _, other in parts:
        torch.testing.assert_close(other, recent)


def test_learning():
    """A backbone, the head, ArcFace and the self-grouping loss: all parts fall, and several groups are used."""
    torch.manual_seed(0)
    centers = torch.randn(10, 12)
    backbone, module = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.PReLU()), fm.GroupFace(16, 8, K)
    arcface, group_loss = fm.ArcFaceLoss(10, 8, margin=0.2, scale=16.0), fm.SelfGroupingLoss(K, batches=8)
    optimizer = torch.optim.Adam([*backbone.parameters(), *module.parameters(), *arcface.parameters()], lr=0.01)
    losses = []
    for _ in range(60):
        labels = torch.randint(10, (64,))
        output = module(backbone(centers[labels] + 0.3 * torch.randn(64, 12)))
        parts = arcface(output.embeddings, labels), group_loss(output.group_logits)
        losses.append([part.item() for part in parts])
        optimizer.zero_grad()
        (parts[0] + 0.1 * parts[1]).backward()
        optimizer.step()
    first, last = torch.tensor(losses[:5]).mean(0), torch.tensor(losses[-5:]).mean(0)
    assert last[0] < 0.2 * first[0] and last[1] < 0.8 * first[1]
    predicted = module(backbone(centers)).group_logits.argmax(1)
    assert len(predicted.unique()) >= 2


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fm.GroupFace(0, D), ValueError, "in_features"),
        (lambda: fm.GroupFace(SHARED, 0), ValueError, "embedding_size"),
        (lambda: fm.GroupFace(SHARED, D, 0), ValueError, "num_groups"),
        (lambda: fm.GroupFace(SHARED, D, 2.5), TypeError, "num_groups"),
        (lambda: fm.GroupFace(SHARED, D, hidden_features=0), ValueError, "hidden_features"),
        (lambda: fm.GroupFace(SHARED, D, aggregation="sum"), ValueError, "aggregation: expected one of 'soft', 'hard'"),
        (lambda: head()(features()[:, 1:]), ValueError, r"features: expected shape \(N, 6\), got \(7, 5\)"),
        (lambda: head()(features()[0]), ValueError, "features"),
        (lambda: head()([1.0]), TypeError, "features"),
        (lambda: fm.SelfGroupingLoss(0), ValueError, "num_groups"),
        (lambda: fm.SelfGroupingLoss(K, batches=0), ValueError, "batches"),
        (lambda: fm.SelfGroupingLoss(K, reduction="max"), ValueError, "reduction"),
        (lambda: fm.SelfGroupingLoss(K)(group_logits(groups=3)), ValueError, r"group_logits: expected shape \(N, 4\)"),
        (lambda: fm.SelfGroupingLoss(K)(group_logits()[0]), ValueError, "group_logits"),
        (lambda: fm.SelfGroupingLoss(K)(group_logits().long()), TypeError, "group_logits"),
        (lambda: fm.SelfGroupingLoss(K)(group_logits(), torch.zeros(3).long()), ValueError, "labels"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()
