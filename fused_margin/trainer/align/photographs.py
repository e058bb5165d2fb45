"""Aligns a folder of photographs by the landmarks that a face detector finds, and lists what became of each."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from rich.console import Console

from fused_margin.evaluation.errors import DataError
from fused_margin.evaluation.files import SUFFIXES, describe_skipped, find_images

from ..data.decode import UnreadableError, read_image
from .config import AlignConfig
from .detectors import Detector, Face, make_detector, to_faces
from .faces import (
    AlignmentError,
    Outcome,
    crop_face,
    exists,
    face_transform,
    inside,
    print_error,
    progress_bar,
    save_face,
)
from .geometry import TEMPLATES
from .listing import FILE_NAME, PhotographList


def align_photographs(config: AlignConfig, console: Console, errors: Console) -> Outcome:
    """Align one face of each photograph; photographs without one are printed to `errors`.

    Raises:
        DetectorError: the detector cannot be made, or does not return faces.
        DataError: there are no photographs, an existing output has another size, or the list is another file.
        OSError: an aligned face or the list cannot be written.
    """
    skipped: Counter[str] = Counter()
    paths = find_images(config.images, skipped)
    notes = [describe_skipped(skipped)] if skipped else []
    if not paths:
        raise DataError("; ".join([f"no photographs in {config.images}: expected {', '.join(SUFFIXES)}", *notes]))
    listed = PhotographList(config.output_folder / FILE_NAME)
    aligner = _Aligner(config, listed)
    outcome = Outcome()
    chunk_size = 4 * config.workers  # Ctrl-C waits for at most the photographs that the threads are working on
    with listed.writing(), ThreadPoolExecutor(config.workers) as pool, progress_bar(console) as progress:
        task = progress.add_task("", total=len(paths))
        for start in range(0, len(paths), chunk_size):
            chunk = paths[start : start + chunk_size]
            for path, result in zip(chunk, pool.map(aligner.align, chunk), strict=True):
                outcome.add(result)
                if isinstance(result, AlignmentError):
                    print_error(errors, f"{path}: {result}")
                progress.advance(task)
    outcome.notes = [note for note in (listed.summary(paths), *notes, f"list in {listed.path}") if note]
    return outcome


def select_face(faces: list[Face], rule: str, size: tuple[int, int]) -> Face:
    """One of several faces in an image of `size` (width, height), by the rule largest, center or score.

    Of equal ones, it is the first.
    """
    boxes = np.stack([face.box for face in faces]).reshape(-1, 2, 2)  # corners, x and y
    if rule == "largest":
        values = (boxes[:, 1] - boxes[:, 0]).prod(axis=1)
    elif rule == "center":
        # Integers are pixel centers.
        values = -np.hypot(*(boxes.mean(axis=1) - (np.array(size) - 1) / 2).T)
    else:
        values = np.array([face.score for face in faces])
    return faces[int(values.argmax())]


class _Aligner:
    """Aligns photographs one by one. Threads may share it, and take turns at the detector."""

    def __init__(self, config: AlignConfig, listed: PhotographList) -> None:
        self.config, self.listed, self.template = config, listed, TEMPLATES[config.size]
        self.name = str(config.detector)
        self.detector: Detector = make_detector(self.name, config.detector_options)
        self.lock = threading.Lock()

    def align(self, path: str) -> str | AlignmentError:
        """Write one aligned face and list the photograph: "aligned", "present" if the face exists, or what is wrong.

        Raises:
            DataError: the face exists in another size.
            DetectorError: the detector does not return faces.
        """
        target = self.config.output_folder / path
        if exists(target, self.template.size):
            row = self.listed.rows.get(path)
            if row is None or row["status"] != "aligned":
                self.listed.add(path, "existed")
            return "present"
        try:
            image = read_image(self.config.images / path)
            faces = self._detect(image)
        except UnreadableError as error:
            self.listed.add(path, "unreadable", {"reason": error})
            return AlignmentError(f"cannot be read: {error}")
        except AlignmentError as error:
            self.listed.add(path, "failed", {"reason": error})
            return error
        large = [face for face in faces if _shorter_side(face) >= self.config.min_size]
        counts = {"faces": len(faces), "tiny": len(faces) - len(large)}
        if not large:
            self.listed.add(path, "tiny" if faces else "no face", counts)
            side = max(map(_shorter_side, faces), default=0)
            return AlignmentError(f"the largest face has {side:.0f} pixels (--min-size)" if faces else "no face")
        face = select_face(large, self.config.select, image.size)
        counts["border"] = int(_at_border(face, image))
        try:
            matrix = face_transform(face.landmarks, self.template)
            aligned = crop_face(image, face.landmarks, matrix, self.template.size)
        except AlignmentError as error:
            self.listed.add(path, "failed", {**counts, "reason": error}, face)
            return error
        self.listed.add(path, "aligned", counts, face)  # before the face, so that no face lacks a row
        save_face(aligned, target)
        return "aligned"

    def _detect(self, image: Image.Image) -> list[Face]:
        pixels = np.array(image.convert("RGB"))
        with self.lock:
            try:
                results = self.detector(pixels)
            except Exception as error:  # detectors raise many types for unusual images
                message = " ".join(str(error).split())
                raise AlignmentError(f"the detector fails with {type(error).__name__}: {message}") from error
        faces = to_faces(results, self.name)
        for face in faces:
            left, top, right, bottom = face.box
            if not all(np.isfinite(values).all() for values in face) or right < left or bottom < top:
                raise AlignmentError("the detector returns a face that is not finite, or whose box has swapped edges")
        return faces


def _shorter_side(face: Face) -> float:
    left, top, right, bottom = face.box
    return float(min(right - left, bottom - top))


def _at_border(face: Face, image: Image.Image) -> bool:
    """Whether the box or a landmark is outside the image, by more than a pixel for the box, whose edges are rounded."""
    left, top, right, bottom = face.box
    width, height = image.size
    return min(left, top) < -1 or right > width or bottom > height or not inside(face.landmarks, image).all()
