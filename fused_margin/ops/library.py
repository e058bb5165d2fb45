"""The torch.library ops: schemas, fakes for torch.compile, and their gradients."""

import torch
from torch import Tensor

from fused_margin.ops import sweep as _sweep
from fused_margin.ops.backend import kernels, on_device
from fused_margin.ops.plan import make_plan

# Order of MarginDerivative in csrc/kernels.h
DERIVATIVES = ("negative_logsumexp", "target_cosine", "uniform_cosine", "scale", "m1", "m2", "m3", "annealing")


def _first_order_only(op) -> None:
    """A backward op is not differentiated again: an error, never a silently wrong second derivative."""

    def refuse(ctx, *_):
        raise RuntimeError("fused_margin: second derivatives are not supported; use fused_margin.reference for them")

    op.register_autograd(refuse)


@torch.library.custom_op("fused_margin::sweep", mutates_args=())
def sweep(
    embeddings: Tensor | None,
    weight: Tensor,
    labels: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    class_weight: Tensor | None,
    uniform: bool,
    nearest: bool,
    ignore_index: int,
    workspace_bytes: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(
        _sweep.forward(
            embeddings, weight, labels, scale, scale_value, class_weight, uniform, nearest, ignore_index,
            workspace_bytes, keep,
        )
    )  # fmt: skip


@sweep.register_fake
def _(
    embeddings, weight, labels, scale, scale_value, class_weight, uniform, nearest, ignore_index, workspace_bytes, keep
):
    compute = _sweep.compute_dtype(embeddings, weight)
    samples = 0 if embeddings is None else embeddings.shape[0]
    plan = make_plan(samples, weight, compute, nearest=nearest, keep=keep, workspace_bytes=workspace_bytes)
    shared = _sweep.fixed_exponent(scale_value if scale is None else None, weight.shape[0]) is not None
    return tuple(_sweep.empty_sweep(samples, plan, weight, compute, shared, uniform, nearest))


@torch.library.custom_op("fused_margin::sweep_backward", mutates_args=())
def sweep_backward(
    upstream: list[Tensor | None],
    embeddings: Tensor | None,
    weight: Tensor,
    labels: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    class_weight: Tensor | None,
    saved: list[Tensor],
    nearest: bool,
    workspace_bytes: int,
    need_embeddings: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sweep.backward(
        _sweep.SweepGradients(*upstream), embeddings, weight, labels, scale, scale_value, class_weight,
        _sweep.Sweep(*saved), nearest, workspace_bytes, need_embeddings, need_weight,
    )  # fmt: skip


@sweep_backward.register_fake
def _(
    upstream,
    embeddings,
    weight,
    labels,
    scale,
    scale_value,
    class_weight,
    saved,
    nearest,
    workspace_bytes,
    need_embeddings,
    need_weight,
):
    return (
        torch.empty_like(embeddings, memory_format=torch.contiguous_format) if need_embeddings else weight.new_empty(0),
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        torch.empty_like(scale) if scale is not None else weight.new_empty(0, dtype=torch.float64),
    )


_first_order_only(sweep_backward)


def _sweep_context(ctx, inputs, output):
    embeddings, weight, labels, scale, scale_value, class_weight, _, nearest, _, workspace_bytes, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(embeddings, weight, labels, scale, class_weight, *output)
    ctx.settings = scale_value, nearest, workspace_bytes


def _sweep_gradient(ctx, d_nlse, d_target, d_uniform, d_nearest, *_):
    embeddings, weight, labels, scale, class_weight, *saved = ctx.saved_tensors
    scale_value, nearest, workspace_bytes = ctx.settings
    need_embeddings, need_weight, _, need_scale = ctx.needs_input_grad[:4]
    upstream = [d_nlse, d_target, d_uniform if saved[2].numel() else None, d_nearest if nearest else None]
    none = (None,) * 11
    if all(g is None for g in upstream):
        return none
    d_embeddings, d_weight, d_scale = sweep_backward(
        upstream, embeddings, weight, labels, scale, scale_value, class_weight, saved, nearest, workspace_bytes,
        need_embeddings, need_weight,
    )  # fmt: skip
    return (
        d_embeddings if need_embeddings else None,
        d_weight if need_weight else None,
        None,
        d_scale if need_scale else None,
        *none[4:],
    )


sweep.register_autograd(_sweep_gradient, setup_context=_sweep_context)


@torch.library.custom_op("fused_margin::margin_rows", mutates_args=())
def margin_rows(
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
    label_smoothing: float,
    classes: int,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, class weight of the label, and derivatives of every row. values stand in for scale ... annealing where None."""
    samples, device = labels.shape[0], labels.device
    loss, row_weight = torch.empty_like(negative_logsumexp), torch.empty_like(negative_logsumexp)
    derivatives = negative_logsumexp.new_empty(len(DERIVATIVES), samples)
    for name, margin in (("m1", m1), ("m2", m2), ("m3", m3), ("annealing", annealing)):
        # on CPU only: looking at the values of a CUDA tensor would wait for it
        if margin is not None and margin.device.type == "cpu" and not bool(margin.isfinite().all()):
            raise ValueError(f"margin.{name}: expected finite numbers, got {margin[~margin.isfinite()][0].item()}")
    scalars = (v if t is None else t for t, v in zip((scale, m1, m2, m3, annealing), values, strict=True))
    scale, m1, m2, m3, annealing = scalars
    with on_device(device):
        kernels(device).margin_rows(
            negative_logsumexp=negative_logsumexp, target_cosine=target_cosine, uniform_cosine=uniform_cosine,
            labels=labels, class_weight=class_weight, scale=scale, m1=m1, m2=m2, m3=m3, annealing=annealing,
            beyond_pi=beyond_pi, easy=easy, straight_through=straight_through, smallest_sine=smallest_sine, label_smoothing=label_smoothing,
            class_weight_sum=class_weight_sum, loss=loss, row_weight=row_weight, derivatives=derivatives,
            samples=samples, classes=classes, ignore_index=ignore_index,
        )  # fmt: skip
    return loss, row_weight, derivatives


@margin_rows.register_fake
def _(negative_logsumexp, *_):
    return (
        torch.empty_like(negative_logsumexp),
        torch.empty_like(negative_logsumexp),
        negative_logsumexp.new_empty(len(DERIVATIVES), negative_logsumexp.shape[0]),
    )


@torch.library.custom_op("fused_margin::margin_rows_backward", mutates_args=())
def margin_rows_backward(upstream: Tensor, derivatives: Tensor) -> Tensor:
    return upstream * derivatives


@margin_rows_backward.register_fake
def _(upstream, derivatives):
    return torch.empty_like(derivatives)


_first_order_only(margin_rows_backward)


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


margin_rows.register_autograd(_margin_rows_gradient, setup_context=_margin_rows_context)
