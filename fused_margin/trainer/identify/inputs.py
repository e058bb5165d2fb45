"""Inputs of an identification: features of the gallery and of the probes, from images and a network or from files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from fused_margin.evaluation import DataError, join_mirror, read_features
from fused_margin.evaluation.checks import check_labels
from fused_margin.evaluation.features import READERS, check_same_width, require_identities
from fused_margin.evaluation.files import SUFFIXES, describe_skipped, find_images, is_hidden, is_image
from fused_margin.evaluation.protocols import Flip

from ..config import TrainConfig
from ..data.base import ImageSet
from ..data.folder import FolderImages, list_identities
from ..data.lists import ListImages
from ..evaluate.network import ShownImages, embed
from ..evaluate.progress import Show, show_embedding
from ..models.build import channels_last, require_named, restore_backbone
from ..train.checkpoint import FILE_NAME, CheckpointError, load_run
from .config import IdentifyConfig


@dataclass(frozen=True)
class IdentifyInput:
    """Features to enrol and to identify, and their descriptions for the report."""

    enrolled: np.ndarray  # (num_enrolled, D)
    labels: np.ndarray  # (num_enrolled,) names of their identities
    probes: np.ndarray  # (num_probes, D)
    names: list[str]  # of the probes
    flip: Flip
    shown_enrolled: ShownImages | None = None  # the images of the rows; None: the features are from files
    shown_probes: ShownImages | None = None
    unreadable: list[str] = field(default_factory=list)  # skipped images of both
    unread_identities: list[str] = field(default_factory=list)  # identities without a readable image
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of skipped files or folders by kind


def contents(path: Path) -> Literal["images", "features"] | None:
    """What a path is a file of, or has files of; images, if a folder has both. None: neither."""
    if path.is_file():
        return "features" if path.suffix.lower() in READERS else "images" if is_image(path.name) else None
    found: Literal["features"] | None = None
    for _, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not is_hidden(name)]
        for name in files:
            if is_image(name) and not is_hidden(name):
                return "images"
            if Path(name).suffix.lower() in READERS:
                found = "features"
    return found


def read_feature_files(config: IdentifyConfig) -> IdentifyInput:
    """Features of the gallery and of the probes.

    Raises:
        DataError: an option is for images, a file is damaged, the gallery has no identities, or the dimensions differ.
        OSError: a file cannot be opened.
    """
    given = {"checkpoint": config.checkpoint, "backbone": config.backbone, "flip": config.flip}
    if names := [name for name, value in given.items() if value is not None]:
        raise DataError(f"{', '.join(names)}: only for images, and {config.gallery} has features; leave out the option")
    skipped: Counter[str] = Counter()
    gallery, probes = read_features(config.gallery, skipped), read_features(config.probes, skipped)
    check_same_width(probes.vectors, config.probes, gallery.vectors, config.gallery)
    try:
        labels = check_labels("labels", require_identities(gallery.identities, config.gallery))
    except ValueError as error:
        raise DataError(f"{config.gallery}: {error}") from error
    identities = [""] * len(probes.vectors) if probes.identities is None else map(", {}".format, probes.identities)
    rows = [f"row {row}{identity}" for row, identity in enumerate(identities)]
    return IdentifyInput(gallery.vectors, labels.astype(str), probes.vectors, rows, "none", skipped=skipped)


def read_images(config: IdentifyConfig, checkpoint: Path, device: torch.device, show: Show) -> IdentifyInput:
    """Features of the images of the gallery and of the probes, by the network of a run.

    Raises:
        BackboneError, CheckpointError: the network cannot be used.
        DataError: there are no identities or no probes, or none of them can be read.
        OSError: a folder cannot be read.
    """
    identities, skipped = list_identities(config.gallery)
    files = _probe_files(config.probes, skipped)
    path = checkpoint / FILE_NAME if checkpoint.is_dir() else checkpoint
    training, backbone = _load_network(path, config.backbone, device)
    size, channels = training.model.image_size, training.model.channels
    gallery = FolderImages(str(config.gallery), list(identities), list(identities.values()), size, channels)
    names = [os.fsdecode(file) for file in files]
    root = config.probes.parent if config.probes.is_file() else config.probes
    probes = ListImages(root, files, torch.arange(len(files)), names, size, channels)
    flip = config.flip or training.evaluation.flip

    def embedded(images: ImageSet, kind: str) -> tuple[np.ndarray, np.ndarray, ShownImages, list[str]]:
        progress = show_embedding(show, kind)
        found = embed(backbone, images, device, mirror=flip != "none", workers=config.workers, progress=progress)
        return join_mirror(found.features, found.mirrored, flip), found.labels, found.shown, found.unreadable

    enrolled, labels, shown_enrolled, unreadable = embedded(gallery, "gallery")
    searched, rows, shown_probes, unreadable_probes = embedded(probes, "probes")
    lost = np.setdiff1d(np.arange(len(identities)), labels)
    return IdentifyInput(
        enrolled,
        np.array(gallery.identities)[labels],
        searched,
        [names[row] for row in rows.tolist()],
        flip,
        shown_enrolled,
        shown_probes,
        sorted([*unreadable, *unreadable_probes]),
        [gallery.identities[number] for number in lost.tolist()],
        skipped,
    )


def _probe_files(path: Path, skipped: Counter[str]) -> np.ndarray:
    """Paths of the probes relative to their folder, as encoded names. Raises DataError if there are none."""
    if path.is_file():
        if not is_image(path.name):
            raise DataError(f"{path} is not an image, which ends in {', '.join(SUFFIXES)}")
        return np.array([os.fsencode(path.name)])
    found: Counter[str] = Counter()
    names = find_images(path, found)
    skipped.update(found)
    if not names:
        others = f"; {describe_skipped(found)}" if found else ""
        raise DataError(f"no images in {path}: expected images ending in {', '.join(SUFFIXES)}{others}")
    return np.array([os.fsencode(name) for name in names])


def _load_network(path: Path, backbone: str | None, device: torch.device) -> tuple[TrainConfig, nn.Module]:
    """The options of a training, and its network."""
    state = load_run(path, "identify with")
    try:
        training = TrainConfig.from_dict(state["config"], reads_data=False)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"cannot identify with {path}: {error}") from error
    require_named(training, backbone, path)
    return training, channels_last(restore_backbone(training, state, path)).to(device)
