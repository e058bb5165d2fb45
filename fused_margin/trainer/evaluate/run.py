"""An evaluation: reads or computes features, applies the protocol, and writes report, figure and page."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import fused_margin as fm
from fused_margin import evaluation
from fused_margin.evaluation import DataError, FeatureSet, MegafaceGallery, WeightedL1Head, join_mirror
from fused_margin.evaluation.checks import check_features, check_labels
from fused_margin.evaluation.files import describe_skipped
from fused_margin.evaluation.plurals import counted
from fused_margin.evaluation.protocols import INSIGHTFACE_FAR, Metric

from ..config import EvaluationConfig
from ..data import EMBEDDED
from ..data.megaface_images import MegafaceImages
from ..pages.evaluate import EvaluationContent, write_evaluation_page
from ..train.checkpoint import FILE_NAME
from .config import EvaluateConfig, Protocol, ProtocolOptions
from .figures import draw_evaluation, draw_identification
from .identification import choose_rows, identification_rows, measure_identification
from .inputs import (
    EvaluationInput,
    TrainedNetwork,
    read_checkpoint,
    read_gallery,
    read_listed_probes,
    read_probes,
)
from .measured import Measured
from .mistakes import scored_pairs, worst_misses
from .network import separation
from .progress import Show
from .reports import SCORE_UNIT, results_table, score_rows, score_values, versions


def run_evaluation(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Evaluate and write report, figure and page; `checkpoint` or `features` must be set.

    Raises:
        ValueError: neither is set.
        CheckpointError: the checkpoint cannot be read or evaluated.
        DataError: the images or arrays do not allow the protocol.
        OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    use_gpu = config.accelerator != "cpu" and fm.build_info()["cuda"]["available"]
    device = torch.device("cuda" if use_gpu else "cpu")
    network: TrainedNetwork | None = None
    if config.features is not None:
        path = config.features
    elif config.checkpoint is not None:
        path = config.checkpoint / FILE_NAME if config.checkpoint.is_dir() else config.checkpoint
        data = config.data if config.data is None or config.data in EMBEDDED else str(Path(config.data).resolve())
        megaface = None
        if config.lists is not None and config.data is not None and config.distractors is not None:
            megaface = MegafaceImages.read(config.lists, Path(config.data), config.distractors, config.suffix)
            data = None
        network = read_checkpoint(path, data, config.backbone, videos=config.protocol == "ytf", megaface=megaface)
    else:
        raise ValueError("checkpoint, features: expected one of them, got neither")
    try:
        options = config.protocol_options(EvaluationConfig() if network is None else network.config.evaluation)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    distance: WeightedL1Head | None = None
    if network:
        _refuse_other_protocols(config.protocol, network)
        distance = network.distance() if options.metric == "siamese-l1" else None
    if network and (pair_list := network.verification_set):
        _refuse_unused(config, pair_list.pairs, pair_list.fold if pair_list.has_folds else None, pair_list.source)
    seed = network.config.seed if network else 0
    with console.status("computing features" if network else "reading features") as status:
        if network:
            inputs = _network_features(config, options, network, device, status.update)
        elif config.gallery is not None:
            inputs = read_gallery(config.gallery, path)
        elif config.distractors is None:
            inputs = EvaluationInput(evaluation.read_arrays(path), f"features of {path}", str(path))
        elif config.lists is None:
            inputs = read_probes(path, config.distractors)
        else:
            inputs = read_listed_probes(config.lists, path, config.distractors, config.suffix)
    arrays, description = inputs.features, inputs.description
    if not network:
        _refuse_unused(config, arrays.pairs, arrays.fold, inputs.source)
    with console.status(f"evaluating {options.name}") as status:
        try:
            measured = _measure(options, inputs, distance, seed, device, status.update)
            nearest_cosine, separability = _separation(arrays, device)
        except DataError:
            raise
        except (TypeError, ValueError) as error:  # the arrays are invalid
            evaluated = f"{path} on {inputs.source}" if network else str(path)
            raise DataError(f"cannot evaluate {evaluated}: {error}") from error

    summary, output = measured.summary, config.output or path.parent
    report: dict[str, Any] = {
        "protocol": options.name,
        "input": {
            "file": str(path),
            "description": description,
            "rows": len(arrays.features),
            "dimensions": arrays.features.shape[1],
            "unreadable": inputs.unreadable,
            "skipped": dict(inputs.skipped),
        },
        "flip": options.flip,
        "metric": options.metric,
        "result": measured.result,
        "scores": None if summary is None else score_values(summary),
        "separability": separability,
        "versions": versions(),
        "device": str(device),
        "seconds": round(time.monotonic() - started, 2),
    }
    output.mkdir(parents=True, exist_ok=True)
    title, unit = f"{description}\n{measured.headline}", SCORE_UNIT[options.metric]
    if measured.identified is not None:
        draw_identification(output / f"{options.name}.png", title, measured.identified, measured.result)
    elif summary is not None:
        draw_evaluation(output / f"{options.name}.png", title, summary, nearest_cosine, unit)
    (output / f"{options.name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    content = EvaluationContent(config, options, inputs, measured, nearest_cosine)
    write_evaluation_page(output / f"{options.name}.html", report, content)
    _print_report(console, report, measured.headline, output)
    return report


def _refuse_other_protocols(protocol: Protocol, network: TrainedNetwork) -> None:
    """Raise DataError if the protocol does not suit the images."""
    pair_list = network.verification_set
    of_videos = pair_list is not None and pair_list.of_videos
    if protocol == "ytf" and not of_videos:
        contents = "pairs of images" if pair_list else "images of identities"
        raise DataError(
            f"{pair_list.source if pair_list else network.config.data} has {contents}, and --protocol ytf compares "
            "videos: give it a folder of YouTube Faces (splits.txt), or evaluate this with --protocol pairs"
        )
    if protocol in ("megaface", "identification") and pair_list:
        raise DataError(
            f"{pair_list.source} has pairs of images without their identities, which {protocol} needs: evaluate it "
            f"with --protocol {'ytf' if of_videos else 'pairs or lfw'}, or give {protocol} a folder of identities"
        )
    if protocol != "ytf" and pair_list is not None and pair_list.of_videos:
        raise DataError(f"{pair_list.source} has pairs of videos: evaluate it with --protocol ytf")


def _refuse_unused(given: EvaluateConfig, pairs: np.ndarray | None, fold: np.ndarray | None, source: str) -> None:
    """Raise DataError for options of drawn pairs or folds, if `source` defines the pairs or folds."""
    if given.num_pairs is not None and pairs is not None and given.num_pairs != len(pairs):
        raise DataError(f"num-pairs: {source} gives {len(pairs):,} pairs, so none are drawn; leave out the option")
    if given.folds is not None and fold is not None and given.folds != (folds := len(np.unique(fold))):
        raise DataError(f"folds: {source} gives {folds} folds, not {given.folds}; leave out the option")


def _network_features(
    config: EvaluateConfig, options: ProtocolOptions, network: TrainedNetwork, device: torch.device, show: Show
) -> EvaluationInput:
    """Features of the images to evaluate on. Raises DataError, before any are computed, if they do not suit."""

    def check(labels: np.ndarray, gallery_labels: np.ndarray | None) -> None:
        try:
            choose_rows(labels, gallery_labels, options, network.config.seed)
        except ValueError as error:
            raise DataError(f"{network.config.data}: {error}") from error

    return network.features(
        device,
        mirror=options.flip != "none",
        workers=config.workers,
        folds=config.folds,
        show=show,
        gallery=config.gallery,
        check=check if options.protocol == "identification" else None,
    )


def _measure(
    options: ProtocolOptions,
    inputs: EvaluationInput,
    distance: WeightedL1Head | None,
    seed: int,
    device: torch.device,
    show: Show,
) -> Measured:
    """Apply the protocol, and `show` its progress; raises ValueError if the arrays do not allow it.

    Args:
        distance: for the metric siamese-l1.
    """
    arrays = inputs.features
    if options.protocol == "identification":
        return measure_identification(options, inputs, seed, device, show)
    if options.protocol == "megaface":
        return _measure_megaface(options, arrays, inputs.galleries, seed, device)
    if arrays.video is not None and arrays.pairs is not None and options.protocol != "ytf":
        raise DataError(
            "video: with this array, `pairs` are video indices, which --protocol ytf evaluates; if they are rows of "
            "`features`, remove `video` from the file"
        )
    disjoint: bool | None = None
    if arrays.pairs is None and options.protocol != "ytf":
        (labels,) = arrays.require("labels")
        labels = check_labels("labels", labels, len(arrays.features))
        drawn = evaluation.make_pairs(labels, options.num_pairs, options.folds, seed)
        pairs, same, fold, disjoint = drawn
    else:
        pairs, same = arrays.require("pairs", "same")
        fold = evaluation.unshuffled_folds(len(pairs), options.folds) if arrays.fold is None else arrays.fold
    if options.protocol == "lfw":
        (mirrored,) = arrays.require("mirrored")
        result = evaluation.lfw(arrays.features, mirrored, pairs, same, fold, options.variant)
    else:
        features = join_mirror(arrays.features, arrays.mirrored, options.flip)
        if options.protocol == "ytf":
            (video,) = arrays.require("video")
            metric: Metric = "cosine" if options.metric == "cosine" else "weighted-l1"
            result = evaluation.ytf(features, video, pairs, same, fold, metric, distance)
        elif options.metric == "cosine":
            result = evaluation.cosine_pairs(features, pairs, same, fold)
        else:
            result = evaluation.weighted_l1_pairs(features, pairs, same, fold, distance)
    accuracy, threshold = result.folds
    numbers: dict[str, Any] = {
        "accuracy": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std()),
        "fold_accuracy": accuracy.tolist(),
        "fold_threshold": threshold.tolist(),
        "threshold_unit": "squared distance" if options.name == "lfw-insightface" else SCORE_UNIT[options.metric],
        "pairs": len(pairs),
        "folds_share_no_identity": disjoint,
    }
    if result.heads:
        numbers["heads"] = {
            "fitted_pairs": [head.num_pairs for head in result.heads],
            "regularisation_c": [head.regularisation for head in result.heads],
            "negative_weights": [float(np.mean(head.alpha < 0)) for head in result.heads],
        }
    if distance is not None:
        numbers["distance"] = {"bias": distance.bias, "negative_weights": float(np.mean(distance.alpha < 0))}
    if result.tar is not None:
        numbers["tar_over_folds"] = {
            "far": INSIGHTFACE_FAR,
            "far_resolved": result.tar.resolved,
            "mean": float(result.tar.tar.mean()),
            "std": float(result.tar.tar.std()),
            "far_on_the_folds": float(result.tar.far.mean()),
        }
    headline = f"{options.name}: accuracy {accuracy.mean():.2%} ± {accuracy.std():.2%} over {len(accuracy)} folds"
    summary = evaluation.summarize_pairs(result.scores, same, options.far)
    return Measured(numbers, headline, summary, scored_pairs(result, pairs, same, fold, options.name))


def _measure_megaface(
    options: ProtocolOptions, arrays: FeatureSet, galleries: Sequence[MegafaceGallery], seed: int, device: torch.device
) -> Measured:
    (names,) = arrays.require("labels")
    labels = np.unique(check_labels("labels", names, len(arrays.features)), return_inverse=True)[1]
    features = join_mirror(arrays.features, arrays.mirrored, options.flip)
    if arrays.distractors is None:
        identities = np.unique(labels)
        rng = np.random.default_rng(seed)
        if len(identities) < 2:
            raise DataError("megaface needs distractors, or two identities or more to draw them from; there is one")
        number = min(max(1, round(options.probes * len(identities))), len(identities) - 1)
        is_probe = np.isin(labels, rng.permutation(identities)[:number])
        # In random order, so that small galleries have several identities.
        probe_rows, distractor_rows = np.flatnonzero(is_probe), rng.permutation(np.flatnonzero(~is_probe))
        probes, distractors = features[probe_rows], features[distractor_rows]
        labels = labels[probe_rows]
    else:
        probe_rows, distractor_rows = np.arange(len(features)), np.arange(len(arrays.distractors))
        probes = features
        distractors = join_mirror(arrays.distractors, arrays.mirrored_distractors, options.flip)
    by_gallery = []
    if galleries:
        results = evaluation.megaface_galleries(probes, labels, distractors, galleries, options.far, device)
        measured = results.mean
        by_gallery = [
            {"distractors": gallery.size, "set": gallery.number, "rank1": rank1, "tar_at_far": tar}
            for gallery, rank1, tar in zip(galleries, results.rank1.tolist(), results.tar.tolist(), strict=True)
        ]
    else:
        measured = evaluation.megaface(probes, labels, distractors, far=options.far, device=device)
    rows = zip(measured.sizes.tolist(), measured.rank1.tolist(), strict=True)
    largest = int(measured.sizes[-1])
    numbers = {
        "probes": len(probes),
        "probe_identities": len(np.unique(labels)),
        "distractors": largest,
        "searches": 2 * len(measured.genuine),
        "rank1": [{"distractors": size, "rate": rate} for size, rate in rows],
        **({"galleries": by_gallery} if by_gallery else {}),
    }
    headline = f"megaface: rank-1 {measured.rank1[-1]:.2%} among {counted(largest, 'distractor')}"
    summary = evaluation.summarize(measured.genuine, measured.impostor, measured.tar, measured.impostor_count)
    misses = [
        miss._replace(
            probe=int(probe_rows[miss.probe]),
            mate=int(probe_rows[miss.mate]),
            distractor=int(distractor_rows[miss.distractor]),
        )
        for miss in worst_misses(probes, labels, measured)
    ]
    return Measured(numbers, headline, summary, misses=misses)


def _separation(arrays: FeatureSet, device: torch.device) -> tuple[np.ndarray | None, dict[str, float] | None]:
    if arrays.class_weight is None:
        return None, None
    check_features("class_weight", arrays.class_weight)
    cosine, (mean, std) = separation(torch.from_numpy(arrays.class_weight).to(device))
    return cosine, {"mean": mean, "std": std}


def _print_report(console: Console, report: dict[str, Any], headline: str, output: Path) -> None:
    scores, result = report["scores"], report["result"]
    console.print(report["input"]["description"], highlight=False)
    table = results_table(headline)
    for name, value in identification_rows(result) if scores is None else ():
        table.add_row(name, value)
    for row in result.get("rank1", ()):
        table.add_row(f"rank-1 among {counted(row['distractors'], 'distractor')}", f"{row['rate']:.2%}")
    if tar := result.get("tar_over_folds"):
        needed = f"{1 / tar['far']:,.0f}"
        unresolved = "" if tar["far_resolved"] else f" (under {needed} impostors)"
        table.add_row(f"TAR at FAR = {tar['far']:g}, over folds", f"{tar['mean']:.2%} ± {tar['std']:.2%}{unresolved}")
    for name, value in () if scores is None else score_rows(scores):
        table.add_row(name, value)
    if separability := report["separability"]:
        table.add_row("Sep of the class weights", f"{separability['mean']:.3f} ± {separability['std']:.3f}")
    console.print(table)
    if skipped := report["input"]["skipped"]:
        console.print(describe_skipped(skipped), highlight=False, soft_wrap=True)
    if unreadable := report["input"]["unreadable"]:
        console.print(f"skipped {counted(len(unreadable), 'unreadable image')}, listed in the report")
    name = report["protocol"]
    console.print(f"files in {output}: {name}.json, {name}.png, {name}.html", highlight=False, soft_wrap=True)
