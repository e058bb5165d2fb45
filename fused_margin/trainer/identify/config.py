"""The options of `fused-margin identify`. The docstrings of the fields are the help of the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import fused_margin as fm
from fused_margin.evaluation.gallery import Template
from fused_margin.evaluation.protocols import Flip

from ..defaults import none_means

FAR = 0.01


@dataclass(frozen=True)
class IdentifyConfig:
    """Who is this? Search a gallery of known identities for each probe, and rank the best ones.

    A probe is known if its best score, the cosine of its features and a template, is at or above a threshold.
    The threshold is --threshold, or is estimated from the gallery: each of its images searches the other identities,
    and at most the share --far of the images has a score at or above the threshold. The estimate suits probes that are
    as good as the images of the gallery. The network of --checkpoint computes the features of images. Features from
    files are compared as they are.

    Writes identify.csv, identify.json and identify.html.
    """

    gallery: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="GALLERY")]
    """Known identities, as images or as features.
    Images: a folder, GALLERY/identity/image.jpg.
    Features: an .npz with features (n, D) and labels (n,), or a folder GALLERY/identity/... of .npy, .npz or .bin."""
    probes: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROBES")]
    """Whom to identify: an image, or a folder of images with or without subfolders.
    If GALLERY has features, a file or folder of features."""
    checkpoint: Annotated[Path | None, none_means("the latest run in runs/")] = None
    """Checkpoint of fused-margin train, or its folder."""
    backbone: Annotated[str | None, none_means("the --network of the training")] = None
    """The --backbone of the training, if it had one.
    Giving the same name confirms that its code may be imported and called."""
    threshold: Annotated[float | None, none_means("estimated from GALLERY for --far")] = None
    """Cosine at or above which a probe is known."""
    far: Annotated[float | None, none_means(f"{FAR} without --threshold")] = None
    """False alarm rate of the estimated threshold: the share of unknown probes that may be taken for someone."""
    top: int = 3
    """Number of identities to name for each probe, the best first."""
    template: Template = "mean"
    """Templates of an identity.
    mean: the mean of the normalized features of its images.
    all: every image. The most similar one counts."""
    flip: Annotated[Flip | None, none_means("as in the training")] = None
    """How to combine the features of an image and its mirror image."""
    output: Annotated[Path | None, none_means("PROBES-identified")] = None
    """Folder for the results."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: a GPU, if there is one and the kernels are built for it."""
    workers: int = 0
    """Number of processes that load image files."""

    def __post_init__(self) -> None:
        for name, path in (("gallery", self.gallery), ("probes", self.probes)):
            if not path.exists():
                raise ValueError(f"{name}: there is no {str(path)!r}")
        if self.threshold is not None and self.far is not None:
            raise ValueError("threshold, far: give one of them; --far is for a threshold that is estimated")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be a cosine from -1 to 1, got {self.threshold}")
        if self.far is not None and not 0 < self.far < 1:
            raise ValueError(f"far must be between 0 and 1, got {self.far}")
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {self.top}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.accelerator == "cuda" and not fm.build_info()["cuda"]["available"]:
            raise ValueError("accelerator: there is no GPU, or the kernels are not built for it; use auto or cpu")

    @property
    def output_folder(self) -> Path:
        """The folder for the results."""
        probes = self.probes if self.probes.name not in ("", "..") else self.probes.resolve()
        return self.output or probes.with_name(f"{probes.stem if probes.is_file() else probes.name}-identified")
