"""The options of `fused-margin evaluate`. The docstrings of the fields are the help of the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import fused_margin as fm
from fused_margin.evaluation import find_pair_list
from fused_margin.evaluation.gallery import Template
from fused_margin.evaluation.protocols import LFW_FLIP, Flip, LfwVariant

from ..config import EvaluationConfig
from ..data import EMBEDDED, find_reader
from ..defaults import none_means

Protocol = Literal["pairs", "lfw", "ytf", "megaface", "identification"]
PairMetric = Literal["cosine", "weighted-l1", "siamese-l1"]
FAR: dict[Protocol, float] = {"megaface": 1e-6, "identification": 1e-2}  # of the protocols with their own default
UNKNOWN = 0.5


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a trained network, or features from a file, under a named protocol.

    Writes <protocol>.json, <protocol>.png and <protocol>.html.
    """

    checkpoint: Annotated[Path | None, none_means("the latest run in runs/")] = None
    """Checkpoint of fused-margin train, or its folder."""
    backbone: Annotated[str | None, none_means("the --network of the training")] = None
    """The --backbone of the training, if it had one.
    Giving the same name confirms that its code may be imported and called."""
    features: Annotated[Path | None, none_means("evaluate a network")] = None
    """File (.npz) of features to evaluate instead of a network, with these arrays:
    features (n, D): of n images or frames. All protocols need it.
    mirrored (n, D): of the mirror images, for --protocol lfw and --flip sum or concat.
    labels (n,): identity of each row, a text or an integer, for megaface and identification.
    Also for pairs and lfw if the file has no pairs.
    pairs (p, 2): rows of p pairs. same (p,): True for pairs of one identity.
    fold (p,): fold index of each pair. Without it, folds of consecutive pairs.
    video (n,): video index of each frame, for ytf, whose pairs are then video indices.
    distractors (k, D), mirrored_distractors (k, D): of k distractors, for megaface.
    class_weight (C, D): of C classes, to report their separability."""
    data: Annotated[str | None, none_means("the test identities of the training")] = None
    """Images to evaluate the network on.
    Any images that fused-margin train accepts. All of their identities are evaluated.
    If the network was trained on the same images, its test identities are evaluated.
    Or a verification set: a folder with LFW's pairs.txt or YouTube Faces' splits.txt (for --protocol ytf).
    A list in such a format, as pairsDevTest.txt, or one of InsightFace's .bin files is also a verification set.
    Its images are in the folder of the list, or in the subfolder of the published archive:
    lfw, lfw_funneled, lfw-deepfunneled or aligned_images_DB."""
    distractors: Annotated[Path | None, none_means("those in --features, or the identities that are no probes")] = None
    """Features of distractors, for --protocol megaface with --features.
    A .npy, .npz or MegaFace's .bin file, or a folder of these.
    --features then has the probes: FOLDER/identity/..., or an .npz with features and labels."""
    lists: Annotated[Path | None, none_means("no lists")] = None
    """MegaFace's templatelists, for --protocol megaface, or its list of other probes than FaceScrub's.
    --features and --distractors are then the folders that the listed paths are relative to.
    For a network these are --data and --distractors, folders of images."""
    suffix: str = ""
    """Appended to the paths in --lists, as _vgg.bin: Name/Name_1.png_vgg.bin."""
    gallery: Annotated[Path | None, none_means("some of the images of each identity")] = None
    """Images or features of the known identities, for --protocol identification.
    For a network: images as for --data, which then has the probes.
    With --features: a folder FOLDER/identity/... of feature files, or an .npz with features and labels.
    --features then has the probes, in the same formats.
    A probe is known if its identity has the same name in the gallery."""
    protocol: Protocol = "pairs"
    """pairs: accuracy over folds, at the best threshold of the other folds.
    lfw: LFW's protocol in one of its variants (--variant).
    ytf: as pairs, for videos, with the mean feature of their frames.
    megaface: rank-1 rate among distractors, and TAR at FAR.
    identification: search of probes in a gallery of known identities. Closed set: rate of rank k.
    Open set, if some probes have unknown identities: detection and identification rate (DIR) at FAR."""
    variant: LfwVariant = "insightface"
    """Variant of --protocol lfw.
    insightface: sum of the features of image and mirror image, squared distance.
    regularface: concatenated features minus the mean of the other folds, cosine (also SphereFace)."""
    metric: PairMetric = "cosine"
    """Score of a pair in the protocols pairs and ytf.
    cosine: cosine of both features.
    weighted-l1: DeepFace's weighted absolute differences of the normalized features.
    A logistic regression on the other folds learns the weights.
    siamese-l1: the same with the weights that the training has learned.
    They come from --loss.name siamese-l1 or --loss.companions.siamese."""
    flip: Annotated[Flip | None, none_means("as in the training; none for --features and siamese-l1")] = None
    """How to combine the features of an image and its mirror image (fixed for LFW)."""
    far: Annotated[
        float | None,
        none_means("1e-6 for megaface, 1e-2 for identification, otherwise as in the training; 1e-3 for --features"),
    ] = None
    """False accept rate at which the true accept rate is reported.
    For identification, the false positive rate of unknown probes (FPIR), at which the DIR is reported."""
    num_pairs: Annotated[int | None, none_means("as in the training; 6,000 for --features")] = None
    """Number of pairs to draw if none are given. Half of them are of one identity."""
    folds: Annotated[int | None, none_means("as in the training; 10 for --features")] = None
    """Number of folds if none are given, as for a pairs.txt whose first line is one number."""
    probes: float = 0.5
    """Share of the identities that are megaface's probes if no distractors are given.
    The other identities are the distractors."""
    unknown: Annotated[float | None, none_means(f"{UNKNOWN}, or those that are not in --gallery")] = None
    """Share of the identities that are not in identification's gallery. All of their images are probes.
    0 measures the closed set alone."""
    enrolled: Annotated[int | None, none_means("half of them, or all of --gallery")] = None
    """Number of images of each identity in identification's gallery, at most all but one. The others are probes."""
    template: Template = "mean"
    """Templates of an identity in identification's gallery.
    mean: the mean of the normalized features of its images.
    all: every image. The most similar one counts."""
    output: Annotated[Path | None, none_means("the folder of the checkpoint or of the features")] = None
    """Folder for report, figure and page."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Device. auto: a GPU, if there is one and the kernels are built for it."""
    workers: int = 0
    """Number of processes that load image files."""

    def __post_init__(self) -> None:
        if self.features is not None and not (self.checkpoint is None and self.data is None):
            raise ValueError("features: cannot be combined with checkpoint or data")
        if self.lists is not None:
            self._check_lists()
        elif self.suffix:
            raise ValueError("suffix: only with --lists")
        elif self.distractors is not None and (self.protocol != "megaface" or self.features is None):
            raise ValueError("distractors: only for the protocol megaface with --features or --lists")
        elif self.data is not None and self.data not in EMBEDDED and find_pair_list(self.data) is None:
            find_reader(self.data)
        if self.protocol == "lfw" and self.flip not in (None, LFW_FLIP[self.variant]):
            raise ValueError(f"flip: lfw's variant {self.variant} prescribes {LFW_FLIP[self.variant]}")
        if self.metric != "cosine" and self.protocol == "lfw":
            raise ValueError(
                f"metric: lfw's variants prescribe theirs; for {self.metric} on LFW's images and folds, use the "
                "protocol pairs"
            )
        if self.metric != "cosine" and self.protocol in ("megaface", "identification"):
            raise ValueError(f"metric: {self.protocol} searches by the cosine; {self.metric} is for pairs and ytf")
        if self.metric == "siamese-l1" and self.features is not None:
            raise ValueError("metric: siamese-l1 needs the --checkpoint that has learned it; weighted-l1 needs none")
        if self.metric == "siamese-l1" and self.flip == "concat":
            raise ValueError("flip: siamese-l1 has weights for the features of one image; use none or sum")
        self._check_identification()
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
            raise ValueError("accelerator: there is no GPU, or the kernels are not built for it; use auto or cpu")

    def _check_identification(self) -> None:
        given: dict[str, object] = {"gallery": self.gallery, "unknown": self.unknown, "enrolled": self.enrolled}
        if self.template != "mean":
            given["template"] = self.template
        names = [name for name, value in given.items() if value is not None]
        if names and self.protocol != "identification":
            raise ValueError(f"{', '.join(names)}: only for the protocol identification")
        if self.gallery is not None and not (self.unknown is None and self.enrolled is None):
            raise ValueError("unknown, enrolled: --gallery has the known identities; leave out the options")
        if self.gallery is not None and self.features is None and str(self.gallery) not in EMBEDDED:
            find_reader(str(self.gallery), "gallery")
        if self.unknown is not None and not 0 <= self.unknown < 1:
            raise ValueError(f"unknown must be 0 or more and below 1, got {self.unknown}")
        if self.enrolled is not None and self.enrolled < 1:
            raise ValueError(f"enrolled must be at least 1, got {self.enrolled}")

    def _check_lists(self) -> None:
        if self.protocol != "megaface":
            raise ValueError("lists: only for the protocol megaface")
        probes = ("data", self.data) if self.features is None else ("features", self.features)
        for name, folder in (probes, ("distractors", self.distractors)):
            if folder is None or not Path(folder).is_dir():
                given = "nothing" if folder is None else repr(str(folder))
                raise ValueError(f"{name}: expected the folder that the paths in --lists are relative to, got {given}")

    def protocol_options(self, trained: EvaluationConfig) -> ProtocolOptions:
        """The options of the protocol, with defaults from the training.

        Raises:
            ValueError: options contradict each other.
        """
        if self.protocol in ("megaface", "identification") and not (self.folds is None and self.num_pairs is None):
            raise ValueError(f"folds, num-pairs: the protocol {self.protocol} has neither folds nor drawn pairs")
        prescribed = LFW_FLIP[self.variant] if self.protocol == "lfw" else None
        return ProtocolOptions(
            protocol=self.protocol,
            variant=self.variant,
            metric=self.metric,
            flip=prescribed or self.flip or ("none" if self.metric == "siamese-l1" else trained.flip),
            far=self.far or FAR.get(self.protocol, trained.far),
            num_pairs=self.num_pairs or trained.pairs,
            folds=self.folds or trained.folds,
            probes=self.probes,
            unknown=UNKNOWN if self.unknown is None else self.unknown,
            enrolled=self.enrolled,
            template=self.template,
        )


@dataclass(frozen=True)
class ProtocolOptions:
    """A protocol with all its options, as in `EvaluateConfig`."""

    protocol: Protocol
    variant: LfwVariant
    metric: PairMetric
    flip: Flip
    far: float
    num_pairs: int
    folds: int
    probes: float
    unknown: float
    enrolled: int | None
    template: Template

    def __post_init__(self) -> None:
        if self.num_pairs < 2 * self.folds:
            raise ValueError(f"num-pairs must be at least two per fold, got {self.num_pairs}")

    @property
    def name(self) -> str:
        """Name of the protocol, its variant or metric, for the files."""
        if self.protocol == "lfw":
            return f"lfw-{self.variant}"
        return self.protocol if self.metric == "cosine" else f"{self.protocol}-{self.metric}"
