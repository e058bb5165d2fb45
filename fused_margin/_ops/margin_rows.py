"""The op ``margin_rows``: the loss of every sample with a margin on its target, and the loss's derivatives."""

import torch
from torch import Tensor

from fused_margin import _checks
from fused_margin._ops.backends.select import kernels_on
from fused_margin._ops.library import refuse_second_order, register

# Order of MarginDerivative in csrc/kernels/loss.h
DERIVATIVES = ("negative_logsumexp", "target_cosine", "uniform_cosine", "scale", "m1", "m2", "m3", "annealing")


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
    """Loss (N,), class weight (N,) of the label, and derivatives (8, N) in the order of `DERIVATIVES`.

    Args:
        scale, m1, m2, m3, annealing: (N,) numbers of the samples, or None for the number in ``values``.
        values: scale, m1, m2, m3 and annealing of all samples.
        label_smoothing: a CPU tensor, because a number would be a constant of a compiled graph.
    """
    samples = labels.shape[0]
    loss, row_weight = torch.empty_like(negative_logsumexp), torch.empty_like(negative_logsumexp)
    derivatives = negative_logsumexp.new_empty(len(DERIVATIVES), samples)
    for name, margin in (("m1", m1), ("m2", m2), ("m3", m3), ("annealing", annealing)):
        if margin is not None:
            _checks.margin_values(name, margin)
    names, tensors = ("scale", "m1", "m2", "m3", "annealing"), (scale, m1, m2, m3, annealing)
    numbers = {name: v if t is None else t for name, t, v in zip(names, tensors, values, strict=True)}
    with kernels_on(labels.device) as run:
        run.margin_rows(
            negative_logsumexp=negative_logsumexp, target_cosine=target_cosine, uniform_cosine=uniform_cosine,
            labels=labels, class_weight=class_weight, **numbers, beyond_pi=beyond_pi, easy=easy,
            straight_through=straight_through, smallest_sine=smallest_sine,
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

# Position of each differentiable input of margin_rows, and its row of the derivatives.
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
