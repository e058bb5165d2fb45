"""Face detectors: the form of their results, adapters of two packages, and a user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from ..factories import call_factory
from ..options import suggestion


class DetectorError(ValueError):
    """A detector cannot be made, or does not return faces."""


class Face(NamedTuple):
    """One face in an image, in pixels of the upright image."""

    landmarks: np.ndarray  # (5, 2) x, y of left eye, right eye, nose, left and right mouth corner, as seen in the image
    box: np.ndarray  # (4,) left, top, right, bottom
    score: float  # higher is more certain


Detector = Callable[[np.ndarray], Sequence[Any]]  # from RGB uint8 (height, width, 3) to (landmarks, box, score) each


def make_detector(name: str, options: Mapping[str, Any]) -> Detector:
    """A detector by name, or from the factory `package.module.factory`, which is called with the options.

    Raises:
        DetectorError: a package is missing, or the factory does not exist, refuses the options or returns no callable.
    """
    if name in NAMED:
        return NAMED[name](options)
    if "." not in name:
        raise DetectorError(
            f"detector: expected {', '.join(NAMED)} or package.module.factory, got {name!r}{suggestion(name, NAMED)}"
        )
    detector = call_factory("detector", name, options, DetectorError)
    if not callable(detector):
        raise DetectorError(f"detector: expected {name} to return a callable, got {type(detector).__name__}")
    return detector


def to_faces(results: Sequence[Any] | None, name: str) -> list[Face]:
    """The results of the detector `name` for one image; None, as of OpenCV's detectors, means no face.

    Raises:
        DetectorError: a result is not the landmarks, the box and the score of a face.
    """
    try:
        return [_to_face(*result) for result in (() if results is None else results)]
    except (TypeError, ValueError) as error:
        raise DetectorError(
            f"detector: expected {name} to return faces (landmarks, box, score) of shapes (5, 2), (4,) and (), "
            f"got {error}"
        ) from error


def _to_face(landmarks: Any, box: Any, score: Any) -> Face:
    # Rounded as in the list of photographs, so that its landmarks align a face to the same pixels.
    points, edges = (np.asarray(values, np.float64).round(2) for values in (landmarks, box))
    if points.shape != (5, 2) or edges.shape != (4,):
        raise ValueError(f"landmarks {points.shape}, box {edges.shape}")
    return Face(points, edges, float(score))


def _mtcnn(options: Mapping[str, Any]) -> Detector:
    """MTCNN (Zhang et al., 2016) of facenet-pytorch."""
    # It requires versions of 2024, which pip would install in place of newer ones.
    command = f"pip install --no-deps facenet-pytorch, and the release of torchvision for torch {torch.__version__}"
    package = _import("mtcnn", "facenet_pytorch", command)
    try:
        mtcnn = package.MTCNN(**options)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:  # PyTorch without CUDA asserts
        raise DetectorError(f"detector: mtcnn refuses the options: {error}") from error

    def detect(image: np.ndarray) -> Sequence[Any]:
        if min(image.shape[:2]) < mtcnn.min_face_size:
            return []  # it raises an error
        boxes, scores, landmarks = mtcnn.detect(image, landmarks=True)
        return [] if boxes is None else list(zip(landmarks, boxes, scores, strict=True))

    return detect


def _yunet(options: Mapping[str, Any]) -> Detector:
    """YuNet (Wu et al., 2023) by OpenCV."""
    options = dict(options)
    model = options.pop("model", None)
    if model is None:
        raise DetectorError(
            "detector: yunet needs a model: --detector-options model=face_detection_yunet_2023mar.onnx, which is in "
            "OpenCV's model zoo"
        )
    if not Path(model).is_file():
        raise DetectorError(f"detector: yunet: no file {model!r}")
    cv2 = _import("yunet", "cv2", "pip install opencv-python-headless")
    try:
        yunet = cv2.FaceDetectorYN.create(str(model), "", (320, 320), **options)
    except (AttributeError, TypeError, cv2.error) as error:
        raise DetectorError(f"detector: yunet cannot be made from {model}: {error}") from error

    def detect(image: np.ndarray) -> Sequence[Any]:
        height, width = image.shape[:2]
        yunet.setInputSize((width, height))
        _, rows = yunet.detect(np.ascontiguousarray(image[..., ::-1]))  # BGR
        # A row is x, y, width and height of the box, five landmarks and the score. The landmarks begin with the right
        # eye of the person, which is the left one in the image.
        return [] if rows is None else [_yunet_face(row) for row in rows]

    return detect


def _yunet_face(row: np.ndarray) -> Face:
    corner, extent = row[:2], row[2:4]
    return Face(row[4:14].reshape(5, 2), np.concatenate([corner, corner + extent]), float(row[14]))


NAMED: dict[str, Callable[[Mapping[str, Any]], Detector]] = {"mtcnn": _mtcnn, "yunet": _yunet}


def _import(name: str, module: str, command: str) -> ModuleType:
    """Import a package that only a detector needs.

    Raises:
        DetectorError: it, or one of its own requirements, is not installed or does not fit the others.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # torchvision for another torch raises RuntimeError
        reason = "is not installed" if getattr(error, "name", None) == module else f"cannot be imported: {error}"
        raise DetectorError(f"detector: {name} needs {module}, which {reason}: {command}") from error
