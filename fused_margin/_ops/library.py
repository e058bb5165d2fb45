"""The torch.library ops: schemas, fakes for torch.compile, and their gradients."""

from dataclasses import fields
from itertools import islice

import torch
from torch import Tensor

from fused_margin._ops import forward_backward as _sweep
from fused_margin._ops.inputs import Gradients, Problem, Sweep, SweepGradients, compute_dtype
from fused_margin._ops.kernels import kernels, on_device
from fused_margin._ops.nearest import cache, search
from fused_margin._ops.registration import refuse_second_order, register
from fused_margin.losses.running_state import current_age, recomputing

# A problem's fields are the first arguments of the ops on it, in their order.
FIELDS = fields(Problem)
_SCHEMA_TYPE = {
    Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", int: "SymInt", bool: "bool", str: "str"
}  # fmt: skip
_PROBLEM = ", ".join(f"{_SCHEMA_TYPE[field.type]} {field.name}" for field in FIELDS)

# Order of MarginDerivative in csrc/kernels.h
DERIVATIVES = ("negative_logsumexp", "target_cosine", "uniform_cosine", "scale", "m1", "m2", "m3", "annealing")


def _outputs(kind: type) -> str:
    return f"({', '.join(['Tensor'] * len(kind._fields))})"


def _inputs(kind: type, prefix: str = "") -> str:
    """An argument for each field: autograd and vmap do not see the tensors of a list in which there may be None."""
    return ", ".join(f"{_SCHEMA_TYPE[kind.__annotations__[name]]} {prefix}{name}" for name in kind._fields)


def _sweep_kernel(*arguments):
    *problem, uniform, ignore_index, keep = arguments
    return tuple(_sweep.forward(Problem(*problem), uniform, ignore_index, keep))


def _sweep_fake(*arguments):
    *problem, uniform, _ignore_index, keep = arguments
    return tuple(_sweep.empty_sweep(Problem(*problem), uniform, keep)[1])


def arguments(problem: Problem) -> tuple:
    """The first of an op's."""
    return tuple(getattr(problem, field.name) for field in FIELDS)


def run_sweep(problem: Problem, uniform: bool, ignore_index: int, keep: bool) -> Sweep:
    return Sweep(*sweep(*arguments(problem), uniform, ignore_index, keep))


def _backward_arguments(values: tuple) -> tuple[Problem, SweepGradients, Sweep, tuple[bool, bool, bool]]:
    values = iter(values)
    kinds = [(Problem, len(FIELDS)), (SweepGradients, len(SweepGradients._fields)), (Sweep, len(Sweep._fields))]
    return *(kind(*islice(values, number)) for kind, number in kinds), tuple(values)


def _sweep_backward_kernel(*values):
    problem, upstream, saved, needs = _backward_arguments(values)
    return tuple(_sweep.backward(problem, upstream, saved, *needs))


def _sweep_backward_fake(*values):
    problem, _, _, (need_embeddings, need_weight, need_bias) = _backward_arguments(values)
    embeddings, weight, bias, scale = problem.embeddings, problem.weight, problem.bias, problem.scale
    return (
        torch.empty_like(embeddings, memory_format=torch.contiguous_format) if need_embeddings else weight.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        bias.new_empty(bias.shape) if need_bias else weight.new_empty(0),
        torch.empty_like(scale) if scale is not None else weight.new_empty(0, dtype=torch.float64),
    )


# torch.compile's cache on disk knows an op by its name alone: one whose arguments change needs another name, as does the
# op whose backward calls it.
sweep_backward = register(
    "backward_class_chunks",
    _sweep_backward_kernel,
    _sweep_backward_fake,
    schema=f"({_PROBLEM}, {_inputs(SweepGradients, 'd_')}, {_inputs(Sweep)}, "
    f"bool need_embeddings, bool need_weight, bool need_bias) -> {_outputs(Gradients)}",
    backward=refuse_second_order,
)
_IS_TENSOR = [field.type in (Tensor, Tensor | None) for field in FIELDS]


def _sweep_context(ctx, inputs, output):
    problem = inputs[: len(FIELDS)]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(value for value, tensor in zip(problem, _IS_TENSOR, strict=True) if tensor), *output)
    ctx.settings = [value for value, tensor in zip(problem, _IS_TENSOR, strict=True) if not tensor]


def _sweep_gradient(ctx, _d_largest, d_nlse, d_target, d_uniform, d_nearest, *_):
    tensors, settings = list(ctx.saved_tensors), iter(ctx.settings)
    saved = Sweep(*tensors[sum(_IS_TENSOR) :])
    problem = Problem(*(tensors.pop(0) if tensor else next(settings) for tensor in _IS_TENSOR))
    needed = dict(zip((field.name for field in FIELDS), ctx.needs_input_grad, strict=False))
    upstream = [
        d_nlse,
        d_target,
        d_uniform if saved.uniform_cosine.numel() else None,
        d_nearest if problem.nearest else None,
    ]
    result = dict.fromkeys(needed)
    if any(g is not None for g in upstream):
        asked = [needed[name] for name in ("embeddings", "weight", "bias")]
        gradients = Gradients(*sweep_backward(*arguments(problem), *upstream, *saved, *asked))
        result |= {name: value for name, value in gradients._asdict().items() if needed[name]}
    return (*result.values(), None, None, None)


sweep = register(
    "forward_class_chunks",
    _sweep_kernel,
    _sweep_fake,
    schema=f"({_PROBLEM}, bool uniform, SymInt ignore_index, bool keep) -> {_outputs(Sweep)}",
    backward=_sweep_gradient,
    setup_context=_sweep_context,
)


def _nearest_rows(
    query: Tensor, reference: Tensor | None, number: int, inner_product: bool, workspace_bytes: int
) -> tuple[Tensor, Tensor]:
    """Cosines, or inner products, (Q, number) of queries to their nearest references, or others, and which these are."""
    device, dtype = query.device, compute_dtype(query, reference)
    with on_device(device), torch.autocast(device.type, enabled=False):
        found = search.find_nearest(kernels(device), query, reference, number, inner_product, workspace_bytes)
    return found.answers(dtype)


def _nearest_rows_fake(query, reference, number, *_):
    shape = (query.shape[0], number)
    return query.new_empty(shape, dtype=compute_dtype(query, reference)), query.new_empty(shape, dtype=torch.int64)


nearest_rows = register("nearest_rows", _nearest_rows, _nearest_rows_fake)


def _refresh_nearest(
    weight: Tensor,
    code: Tensor,
    scale: Tensor,
    candidate: Tensor,
    value: Tensor,
    ceiling: Tensor,
    swept: Tensor,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Cosine (C,) float64 of every class to its nearest other, and that class, by what is kept between steps."""
    swept = swept.clone() if recomputing() else swept  # a forward that is run again counts once
    state = cache.NearestState(code, scale, candidate, value, ceiling, swept)
    with on_device(weight.device), torch.autocast(weight.device.type, enabled=False):
        return cache.refresh(kernels(weight.device), weight, state, workspace_bytes)


def _refresh_nearest_fake(weight, *_):
    return weight.new_empty(weight.shape[0], dtype=torch.float64), weight.new_empty(weight.shape[0], dtype=torch.int64)


refresh_nearest = register(
    "refresh_nearest", _refresh_nearest, _refresh_nearest_fake, mutates=cache.NearestState._fields
)


def _frozen_nearest(
    weight: Tensor, index: Tensor, age: Tensor, every: int, counts: bool, workspace_bytes: int
) -> Tensor:
    """Cosine (C,) float64 of every class with its nearest of some steps ago: `index`, looked for every so many."""
    with on_device(weight.device), torch.autocast(weight.device.type, enabled=False):
        return cache.frozen(kernels(weight.device), weight, index, current_age(age), every, counts, workspace_bytes)


def _frozen_nearest_fake(weight, *_):
    return weight.new_empty(weight.shape[0], dtype=torch.float64)


frozen_nearest = register("frozen_nearest", _frozen_nearest, _frozen_nearest_fake, mutates=("index", "age"))


def _margin_rows(
    negative_logsumexp: Tensor,
    target_cosine: Tensor,
    uniform_cosine: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    class_weight_sum: Tensor | None,
    scale: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    m3: Tensor | None,
    annealing: Tensor | None,
    values: list[float],
    beyond_pi: int,
    easy: bool,
    straight_through: bool,
    smallest_sine: float,
    label_smoothing: Tensor | None,
    classes: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, class weight of the label, and derivatives of every row. values stand in for scale ... annealing where None.

    label_smoothing is on the CPU: a number would be a constant of a compiled graph.
    """
    samples, device = labels.shape[0], labels.device
    loss, row_weight = torch.empty_like(negative_logsumexp), torch.empty_like(negative_logsumexp)
    derivatives = negative_logsumexp.new_empty(len(DERIVATIVES), samples)
    # on CPU only: looking at the values of a CUDA tensor would wait for it
    for name, margin, said, fits in (
        ("m1", m1, "positive", lambda m: m > 0),
        ("m2", m2, "finite", lambda m: m.isfinite()),
        ("m3", m3, "finite", lambda m: m.isfinite()),
        ("annealing", annealing, "non-negative", lambda m: m >= 0),
    ):
        if margin is not None and margin.device.type == "cpu":
            wrong = ~(fits(margin) & margin.isfinite())
            if bool(wrong.any()):
                raise ValueError(f"margin.{name}: expected {said} numbers, got {margin[wrong][0].item()}")
    scalars = (v if t is None else t for t, v in zip((scale, m1, m2, m3, annealing), values, strict=True))
    scale, m1, m2, m3, annealing = scalars
    with on_device(device):
        kernels(device).margin_rows(
            negative_logsumexp=negative_logsumexp, target_cosine=target_cosine, uniform_cosine=uniform_cosine,
            labels=labels, class_weight=class_weight, scale=scale, m1=m1, m2=m2, m3=m3, annealing=annealing,
            beyond_pi=beyond_pi, easy=easy, straight_through=straight_through, smallest_sine=smallest_sine,
            label_smoothing=0.0 if label_smoothing is None else label_smoothing.item(),
            class_weight_sum=class_weight_sum, loss=loss, row_weight=row_weight, derivatives=derivatives,
            samples=samples, classes=classes, ignore_index=ignore_index,
        )  # fmt: skip
    return loss, row_weight, derivatives


def _margin_rows_fake(negative_logsumexp, *_):
    return (
        torch.empty_like(negative_logsumexp),
        torch.empty_like(negative_logsumexp),
        negative_logsumexp.new_empty(len(DERIVATIVES), negative_logsumexp.shape[0]),
    )


def _margin_rows_backward(upstream: Tensor, derivatives: Tensor) -> Tensor:
    return upstream * derivatives


def _margin_rows_backward_fake(upstream, derivatives):
    return torch.empty_like(derivatives)


margin_rows_backward = register(
    "margin_rows_backward", _margin_rows_backward, _margin_rows_backward_fake, backward=refuse_second_order
)

# position of an input of margin_rows: row of its derivatives
_MARGIN_ROWS_DERIVATIVE_OF = {0: 0, 1: 1, 2: 2, 6: 3, 7: 4, 8: 5, 9: 6, 10: 7}


def _margin_rows_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2])
    ctx.present = [index for index in _MARGIN_ROWS_DERIVATIVE_OF if inputs[index] is not None]


def _margin_rows_gradient(ctx, d_loss, *_):
    result = [None] * 19
    if d_loss is not None:
        gradients = margin_rows_backward(d_loss, *ctx.saved_tensors)
        for index in ctx.present:
            result[index] = gradients[_MARGIN_ROWS_DERIVATIVE_OF[index]]
    return tuple(result)


margin_rows = register(
    "margin_rows",
    _margin_rows,
    _margin_rows_fake,
    backward=_margin_rows_gradient,
    setup_context=_margin_rows_context,
)
