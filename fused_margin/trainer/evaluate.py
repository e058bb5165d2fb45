"""Evaluation of a trained backbone: embeddings of the test images, then the protocols' numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, SequentialSampler

import fused_margin as fm

from . import verification
from .config import TrainConfig
from .data.augment import augment
from .data.base import DataError, Splits, data_loader, seeded_generator, to_input

TEST_STREAM = 2  # keeps the test images' distortion apart from the training's
BATCH_SIZE = 256


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the unseen identities, and on the class weights."""

    accuracy: verification.FoldAccuracy
    roc: verification.RocCurve
    auc: float
    tar: float  # at the configured false accept rate
    num_pairs: int
    folds_disjoint: bool
    nearest_cosine: np.ndarray  # (num_classes,) cosine of each class weight to its nearest
    separability: tuple[float, float]  # mean and standard deviation of it
    unreadable: list[str]


@torch.no_grad()
def embed(
    backbone: nn.Module, splits: Splits, config: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor, list[str]]:
    """Unit embeddings (num_images, D) of the readable test images, their labels, the others."""
    sampler = BatchSampler(SequentialSampler(splits.test), BATCH_SIZE, drop_last=False)
    embeddings, labels, unreadable = [], [], []
    backbone.eval()
    for number, batch in enumerate(data_loader(splits.test, sampler, config.workers)):
        unreadable += batch.unreadable
        if not len(batch.labels):
            continue
        inputs = to_input(batch.images.to(device))
        if splits.test_distortion is not None:
            generator = seeded_generator(config.seed, TEST_STREAM, number, device=device)
            inputs = augment(inputs, splits.test_distortion, generator)
        features = backbone(inputs)
        if config.evaluation.flip == "concat":
            features = torch.cat([features, backbone(inputs.flip(-1))], dim=1)
        embeddings.append(F.normalize(features.float()).cpu())
        labels.append(batch.labels)
    if not embeddings:
        raise DataError(f"none of the {len(splits.test)} test images could be read")
    return torch.cat(embeddings), torch.cat(labels), unreadable


def evaluate(
    backbone: nn.Module,
    class_weight: Tensor,
    splits: Splits,
    config: TrainConfig,
    device: torch.device,
) -> Evaluation:
    """Verify the backbone on pairs of the test images."""
    embeddings, labels, unreadable = embed(backbone, splits, config, device)
    options = config.evaluation
    pairs = verification.make_pairs(labels.numpy(), options.pairs, options.folds, config.seed)
    first, second = torch.from_numpy(pairs.indices).T
    scores = (embeddings[first] * embeddings[second]).sum(dim=1).numpy()
    roc = verification.roc(scores, pairs.same)
    return Evaluation(
        accuracy=verification.kfold_accuracy(scores, pairs.same, pairs.fold),
        roc=roc,
        auc=verification.area_under_curve(roc),
        tar=verification.tar_at_far(roc, options.far),
        num_pairs=len(pairs.same),
        folds_disjoint=pairs.folds_disjoint,
        nearest_cosine=fm.functional.nearest_class(class_weight).cosine.cpu().numpy(),
        separability=tuple(fm.functional.separability(class_weight)),
        unreadable=unreadable,
    )
