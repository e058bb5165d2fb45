"""How tensor cores sum products of fp16 in float32, by the published models, in float64 arithmetic on full matrices.

Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv:2512.07004); Fasi et al. 2021 for the truncation.
"""

import torch

UNITS = {"sm90": (16, 2), "sm80": (8, 1)}  # products in a sum, and bits beyond float32's last, of H100 and of A100
ALIGNMENTS = ("factors", "products")  # the exponents that align terms: of the published models, or the coarser ones


def exponent(values):
    """floor(log2 |value|); a very small number for 0."""
    return torch.where(values == 0, -1000, torch.frexp(values).exponent - 1)


def cut(values, bits):
    """Round towards zero to a multiple of 2^bits."""
    unit = torch.exp2(bits.double())
    return torch.trunc(values / unit) * unit


def product(left, right, unit, alignment):
    """left (R, K) @ right (C, K).T with every sum cut as tensor cores cut it, in float64."""
    number, extra = UNITS[unit]
    a, b = left.double()[:, None], right.double()[None]
    total = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
    for k in range(0, left.shape[1], number):
        x, y = a[..., k : k + number], b[..., k : k + number]
        products = x * y
        exponents = exponent(products) if alignment == "products" else exponent(x) + exponent(y)
        largest = torch.maximum(exponents.amax(-1), exponent(total)).clamp(min=-900)
        last = largest - 23 - extra
        total = cut(products, last[..., None]).sum(-1) + cut(total, last)
        total = cut(total, exponent(total).clamp(min=-900) - 23)
    return total
