"""What samples need of their own class beside the product with its weight: bias and length, on the rank that has them."""

import torch
from torch import Tensor

from fused_margin._ops.inputs import Gradients, Problem


def own_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Whether a sample's class is this rank's, and its row here; any row where it is not."""
    known = (problem.labels >= 0) & (problem.labels < problem.classes)
    return known, torch.where(known, problem.labels, 0)


def target_values(problem: Problem, length: bool) -> list[Tensor]:
    """Of the samples' classes the bias, where there is one, and the weight's length; (N,) float64, 0 for a class not here."""
    (known, rows), values = own_rows(problem), []
    if problem.bias is not None:
        values.append(torch.where(known, problem.bias[rows].double(), 0.0))
    if length:
        found = torch.linalg.vector_norm(problem.weight[rows], dim=1, dtype=torch.float64)
        values.append(torch.where(known, found, 0.0))
    return values


def add_target_gradients(
    problem: Problem, gradients: Gradients, d_bias: Tensor | None, d_length: Tensor | None
) -> Gradients:
    """A sweep's gradients and those of `target_values`, from the upstream ones (N,) of these. None: not wanted."""
    known, rows = own_rows(problem)

    def per_class(upstream: Tensor) -> Tensor:
        """Sums over the samples of each class; float64, which torch adds in one order."""
        upstream = torch.where(known, upstream, 0.0)
        return upstream.new_zeros(problem.classes).index_put_((rows,), upstream, accumulate=True)

    if d_bias is not None:
        d_bias = (gradients.bias.double() + per_class(d_bias)).to(gradients.bias.dtype)
        gradients = gradients._replace(bias=d_bias)
    if d_length is not None:
        weight = problem.weight[rows].double()
        length = torch.linalg.vector_norm(weight, dim=1)
        factor = torch.where(length > 0, per_class(d_length)[rows] / length, 0.0)
        # samples of one class all write the same sum, and no gradient of all classes is made a second time
        gradients.weight[rows] = (gradients.weight[rows] + factor.unsqueeze(1) * weight).to(gradients.weight.dtype)
    return gradients
