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
    """Checkpoint of fused-margin train, or the folder it is in.
    If not given, the latest run in runs/."""
    backbone: str | None = None
    """The --backbone that the checkpoint was trained with, named again, if it has one.
    It is imported and called."""
    features: Path | None = None
    """File of features (.npz) to evaluate in place of a network, with the arrays that the protocol needs.
    features (n, D) has the D numbers of each of n images or frames. Every protocol needs it.
    mirrored (n, D) has those of the mirror images. --protocol lfw and --flip sum or concat need it.
    labels (n,) has an integer per identity. megaface needs it, and so do pairs and lfw where no pairs are given.
    pairs (p, 2) has the rows of p pairs, and same (p,) is True where both show one identity.
    fold (p,) has the number of each pair's fold. Without it, consecutive pairs make the folds.
    video (n,) has the number of each frame's video for ytf, whose pairs are then numbers of videos.
    distractors (k, D) and mirrored_distractors (k, D) have the features of k distractors for megaface.
    class_weight (C, D) has the weights of C classes, whose separability is then reported."""
    data: str | None = None
    """Images to evaluate the network on. If not given, the test identities of its training.
    Other images, as for fused-margin train, are evaluated with all their identities.
    A verification set is a folder of LFW (pairs.txt) or YouTube Faces (splits.txt, for --protocol ytf),
    or such a list itself, as pairsDevTest.txt.
    Their images are beside the list or in the folder of the publication: lfw, lfw_funneled, lfw-deepfunneled,
    aligned_images_DB. InsightFace's .bin files are verification sets too."""
    distractors: Path | None = None
    """Distractors in a file or folder of their own, for --protocol megaface with --features.
    A .npy, an .npz, MegaFace's .bin, or a folder of these.
    Then --features has the probes: FOLDER/identity/..., or an .npz with features and labels."""
    protocol: Protocol = "pairs"
    """pairs: accuracy over folds, at the best threshold of the other folds.
    lfw: LFW's protocol in one of its variants (--variant).
    ytf: as pairs, on videos whose frames' features are averaged.
    megaface: rank-1 rate among distractors, and TAR at FAR."""
    variant: LfwVariant = "insightface"
    """Variant of --protocol lfw.
    insightface: features of image and mirror image summed, squared distance.
    regularface: the features concatenated, the mean of the other folds subtracted, cosine (also SphereFace)."""
    metric: Metric = "cosine"
    """Score of a pair in the protocols pairs and ytf.
    cosine: the cosine of both features.
    weighted-l1: DeepFace's, weighted absolute differences of the normalised features.
    A logistic regression on the pairs of the other folds gives the weights."""
    flip: Flip | None = None
    """How to combine the features of an image and its mirror image. It is fixed for --protocol lfw.
    If not given, as in the training; none for --features."""
    far: float | None = None
    """False accept rate at which the true accept rate is reported.
    If not given, 1e-6 for megaface, otherwise as in the training; 1e-3 for --features."""
    num_pairs: int | None = None
    """Number of pairs to draw where none are given, half of them of one identity.
    If not given, as in the training; 6,000 for --features."""
    folds: int | None = None
    """Number of folds of the pairs where none are given, as in a pairs.txt whose first line is one number.
    If not given, as in the training; 10 for --features."""
    probes: float = 0.5
    """Share of the identities that are probes of megaface where no distractors are given.
    The images of the other identities are the distractors."""
    output: Path | None = None
    """Folder for report and figure.
    If not given, the folder of the checkpoint or of the features."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto takes a GPU if there is one and the kernels are built for it."""
    workers: int = 0
    """Number of processes that read images ahead, for images in files."""

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
        if self.protocol == "megaface" and not (self.folds is None and self.num_pairs is None):
            raise ValueError("folds, num-pairs: the protocol megaface has neither folds nor drawn pairs")
        prescribed = LFW_FLIP[self.variant] if self.protocol == "lfw" else None
        far = 1e-6 if self.protocol == "megaface" else trained.far
        return dataclasses.replace(
            self,
            flip=prescribed or self.flip or trained.flip,
            far=self.far or far,
            num_pairs=self.num_pairs or trained.pairs,
            folds=self.folds or trained.folds,
        )
