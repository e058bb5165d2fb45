"""Inputs and comparisons that the tests share."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fused_margin as fm
from fused_margin import reference
from fused_margin._ops.inputs import LossInputs


def problem(samples, classes, size, *, seed=0, spread=5.0):
    """float64 embeddings (N, D) with norms far from one, weights (C, D), labels (N,) with repeats."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(samples, size, generator=generator, dtype=torch.float64) * spread
    weight = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    if samples > 2:
        labels[1] = labels[0]
    return embeddings, weight, labels


def leaf(tensor, dtype=None):
    return tensor.detach().to(dtype or tensor.dtype).clone().requires_grad_()


def loss_and_gradients(function, embeddings, weight, *args, upstream=None, **kwargs):
    """(loss, d embeddings, d weight) of one call, on fresh leaves."""
    x, w = leaf(embeddings), leaf(weight)
    loss = function(x, w, *args, **kwargs)
    loss.backward(upstream if upstream is not None else torch.ones_like(loss))
    return loss.detach(), x.grad, w.grad


def relative_error(measured, truth):
    """||measured - truth|| / ||truth||, or ||measured|| where the truth is zero."""
    measured, truth = measured.double(), truth.double()
    difference = (measured - truth).norm()
    return (difference / truth.norm() if truth.norm() > 0 else difference).item()


def truth(embeddings, weight, labels, margin=None, scale=64.0, **options):
    """The oracle: the float64 reference of the inputs, after rounding to their own dtype."""
    return loss_and_gradients(
        reference.margin_cross_entropy, embeddings.double(), weight.double(), labels, margin, scale, **options
    )


def ours(embeddings, weight, labels, margin=None, scale=64.0, **options):
    return loss_and_gradients(
        fm.functional.margin_cross_entropy, embeddings, weight, labels, fm.Margin(**(margin or {})), scale, **options
    )


def planned_inputs(samples, weight, *, nearest=False, workspace_bytes=256 << 20, backend="portable"):
    """Inputs for chunk planning, with embeddings of the weight's dtype and device."""
    embeddings = weight.new_empty(samples, weight.shape[1]) if samples else None
    return LossInputs(
        embeddings, weight, workspace_bytes, backend, scale_value=64.0, nearest=nearest, num_classes=len(weight)
    )


def saved_classes(plan):
    """The number of classes in chunks for which the forward saves values."""
    return min(plan.saved * plan.chunk, plan.classes)


LAYOUTS = ("contiguous", "padded", "sliced", "misaligned", "transposed")


def in_layout(matrix, layout):
    """A copy of a matrix with other strides or another alignment, surrounded by NaN in memory."""
    rows, columns = matrix.shape
    if layout == "contiguous":
        return matrix.clone()
    if layout == "transposed":
        return matrix.t().clone(memory_format=torch.contiguous_format).t()
    if layout == "misaligned":  # starts at an odd element
        memory = matrix.new_full((rows * columns + 1,), float("nan"))[1:].view(rows, columns)
    else:  # rows start at multiples of 16 elements, or one element later
        memory = matrix.new_full((rows, columns // 16 * 16 + 32), float("nan"))
        memory = memory[:, 1 : columns + 1] if layout == "sliced" else memory[:, :columns]
    return memory.copy_(matrix)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result
