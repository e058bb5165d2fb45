"""The options of `fused-margin align`. The docstrings of the fields are the help of the command."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..defaults import none_means
from ..options import NamedOptions


@dataclass(frozen=True)
class AlignConfig:
    """Rotate, scale and crop faces so that their five landmarks match a template.

    The landmarks come from a file, or from a face detector (--detector), which aligns one face of each photograph.
    They are left eye, right eye, nose, left and right mouth corner, as seen in the image. Coordinates x and y
    are pixels, and integers are pixel centers. They refer to the upright image, after its EXIF orientation is applied,
    as cv2.imread and Pillow's ImageOps.exif_transpose return it. Images whose output exists are skipped, so that the
    same command continues after an interruption. An existing output of another size is an error.
    """

    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """Folder of the photographs."""
    landmarks: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[LANDMARKS]"), none_means("found by --detector")
    ] = None
    """A .csv with path,x1,y1,...,x5,y5 per line, or a .json with {path: [[x1, y1], ..., [x5, y5]]}.
    A .csv may have more columns if its first line names them. Leave it out with --detector."""
    output: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[OUTPUT]"), none_means("IMAGES-aligned")
    ] = None
    """Folder for the aligned faces, with the same relative paths.
    A detector also writes a list of the photographs there, landmarks.csv, which can be LANDMARKS."""
    size: Literal["112x112", "112x96"] = "112x112"
    """Height and width: InsightFace's template, or SphereFace's (and RegularFace's)."""
    workers: int = 4
    """Number of threads. They take turns at the detector."""
    detector: Annotated[str | None, none_means("LANDMARKS")] = None
    """Face detector that finds the landmarks.
    mtcnn: MTCNN of facenet-pytorch, whose package contains the weights.
    yunet: FaceDetectorYN of OpenCV, with --detector-options model=FILE.onnx.
    Or your own, as package.module.factory. The factory takes --detector-options and returns a callable.
    The callable takes an RGB image (height, width, 3), uint8, and returns a list of faces (landmarks, box, score).
    The landmarks are five points (5, 2). The box is left, top, right and bottom."""
    detector_options: NamedOptions = field(default_factory=dict)
    """Keyword arguments of --detector, such as min_face_size=40 or device=cuda for mtcnn.
    Values are Python literals; other values are text."""
    select: Literal["largest", "center", "score"] = "largest"
    """Which of several faces in a photograph is aligned.
    largest: the one with the largest box.
    center: the one whose box is nearest to the center of the photograph.
    score: the one of which the detector is most certain."""
    min_size: int = 20
    """Smallest face, as the shorter side of its box in pixels. Smaller faces are counted, and not aligned."""

    def __post_init__(self) -> None:
        if not self.images.is_dir():
            raise ValueError(f"images: no folder {str(self.images)!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        if self.min_size < 0:
            raise ValueError(f"min_size must not be negative, got {self.min_size}")
        if self.detector is None and self.landmarks is None:
            raise ValueError("landmarks: name a file of them, or a --detector that finds them")
        if self.detector is None and self.detector_options:
            raise ValueError("detector_options need a --detector")
        for name in ("select", "min_size"):
            if self.detector is None and getattr(self, name) != getattr(AlignConfig, name):
                raise ValueError(f"{name} needs a --detector")
        if self.detector is not None and self.landmarks is not None and self.output is not None:
            raise ValueError("landmarks: --detector finds them; leave out the file, or the detector")
        images, output = self.images.resolve(), self.output_folder.resolve()
        if output == images:
            raise ValueError("output: the aligned faces would replace the photographs; name another folder")
        if self.detector is not None and images in output.parents:
            raise ValueError("output: the aligned faces would be among the photographs; name a folder outside")

    @property
    def output_folder(self) -> Path:
        """The folder for the aligned faces."""
        # With a detector the second path is the output.
        output = self.output if self.detector is None else self.output or self.landmarks
        return output or Path(f"{self.images.resolve()}-aligned")

    @property
    def landmark_file(self) -> Path:
        """The file of the landmarks.

        Raises:
            ValueError: a detector finds them.
        """
        if self.landmarks is None or self.detector is not None:
            raise ValueError("landmarks: --detector finds them")
        return self.landmarks
