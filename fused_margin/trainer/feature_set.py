"""What is evaluated: features and what is known of them, from a trained network and images or from a file."""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from .checkpoint import CheckpointError, criterion_state, identities_before, load_run, trained_identities
from .config import TrainConfig
from .data import DataError, find_benchmark_reader, load_splits
from .data.benchmarks import VerificationSet
from .data.features import read_megaface
from .evaluate import Embedded, count_known, describe_unseen, embed
from .folds import folds_of_each_kind
from .losses import stored_class_weight
from .models import require_named, restore_backbone
from .wording import counted


@dataclass(frozen=True)
class FeatureSet:
    """Arrays by the names that an .npz file gives them; the protocol tells which are needed."""

    features: np.ndarray  # (num_rows, D) of images, video frames or probes, not normalised
    mirrored: np.ndarray | None = None  # (num_rows, D) of the mirror images
    labels: np.ndarray | None = None  # (num_rows,) identity
    pairs: np.ndarray | None = None  # (num_pairs, 2) rows, or numbers of videos
    same: np.ndarray | None = None  # (num_pairs,) bool
    fold: np.ndarray | None = None  # (num_pairs,)
    video: np.ndarray | None = None  # (num_rows,) number of the video
    distractors: np.ndarray | None = None  # (num_distractors, D)
    mirrored_distractors: np.ndarray | None = None  # (num_distractors, D)
    class_weight: np.ndarray | None = None  # (num_classes, D)

    def need(self, *names: str) -> list[np.ndarray]:
        """The arrays of these names.

        Raises:
            DataError: one is missing.
        """
        if missing := [name for name in names if getattr(self, name) is None]:
            arrays = "array" if len(missing) == 1 else "arrays"
            raise DataError(f"this protocol needs the {arrays} {', '.join(missing)}: give them in the --features file")
        return [getattr(self, name) for name in names]


@dataclass(frozen=True)
class EvaluationInput:
    """Features to evaluate, and what the report says of them."""

    features: FeatureSet
    description: str
    source: str  # file or folder of the features or images
    unreadable: list[str] = field(default_factory=list)  # images that are left out
    skipped: Mapping[str, int] = field(default_factory=dict)  # number of files, folders or lines of each kind


def read_probes(probes: Path, distractors: Path) -> EvaluationInput:
    """MegaFace-style features of probes and distractors; raises DataError as `data.features.read_megaface`."""
    found = read_megaface(probes, distractors)
    features = FeatureSet(features=found.probes, labels=found.identity, distractors=found.distractors)
    return EvaluationInput(features, f"features of {probes}", str(probes), skipped=found.skipped)


def read_arrays(path: Path) -> FeatureSet:
    """Read the arrays of an .npz file, without running code from it.

    Raises:
        DataError: it is no such file, or holds an array of another name.
        OSError: it cannot be opened.
    """
    names = [field.name for field in dataclasses.fields(FeatureSet)]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except (AttributeError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is not an .npz file of arrays: {error}") from error
    if unknown := sorted(set(arrays) - set(names)):
        raise DataError(f"{path} holds {', '.join(unknown)}; known arrays are {', '.join(names)}")
    if "features" not in arrays:
        raise DataError(f"{path} has no array `features`")
    return FeatureSet(**arrays)


@dataclass(frozen=True)
class TrainedNetwork:
    """A checkpoint and the images it is to be evaluated on."""

    state: dict
    config: TrainConfig  # of the training, but for the data
    seen: bool  # the images are those of the training: only its test identities are unseen
    path: Path
    benchmark: VerificationSet | None = None  # in the place of the training's kind of data

    def features(self, device: torch.device, *, mirror: bool, workers: int, folds: int | None) -> EvaluationInput:
        """Features of the identities not trained on, or of the verification set, in `folds` where it gives none.

        Raises:
            BackboneError: the network cannot be built.
            CheckpointError: the weights do not fit the network.
            DataError: the images are not those of the training any more, or cannot be read.
        """
        config = self.config
        class_weight = stored_class_weight(config.loss, criterion_state(self.state)).numpy()
        backbone = restore_backbone(config, self.state, self.path).to(device, memory_format=torch.channels_last)
        if self.benchmark is not None:
            images = self.benchmark.image_set(config.model.image_size, config.model.channels)
            part = embed(backbone, images, device, mirror=mirror, workers=workers)
            source = self.benchmark.source
            return EvaluationInput(
                benchmark_features(self.benchmark, part, class_weight, folds),
                f"{counted(len(part.labels), 'image')} of {source}",
                source,
                part.unreadable,
                self.benchmark.skipped,
            )
        # Of other images all identities are evaluated, so none are set apart.
        test_fraction = config.test_fraction if self.seen else 0.0
        splits = load_splits(config.data, config.model.image_size, config.model.channels, test_fraction, config.seed)
        if self.seen and self.state["data"] != splits.fingerprint():
            raise DataError(
                f"the identities or images of {config.data!r} have changed since the training, so the test "
                "identities may be among those trained on"
            )
        if self.seen and not len(splits.test):
            raise DataError(
                f"all identities of {config.data!r} were trained on, so there is none to evaluate on: name other images "
                "with --data"
            )
        images = splits.test if self.seen else splits.train
        part = embed(
            backbone,
            images,
            device,
            mirror=mirror,
            distortion=splits.test_distortion,
            seed=config.seed,
            workers=workers,
        )
        # The run itself was trained on none of its test identities, but its starting weights may have been.
        trained = identities_before(self.state) if self.seen else trained_identities(self.state)
        evaluated = describe_unseen(images.num_classes, count_known(images.identities, trained))
        return EvaluationInput(
            FeatureSet(part.features, part.mirrored, part.labels, class_weight=class_weight),
            f"{splits.description}: {evaluated}",
            config.data,
            sorted(part.unreadable),
            splits.skipped,
        )


def benchmark_features(
    benchmark: VerificationSet, part: Embedded, class_weight: np.ndarray, folds: int | None = None
) -> FeatureSet:
    """Features of a verification set's images; a video may miss frames, an image of a pair may not.

    Args:
        folds: number of folds where the set gives none; its reader's choice if not given.

    Raises:
        DataError: an image that pairs need cannot be read, or there are fewer pairs of a kind than folds.
    """
    fold = benchmark.fold
    if folds is not None and not benchmark.has_folds:
        try:
            fold = folds_of_each_kind(benchmark.same, folds)
        except ValueError as error:
            raise DataError(f"{benchmark.source}: {error}") from error
    if part.unreadable and not benchmark.of_videos:
        raise DataError(
            f"{len(part.unreadable)} of the images that {benchmark.source} pairs cannot be read: "
            f"{', '.join(part.unreadable[:5])}"
        )
    return FeatureSet(
        part.features,
        part.mirrored,
        pairs=benchmark.pairs,
        same=benchmark.same,
        fold=fold,
        video=benchmark.item[part.labels] if benchmark.of_videos else None,
        class_weight=class_weight,
    )


def read_checkpoint(path: Path, data: str | None, backbone: str | None, *, videos: bool = False) -> TrainedNetwork:
    """Read a checkpoint to evaluate on `data`, by default the images of its training; `videos` are preferred there.

    Raises:
        CheckpointError: it cannot be read, its options are not of this version, or its network is another one's than
            `backbone`.
        DataError: `data` is a verification set that is broken.
    """
    state = load_run(path, "evaluate")
    try:
        values = state["config"]
        reader = find_benchmark_reader(data, videos=videos) if data is not None else None
        config = TrainConfig.from_dict({**values, "data": data or values["data"]}, reads_data=reader is None)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"cannot evaluate {path}: {error}") from error
    require_named(config, backbone, path)
    benchmark = reader() if reader else None
    return TrainedNetwork(state, config, seen=config.data == values["data"], path=path, benchmark=benchmark)
