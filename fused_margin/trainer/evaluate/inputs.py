"""Inputs of an evaluation: features from a trained network and images, or from files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fused_margin.evaluation import (
    DataError,
    FeatureSet,
    MegafaceGallery,
    VerificationSet,
    WeightedL1Head,
    find_pair_list,
    read_arrays,
    read_features,
    read_listed_features,
    read_megaface,
    read_megaface_lists,
    stratified_folds,
)
from fused_margin.evaluation.checks import check_features
from fused_margin.evaluation.features import check_same_width, require_identities
from fused_margin.evaluation.plurals import counted

from ..config import TrainConfig
from ..data import EMBEDDED, load_splits
from ..data.base import ImageSet
from ..data.megaface_images import MegafaceImages
from ..data.verification_images import VerificationImages
from ..models.build import channels_last, require_named, restore_backbone
from ..train.checkpoint import CheckpointError, criterion_state, identities_before, load_run, trained_identities
from ..train.criterion import stored_class_weight, stored_distance
from .network import Embedded, ShownImages, count_known, describe_unseen, embed
from .progress import Show, show_embedding


@dataclass(frozen=True)
class EvaluationInput:
    """Features to evaluate, and their description for the report."""

    features: FeatureSet
    description: str
    source: str  # path of the features or images
    shown: ShownImages | None = None  # the images of the rows; None: the features are from a file
    unreadable: list[str] = field(default_factory=list)  # skipped images
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of skipped files, folders or lines by kind
    galleries: Sequence[MegafaceGallery] = ()  # of the distractors; none: they are one gallery
    shown_distractors: ShownImages | None = None
    gallery: FeatureSet | None = None  # enrolled images of identification, if they are not among the features
    shown_gallery: ShownImages | None = None


CheckLabels = Callable[[np.ndarray, np.ndarray | None], object]  # of the images, and of the gallery


def read_probes(probes: Path, distractors: Path) -> EvaluationInput:
    """MegaFace-style features of probes and distractors. Raises DataError as `evaluation.read_megaface`."""
    megaface = read_megaface(probes, distractors)
    features = FeatureSet(features=megaface.probes, labels=megaface.identity, distractors=megaface.distractors)
    return EvaluationInput(features, f"features of {probes}", str(probes), skipped=megaface.skipped)


def read_listed_probes(lists: Path, probes: Path, distractors: Path, suffix: str) -> EvaluationInput:
    """Features that MegaFace's lists name. Raises DataError as the readers of `evaluation`."""
    listed = read_megaface_lists(lists)
    data = read_listed_features(listed, probes, distractors, suffix)
    features = FeatureSet(features=data.probes, labels=data.identity, distractors=data.distractors)
    description = f"features of {probes} listed in {listed.source}"
    return EvaluationInput(features, description, str(probes), galleries=listed.galleries)


def read_gallery(gallery: Path, probes: Path) -> EvaluationInput:
    """Features of a gallery and of probes, with their identities.

    Raises:
        DataError: a file is damaged or has no identities, or the dimensions differ.
        OSError: a file cannot be opened.
    """
    skipped: Counter[str] = Counter()
    enrolled, searched = (_read_identities(path, skipped) for path in (gallery, probes))
    check_same_width(searched.features, probes, enrolled.features, gallery)
    description = f"features of {probes}, in the gallery {gallery}"
    return EvaluationInput(searched, description, str(probes), skipped=skipped, gallery=enrolled)


def _read_identities(path: Path, skipped: Counter[str]) -> FeatureSet:
    """Features with identities: of an .npz, which may have those of mirror images, or as of `read_features`."""
    if path.is_file() and path.suffix.lower() == ".npz":
        arrays = read_arrays(path)
        try:
            check_features("features", arrays.features)
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error
        return FeatureSet(arrays.features, arrays.mirrored, require_identities(arrays.labels, path))
    found = read_features(path, skipped)
    return FeatureSet(found.vectors, labels=require_identities(found.identities, path))


@dataclass(frozen=True)
class TrainedNetwork:
    """A checkpoint and the images to evaluate it on."""

    state: dict[str, Any]
    config: TrainConfig  # of the training, with `data` replaced
    same_data: bool  # the images are those of the training, so only its test identities are evaluated
    path: Path
    verification_set: VerificationSet | None = None  # replaces the images of `data`
    megaface: MegafaceImages | None = None  # replaces the images of `data`

    def distance(self) -> WeightedL1Head:
        """The distance that the training has learned. Raises CheckpointError if it has learned none."""
        loss_fn = stored_distance(self.config.loss, criterion_state(self.state))
        if loss_fn is None:
            raise CheckpointError(
                f"metric: {self.path} has no distance that siamese-l1 could score with: train with --loss.name siamese-l1 "
                "or --loss.companions.siamese, or use --metric weighted-l1"
            )
        return WeightedL1Head.of_loss(loss_fn)

    def features(
        self,
        device: torch.device,
        *,
        mirror: bool,
        workers: int,
        folds: int | None,
        show: Show,
        gallery: Path | None = None,
        check: CheckLabels | None = None,
    ) -> EvaluationInput:
        """Features of the test identities, or of the verification set.

        Args:
            mirror: whether to compute features of the mirror images too.
            workers: number of processes that load image files.
            folds: used if the set defines none.
            show: called with texts of the progress.
            gallery: images to enrol. Labels are then the names of the identities.
            check: called with the labels of the test identities' images before features are computed.

        Raises:
            BackboneError: the network cannot be built.
            CheckpointError: the weights do not fit the network.
            DataError: the images have changed since the training, or cannot be read.
        """
        config = self.config
        weight = stored_class_weight(config.loss, criterion_state(self.state))
        class_weight = None if weight is None else weight.numpy()
        backbone = restore_backbone(config, self.state, self.path)
        backbone = channels_last(backbone).to(device)
        if self.megaface is not None:
            return self._megaface_features(self.megaface, backbone, class_weight, device, mirror, workers, show)
        images: ImageSet
        if self.verification_set is not None:
            images = VerificationImages(self.verification_set, config.model.image_size, config.model.channels)
            embedded = embed(backbone, images, device, mirror=mirror, workers=workers, progress=show_embedding(show))
            source = self.verification_set.source
            return EvaluationInput(
                verification_features(self.verification_set, embedded, class_weight, folds),
                f"{counted(len(embedded.labels), 'image')} of {source}",
                source,
                embedded.shown,
                embedded.unreadable,
                self.verification_set.skipped,
            )
        # All identities of other images are evaluated.
        test_fraction = config.test_fraction if self.same_data else 0.0
        splits = load_splits(config.data, config.model.image_size, config.model.channels, test_fraction, config.seed)
        if self.same_data and self.state["data"] != splits.fingerprint():
            raise DataError(
                f"the identities or images of {config.data!r} have changed since the training, so the test "
                "identities may be among those trained on"
            )
        if self.same_data and not len(splits.test):
            raise DataError(
                f"all identities of {config.data!r} were trained on, so none can be evaluated: name other images with "
                "--data"
            )
        images = splits.test if self.same_data else splits.train
        skipped, enrolled = Counter(splits.skipped), None
        if gallery is not None:
            size, channels = config.model.image_size, config.model.channels
            listed = load_splits(str(gallery), size, channels, test_fraction=0.0, seed=config.seed)
            enrolled = listed.train
            skipped.update(listed.skipped)
        if check is not None:
            given_labels = None if enrolled is None else image_labels(enrolled, named=True)
            check(image_labels(images, named=enrolled is not None), given_labels)
        embedded = embed(
            backbone,
            images,
            device,
            mirror=mirror,
            distortion=splits.test_distortion,
            seed=config.seed,
            workers=workers,
            progress=show_embedding(show, "" if enrolled is None else "probes"),
        )
        # The initial weights of the run may have been trained on its test identities.
        trained = identities_before(self.state) if self.same_data else trained_identities(self.state)
        evaluated = describe_unseen(images.num_classes, count_known(images.identities, trained))
        given = EvaluationInput(
            FeatureSet(embedded.features, embedded.mirrored, embedded.labels, class_weight=class_weight),
            f"{splits.description}: {evaluated}",
            config.data,
            embedded.shown,
            sorted(embedded.unreadable),
            skipped,
        )
        if enrolled is None:
            return given
        progress = show_embedding(show, "gallery")
        in_gallery = embed(backbone, enrolled, device, mirror=mirror, workers=workers, progress=progress)
        return replace(
            given,
            features=replace(given.features, labels=np.array(images.identities)[embedded.labels]),
            description=f"{given.description}, in the gallery {gallery}",
            unreadable=sorted([*embedded.unreadable, *in_gallery.unreadable]),
            gallery=FeatureSet(
                in_gallery.features, in_gallery.mirrored, np.array(enrolled.identities)[in_gallery.labels]
            ),
            shown_gallery=in_gallery.shown,
        )

    def _megaface_features(
        self,
        images: MegafaceImages,
        backbone: nn.Module,
        class_weight: np.ndarray | None,
        device: torch.device,
        mirror: bool,
        workers: int,
        show: Show,
    ) -> EvaluationInput:
        sets = images.sets(self.config.model.image_size, self.config.model.channels)
        probes, distractors = (
            embed(backbone, part, device, mirror=mirror, workers=workers, progress=show_embedding(show, kind))
            for part, kind in zip(sets, ("probes", "distractors"), strict=True)
        )
        source = images.lists.source
        if unreadable := [*probes.unreadable, *distractors.unreadable]:
            raise DataError(
                f"{len(unreadable)} of the images that {source} lists cannot be read: {', '.join(unreadable[:5])}"
            )
        return EvaluationInput(
            FeatureSet(
                probes.features,
                probes.mirrored,
                probes.labels,
                distractors=distractors.features,
                mirrored_distractors=distractors.mirrored,
                class_weight=class_weight,
            ),
            f"images of {images.probes} listed in {source}",
            str(images.probes),
            probes.shown,
            galleries=images.lists.galleries,
            shown_distractors=distractors.shown,
        )


def image_labels(images: ImageSet, *, named: bool) -> np.ndarray:
    """The labels (num_images,) of a set, or the names of their identities."""
    labels = images.labels.numpy()
    return np.array(images.identities)[labels] if named else labels


def verification_features(
    verification_set: VerificationSet, embedded: Embedded, class_weight: np.ndarray | None, folds: int | None = None
) -> FeatureSet:
    """Features of a verification set. Unreadable frames of videos are skipped; unreadable images are an error.

    Args:
        folds: number of folds if the set defines none; by default those of its reader.

    Raises:
        DataError: an image cannot be read, or there are fewer genuine or impostor pairs than folds.
    """
    fold = verification_set.fold
    if folds is not None and not verification_set.has_folds:
        try:
            fold = stratified_folds(verification_set.same, folds)
        except ValueError as error:
            raise DataError(f"{verification_set.source}: {error}") from error
    if embedded.unreadable and not verification_set.of_videos:
        raise DataError(
            f"{len(embedded.unreadable)} of the images that {verification_set.source} pairs cannot be read: "
            f"{', '.join(embedded.unreadable[:5])}"
        )
    return FeatureSet(
        embedded.features,
        embedded.mirrored,
        pairs=verification_set.pairs,
        same=verification_set.same,
        fold=fold,
        video=verification_set.item[embedded.labels] if verification_set.of_videos else None,
        class_weight=class_weight,
    )


def read_checkpoint(
    path: Path,
    data: str | None,
    backbone: str | None,
    *,
    videos: bool = False,
    megaface: MegafaceImages | None = None,
) -> TrainedNetwork:
    """Read a checkpoint to evaluate on `data`, by default the images of its training.

    Args:
        backbone: a user's own backbone, named to allow its import.
        videos: whether to prefer videos if `data` has lists of images and of videos.
        megaface: images to evaluate on instead of `data`.

    Raises:
        CheckpointError: it cannot be read, its options are not of this version, or it has another backbone.
        DataError: `data` is a damaged verification set.
    """
    state = load_run(path, "evaluate")
    try:
        values = state["config"]
        reader = find_pair_list(data, videos=videos) if data is not None and data not in EMBEDDED else None
        reads_data = reader is None and megaface is None
        config = TrainConfig.from_dict({**values, "data": data or values["data"]}, reads_data=reads_data)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"cannot evaluate {path}: {error}") from error
    require_named(config, backbone, path)
    verification_set = reader() if reader else None
    same_data = config.data == values["data"]
    return TrainedNetwork(state, config, same_data, path, verification_set, megaface)
