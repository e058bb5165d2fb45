"""Alignment of a face to a template by five landmarks: the similarity transform, and the warp."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image


class Template(NamedTuple):
    """Where the landmarks of an aligned face are."""

    size: tuple[int, int]  # height, width
    points: np.ndarray  # (5, 2) x, y of left eye, right eye, nose, left and right corner of the mouth, as seen


# SphereFace's, in preprocess/code/face_align_demo.m of its repository. Its MATLAB counts pixels from
# one; the trainers that took the template over count from zero with the same numbers, as we do.
_SPHEREFACE = np.array(
    [[30.2946, 51.6963], [65.5318, 51.5014], [48.0252, 71.7366], [33.5493, 92.3655], [62.7299, 92.2041]]
)
TEMPLATES = {
    # InsightFace's, arcface_dst in utils/face_align.py of its Python package: eight pixels to the right.
    "112x112": Template((112, 112), _SPHEREFACE + [8, 0]),
    "112x96": Template((112, 96), _SPHEREFACE),
}


def similarity_transform(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Matrix (2, 3) of the rotation, scale and shift that bring points (n, 2) closest to target (n, 2).

    The least-squares solution of Umeyama (1991). In the plane a rotation with scale is the product
    with a complex number, and the best one is a projection; it cannot be a reflection.

    Raises:
        ValueError: the points coincide, or no direction is better than another.
    """
    a = (points - points.mean(axis=0)) @ (1, 1j)  # (n,) complex
    b = (target - target.mean(axis=0)) @ (1, 1j)
    spread = np.vdot(a, a).real
    turn = np.vdot(a, b) / spread if spread > 0 else 0
    if abs(turn) == 0 or not np.isfinite(turn):
        raise ValueError("no similarity transform fits the points better than another")
    linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    return np.column_stack([linear, target.mean(axis=0) - linear @ points.mean(axis=0)])


def goodness_of_fit(points: np.ndarray, target: np.ndarray, matrix: np.ndarray) -> float:
    """Share of the target's spread that the moved points explain: 1 where they meet, 0 for unrelated points."""
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    return 1 - ((moved - target) ** 2).sum() / ((target - target.mean(axis=0)) ** 2).sum()


def warp(image: Image.Image, matrix: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """Move an image by a matrix (2, 3), cut to `size` (height, width); black where the image has nothing.

    Coordinates are those of landmark detectors: whole numbers are the middles of pixels.
    """
    back = np.linalg.inv(matrix[:, :2])
    # For Pillow whole numbers are the corners of pixels: half a pixel between the two, on both sides.
    offset = back @ (-0.5 - matrix[:, 2]) + 0.5
    coefficients = np.column_stack([back, offset]).ravel().tolist()
    height, width = size
    return image.transform((width, height), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
