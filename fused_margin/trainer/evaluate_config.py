"""The options of `fused-margin evaluate`: a dataclass whose docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import fused_margin as fm

from .config import EMBEDDED, EvaluationConfig
from .data import find_benchmark_reader, find_reader
from .protocols import LFW_FLIP, Flip, LfwVariant, Metric

Protocol = Literal["pairs", "lfw", "ytf", "megaface"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a trained network, or features from a file, under a named protocol.

    Writes <protocol>.json and <protocol>.png.
    """

    checkpoint: Path | None = None
    """Checkpoint of fused-margin train, or the folder it is in; the latest run in runs/ if not given."""
    backbone: str | None = None
    """The checkpoint's own --backbone, if it has one, named again: it is imported and called."""
    features: Path | None = None
    """Instead of a network an .npz of arrays: features (n, D), and as the protocol needs mirrored (n, D),
    labels (n,), pairs (p, 2), same (p,) bool, fold (p,), video (n,), distractors (k, D),
    mirrored_distractors (k, D); class_weight (C, D) for the separability."""
    data: str | None = None
    """Images for the network, as for fused-margin train; all identities of other images than it was trained on,
    the test identities of its training if not given. Or a verification set: LFW's folder with pairs.txt, YouTube
    Faces' with splits.txt (protocol ytf), or one of InsightFace's .bin files. The images of the first two are there
    or in the publication's folder (lfw, lfw_funneled, lfw-deepfunneled; aligned_images_DB)."""
    distractors: Path | None = None
    """For megaface with --features: distractors in a file or folder of their own (.npy, .npz, or MegaFace's .bin);
    --features then are the probes, FOLDER/identity/..., or an .npz with features and labels."""
    protocol: Protocol = "pairs"
    """pairs: threshold at every cosine, over folds; lfw: as the variant; ytf: videos, their frames' features
    averaged; megaface: rank-1 among distractors, and TAR at FAR."""
    variant: LfwVariant = "insightface"
    """Of lfw. insightface: mirror features summed, squared distance; regularface (and SphereFace): concatenated,
    less the mean of the other folds, cosine."""
    metric: Metric = "cosine"
    """Of pairs and ytf. weighted-l1: DeepFace's, absolute differences of the normalised features, weighted by a
    logistic regression on the pairs of the other folds."""
    flip: Flip | None = None
    """What becomes of the mirror image's features, but for lfw, which prescribes it; as in the training, or
    none."""
    far: float | None = None
    """False accept rate at which the true accept rate is reported; 1e-6 for megaface, else as in the training,
    or 1e-3."""
    num_pairs: int | None = None
    """Pairs to draw where none are given, half of them of one identity; as in the training, or 6,000."""
    folds: int | None = None
    """Folds of the pairs where none are given, as in a pairs.txt whose first line is one number; as in the training,
    or 10."""
    probes: float = 0.5
    """Share of the identities that are megaface's probes where no distractors are given; the others' images are
    the distractors."""
    output: Path | None = None
    """Folder for report and picture; that of the checkpoint or features if not given."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto: a GPU where there is one and the kernels are built for it."""
    workers: int = 0
    """Processes that read images ahead (for images in files)."""

    def __post_init__(self) -> None:
        if self.features is not None and not (self.checkpoint is None and self.data is None):
            raise ValueError("features: a file of features needs no checkpoint and no data")
        if self.data is not None and self.data not in EMBEDDED and find_benchmark_reader(self.data) is None:
            find_reader(self.data)
        if self.distractors is not None and (self.protocol != "megaface" or self.features is None):
            raise ValueError("distractors: they are for the protocol megaface, beside --features")
        if self.protocol == "lfw" and self.flip not in (None, LFW_FLIP[self.variant]):
            raise ValueError(f"flip: lfw's variant {self.variant} prescribes {LFW_FLIP[self.variant]}")
        if self.metric != "cosine" and self.protocol == "lfw":
            raise ValueError(
                f"metric: lfw's variants prescribe theirs; for {self.metric} on LFW's images and folds use the "
                "protocol pairs"
            )
        if self.metric != "cosine" and self.protocol == "megaface":
            raise ValueError(f"metric: {self.metric} is learned on pairs in folds, of which megaface has none")
        if self.far is not None and not 0 < self.far < 1:
            raise ValueError(f"far must be between 0 and 1, got {self.far}")
        if self.folds is not None and self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        if self.num_pairs is not None and self.num_pairs < 2 * (self.folds or 2):
            raise ValueError(f"num-pairs must be at least two per fold, got {self.num_pairs}")
        if not 0 < self.probes < 1:
            raise ValueError(f"probes must be between 0 and 1, got {self.probes}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")
        if self.accelerator == "cuda" and not fm.build_info()["cuda"]["available"]:
            raise ValueError("accelerator: there is no GPU, or the kernels are not built for it")

    @property
    def name(self) -> str:
        """Of the files."""
        if self.protocol == "lfw":
            return f"lfw-{self.variant}"
        return self.protocol if self.metric == "cosine" else f"{self.protocol}-{self.metric}"

    def filled_in(self, trained: EvaluationConfig) -> EvaluateConfig:
        """These options, and where none are given those of the training.

        Raises:
            ValueError: they contradict each other.
        """
        prescribed = LFW_FLIP[self.variant] if self.protocol == "lfw" else None
        far = 1e-6 if self.protocol == "megaface" else trained.far
        return dataclasses.replace(
            self,
            flip=prescribed or self.flip or trained.flip,
            far=self.far or far,
            num_pairs=self.num_pairs or trained.pairs,
            folds=self.folds or trained.folds,
        )
