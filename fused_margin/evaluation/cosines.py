"""Rows of unit length, and cosines of pairs of rows, in float64."""

from __future__ import annotations

import numpy as np

BLOCK_ELEMENTS = 2**17  # float64 elements at a time, which stay in cache
ROUNDING = 2.0**-53
LARGEST_EXPONENT = 32  # of rows that are not scaled; rows shorter than 1e-12, about 2^-40, count as zero in the search


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """The rows (n, D) divided by their norms, in float64; zero rows stay."""
    return normalized(scaled_rows(rows))[0]


def scaled_rows(rows: np.ndarray) -> np.ndarray:
    """The rows (n, D), or float64 copies divided by powers of two if the largest element of a row is far from 1.

    Then no square overflows or underflows, and no row is so short that the search would count it as zero.
    """
    _, exponent = np.frexp(np.abs(rows).max(axis=1, keepdims=True))
    if (np.abs(exponent) < LARGEST_EXPONENT).all():
        return rows
    return np.ldexp(np.asarray(rows, np.float64), -exponent)


def normalized(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows (n, D) divided by their norms, and the norms (n,), in float64."""
    rows = np.ascontiguousarray(rows, np.float64)  # einsum sums a column-major array in another order
    norm = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return rows / np.where(norm > 0, norm, 1)[:, None], norm


def cosine_tolerance(width: int) -> float:
    """Twice the difference of float64 cosines of vectors of `width` numbers, summed in different orders, is below this."""
    return 8 * (width + 4) * ROUNDING


def pair_cosines(unit: np.ndarray, probe: np.ndarray, templates: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Cosines (n,) of pairs of a probe and a template, in float64.

    A pair has the same cosine, bit for bit, in whichever call it is, which matrix products do not promise. Thus equal
    templates tie.

    Args:
        unit: (P, D) float64 probes of unit length.
        probe: (n,) rows of ``unit``.
        templates: (T, D), of a norm near 1 or zero rows.
        row: (n,) rows of ``templates``.
    """
    cosine = np.empty(len(probe))
    size = max(1, BLOCK_ELEMENTS // unit.shape[1])
    for begin in range(0, len(probe), size):
        part = slice(begin, begin + size)
        right = np.asarray(templates[row[part]], np.float64)
        square = np.einsum("ij,ij->i", right, right)
        product = np.einsum("ij,ij->i", unit[probe[part]], right)
        cosine[part] = product / np.sqrt(np.where(square > 0, square, 1))
    return np.clip(cosine, -1, 1)
