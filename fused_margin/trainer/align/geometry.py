"""Alignment of a face to a template by five landmarks: the similarity transform and the warp."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image


class Template(NamedTuple):
    """Landmark positions of an aligned face."""

    size: tuple[int, int]  # height, width
    points: np.ndarray  # (5, 2) x, y of left eye, right eye, nose, left and right mouth corner, in image order


# From preprocess/code/face_align_demo.m of SphereFace's repository. MATLAB counts pixels from one; later trainers use
# the same numbers with pixels from zero, and so does this module.
_SPHEREFACE = np.array(
    [[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655], [62.7299, 92.2041]]
)
TEMPLATES = {
    # arcface_dst in utils/face_align.py of InsightFace's Python package: eight pixels to the right.
    "112x112": Template((112, 112), _SPHEREFACE + [8, 0]),
    "112x96": Template((112, 96), _SPHEREFACE),
}


def similarity_transform(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Matrix (2, 3) of the rotation, scale and translation that best map points (n, 2) to target (n, 2).

    The least-squares solution of Umeyama (1991). In the plane, rotation and scale are the product with a complex
    number, so the solution is a projection and never a reflection.

    Raises:
        ValueError: the points coincide, or no rotation is better than others.
    """
    a = (points - points.mean(axis=0)) @ (1, 1j)  # (n,) complex
    b = (target - target.mean(axis=0)) @ (1, 1j)
    variance = np.vdot(a, a).real
    factor = np.vdot(a, b) / variance if variance > 0 else 0  # rotation and scale
    if abs(factor) == 0 or not np.isfinite(factor):
        raise ValueError("no unique similarity transform fits the points")
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.column_stack([linear, target.mean(axis=0) - linear @ points.mean(axis=0)])


def goodness_of_fit(points: np.ndarray, target: np.ndarray, matrix: np.ndarray) -> float:
    """Coefficient of determination of the transformed points: 1 for a perfect fit, about 0 for unrelated points."""
    transformed = points @ matrix[:, :2].T + matrix[:, 2]
    return 1 - ((transformed - target) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()


def warp(image: Image.Image, matrix: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Transform an image by a matrix (2, 3) and crop it to `size` (height, width). Pixels outside are black.

    Integer coordinates are pixel centers, as in landmark detectors.
    """
    inverse = np.linalg.inv(matrix[:, :2])
    # In Pillow, integer coordinates are pixel corners, so both sides are shifted by half a pixel.
    offset = inverse @ (-0.5 - matrix[:, 2]) + 0.5
    coefficients = np.column_stack([inverse, offset]).ravel().tolist()
    height, width = size
    return image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
