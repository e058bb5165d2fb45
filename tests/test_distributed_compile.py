"""Ops on divided classes under torch.compile, and torch's own checks of the ops, on several ranks."""

import warnings

import pytest
import torch
from loss_inputs import problem, relative_error

import fused_margin as fm
from fused_margin._ops import collectives, library
from fused_margin._ops.inputs import PORTABLE, LossInputs
from fused_margin._ops.nearest import cache
from fused_margin._ops.nearest import library as nearest_ops
from fused_margin.distributed import Shard, slice_of

CLASSES, SIZE = 23, 12
LOSSES = {
    "arcface": lambda **options: fm.ArcFaceLoss(CLASSES, SIZE, **options),
    "exclusive": lambda **options: fm.ArcFaceLoss(CLASSES, SIZE, exclusive_weight=2.0, **options),
    "certified": lambda **options: fm.ArcFaceLoss(
        CLASSES, SIZE, exclusive_weight=2.0, exclusive_refresh="certified", **options
    ),
    "smoothed": lambda **options: fm.CosFaceLoss(CLASSES, SIZE, label_smoothing=0.1, reduction="sum", **options),
    "each": lambda **options: fm.ArcFaceLoss(CLASSES, SIZE, reduction="none", **options),
    "adaface": lambda **options: fm.AdaFaceLoss(CLASSES, SIZE, **options),
    "sphereface": lambda **options: fm.SphereFaceLoss(CLASSES, SIZE, **options),
    "softmax": lambda **options: fm.SoftmaxLoss(CLASSES, SIZE, **options),
    "lsoftmax": lambda **options: fm.LSoftmaxLoss(CLASSES, SIZE, **options),
    "sampled": lambda **options: fm.ArcFaceLoss(CLASSES, SIZE, sample_rate=0.4, **options),
}


def samples_of(rank):
    """Samples of a rank; each rank has a different number."""
    generator = torch.Generator().manual_seed(rank)
    count = 5 + 2 * rank
    embeddings = torch.randn(count, SIZE, generator=generator)
    return embeddings, torch.randint(0, CLASSES, (count,), generator=generator)


def steps(group, name, backend):
    """Losses and gradients of two steps, compiled as one graph, or eager for backend None."""
    torch.manual_seed(0)
    loss_fn = LOSSES[name](process_group=group)
    begin, end = slice_of(CLASSES, group.rank(), group.size())
    with torch.no_grad():
        loss_fn.weight.copy_(problem(1, CLASSES, SIZE)[1][begin:end])
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler warns about its own code
        step = loss_fn if backend is None else torch.compile(loss_fn, fullgraph=True, backend=backend)
        results = []
        for number in range(2):
            embeddings, labels = samples_of(group.rank() + number)
            embeddings.requires_grad_()
            torch.manual_seed(number)  # seeds the sampling of classes
            loss = step(embeddings, labels)
            loss.sum().backward()
            results += [loss.detach(), embeddings.grad, *(p.grad.clone() for p in loss_fn.parameters())]
    return results


QUICK = {("adaface", 2), ("sampled", 2)}


@pytest.mark.parametrize(
    ("name", "world_size"),
    [
        pytest.param(name, world_size, marks=[pytest.mark.slow] * ((name, world_size) not in QUICK))
        for name in LOSSES
        for world_size in (2, 4)
    ],
)
def test_compiled_as_one_graph(ranks, name, world_size):
    eager = ranks.run(steps, [(name, None)] * world_size)
    compiled = ranks.run(steps, [(name, "aot_eager")] * world_size)
    for expected, measured in zip(eager, compiled, strict=True):
        for e, m in zip(expected, measured, strict=True):
            assert relative_error(m, e) < 1e-6


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_compiled_by_inductor(ranks, world_size):
    eager = ranks.run(steps, [("exclusive", None)] * world_size)
    compiled = ranks.run(steps, [("exclusive", "inductor")] * world_size)
    for expected, measured in zip(eager, compiled, strict=True):
        for e, m in zip(expected, measured, strict=True):
            assert relative_error(m, e) < 1e-6


def run_opcheck(group, options):
    """Run torch.library.opcheck on the forward and backward ops."""
    shard = Shard(CLASSES, group)
    embeddings, labels = samples_of(group.rank())
    weight = problem(1, CLASSES, SIZE)[1][shard.begin : shard.begin + shard.size].float()
    options = dict(options)
    if options.pop("scale", False):
        options["sample_scale"] = (torch.rand(len(labels), dtype=torch.float64) + 5).requires_grad_()
    if options.get("inner_product"):
        options["bias"] = torch.randn(shard.size, dtype=torch.float64, requires_grad=True)
    inputs = LossInputs(
        embeddings.requires_grad_(), weight.requires_grad_(), 1 << 20, PORTABLE, labels, group=shard.name,
        num_classes=CLASSES, **options,
    )  # fmt: skip
    arguments = [getattr(inputs, field.name) for field in library.FIELDS]
    torch.library.opcheck(library.forward_chunks, (*arguments, False, -100, True))
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    saved = library.forward_chunks(*detached, False, -100, True)
    upstream = [torch.randn(len(labels), dtype=torch.float64) for _ in range(2)]
    nearest = torch.randn(shard.size) if inputs.nearest else None
    bias = torch.randn(len(labels), dtype=torch.float64) if inputs.inner_product else None
    upstream = [*upstream, None, nearest, bias, None]
    needs = (True, True, inputs.bias is not None)
    torch.library.opcheck(library.backward_chunks, (*detached, *upstream, *saved, *needs))


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [{"nearest": True}, {"scale": True}, {"sample_rate": 0.5}, {"inner_product": True}],
    ids=lambda options: next(iter(options)),
)
def test_opcheck(ranks, world_size, options):
    ranks.run(run_opcheck, [(options,)] * world_size)


def run_opcheck_of_other_ops(group):
    shard = Shard(CLASSES, group)
    weight = problem(1, CLASSES, SIZE)[1][shard.begin : shard.begin + shard.size].float()
    place = (shard.name, CLASSES)
    state = cache.new_cache(weight, CLASSES)
    torch.library.opcheck(nearest_ops.certified_nearest, (weight, *state, 1 << 20, *place))
    index, age = torch.zeros(shard.size, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(nearest_ops.periodic_nearest, (weight, index, age, 3, True, 1 << 20, *place))
    for op in (collectives.all_reduce_forward, collectives.all_reduce_backward):
        torch.library.opcheck(op, (torch.randn(3, dtype=torch.float64, requires_grad=True), shard.name))
    embeddings, labels = samples_of(group.rank())
    torch.library.opcheck(collectives.divided_target_cosines, (embeddings, weight, labels, 1, -100, *place))


@pytest.mark.parametrize("world_size", [2, 4])
def test_opcheck_of_other_ops(ranks, world_size):
    ranks.run(run_opcheck_of_other_ops, [()] * world_size)
