"""One evaluation from features to report: protocol, measures, files."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

import fused_margin as fm

from . import protocols, verification
from .array_checks import check_features, check_integers
from .checkpoint import FILE_NAME
from .config import EMBEDDED, EvaluationConfig
from .data import DataError
from .data.listing import describe_skipped
from .evaluate import separation
from .evaluate_config import EvaluateConfig, Protocol
from .feature_set import EvaluationInput, FeatureSet, TrainedNetwork, read_arrays, read_checkpoint, read_probes
from .figures import draw_evaluation
from .folds import unshuffled_folds
from .wording import counted

SCORE_UNIT: dict[protocols.Metric, str] = {"cosine": "cosine", "weighted-l1": "log odds"}


class Measured(NamedTuple):
    """What a protocol gives."""

    result: dict[str, Any]  # the protocol's own numbers, for the report
    headline: str
    summary: verification.ScoreSummary


def run_evaluation(config: EvaluateConfig, console: Console) -> dict[str, Any]:
    """Evaluate and write report and picture; `checkpoint` or `features` is set.

    Raises:
        CheckpointError: the checkpoint cannot be read or evaluated.
        DataError: the images or arrays do not allow the protocol.
        OSError: a file cannot be read or written.
    """
    started = time.monotonic()
    use_gpu = config.accelerator != "cpu" and fm.build_info()["cuda"]["available"]
    device = torch.device("cuda" if use_gpu else "cpu")
    network: TrainedNetwork | None = None
    if config.features is None:
        path = config.checkpoint / FILE_NAME if config.checkpoint.is_dir() else config.checkpoint
        data = config.data if config.data is None or config.data in EMBEDDED else str(Path(config.data).resolve())
        network = read_checkpoint(path, data, config.backbone, videos=config.protocol == "ytf")
    else:
        path = config.features
    asked = config
    try:
        config = config.filled_in(EvaluationConfig() if network is None else network.config.evaluation)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    if network:
        _refuse_other_protocols(config.protocol, network)
    if network and (benchmark := network.benchmark):
        _refuse_unused(asked, benchmark.pairs, benchmark.fold if benchmark.has_folds else None, benchmark.source)
    with console.status("computing features" if network else "reading features"):
        if network:
            found = network.features(device, mirror=config.flip != "none", workers=config.workers, folds=asked.folds)
        elif config.distractors is None:
            found = EvaluationInput(read_arrays(path), f"features of {path}", str(path))
        else:
            found = read_probes(path, config.distractors)
    given, description = found.features, found.description
    if not network:
        _refuse_unused(asked, given.pairs, given.fold, found.source)
    with console.status(f"evaluating {config.name}"):
        try:
            measured = _measure(config, given, network.config.seed if network else 0, device)
            nearest_cosine, separability = _separation(given, device)
        except DataError:
            raise
        except (TypeError, ValueError) as error:  # what the arrays are found to be
            evaluated = f"{path} on {found.source}" if network else str(path)
            raise DataError(f"cannot evaluate {evaluated}: {error}") from error

    summary, versions = measured.summary, {"fused_margin": fm.build_info()["version"], "torch": torch.__version__}
    output = config.output or path.parent
    report = {
        "protocol": config.name,
        "input": {
            "file": str(path),
            "description": description,
            "rows": len(given.features),
            "dimensions": given.features.shape[1],
            "unreadable": found.unreadable,
            "skipped": dict(found.skipped),
        },
        "flip": config.flip,
        "metric": config.metric,
        "result": measured.result,
        "scores": verification.score_values(summary),
        "separability": separability,
        "versions": {**versions, "python": platform.python_version()},
        "device": str(device),
        "seconds": round(time.monotonic() - started, 2),
    }
    output.mkdir(parents=True, exist_ok=True)
    title, unit = f"{description}\n{measured.headline}", SCORE_UNIT[config.metric]
    draw_evaluation(output / f"{config.name}.png", title, summary, nearest_cosine, unit)
    (output / f"{config.name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _print_report(console, report, measured.headline, output)
    return report


def _refuse_other_protocols(protocol: Protocol, network: TrainedNetwork) -> None:
    """Raises DataError where the images are not what the protocol evaluates."""
    benchmark = network.benchmark
    of_videos = benchmark is not None and benchmark.of_videos
    if protocol == "ytf" and not of_videos:
        what = "pairs images" if benchmark else "has images of identities"
        raise DataError(
            f"{benchmark.source if benchmark else network.config.data} {what}, and --protocol ytf compares videos: "
            "give it a folder of YouTube Faces (splits.txt), or evaluate this with --protocol pairs"
        )
    if protocol == "megaface" and benchmark:
        raise DataError(
            f"{benchmark.source} says which pairs show one identity, but not which identities the images show, as "
            f"megaface needs: evaluate it with --protocol {'ytf' if of_videos else 'pairs or lfw'}, or give megaface "
            "a folder of identities"
        )
    if protocol != "ytf" and of_videos:
        raise DataError(f"{benchmark.source} pairs videos: evaluate it with --protocol ytf")


def _refuse_unused(asked: EvaluateConfig, pairs: np.ndarray | None, fold: np.ndarray | None, source: str) -> None:
    """Raises DataError for options of drawn pairs or folds, where `source` gives them."""
    if asked.num_pairs is not None and pairs is not None and asked.num_pairs != len(pairs):
        raise DataError(f"num-pairs: {source} gives {len(pairs):,} pairs, so none are drawn; leave out the option")
    if asked.folds is not None and fold is not None and asked.folds != (folds := len(np.unique(fold))):
        raise DataError(f"folds: {source} gives {folds} folds, not {asked.folds}; leave out the option")


def _measure(config: EvaluateConfig, given: FeatureSet, seed: int, device: torch.device) -> Measured:
    """Apply the protocol; raises ValueError where the arrays do not allow it."""
    if config.protocol == "megaface":
        return _measure_megaface(config, given, seed, device)
    if given.video is not None and given.pairs is not None and config.protocol != "ytf":
        raise DataError(
            "video: with this array `pairs` are numbers of videos, which --protocol ytf evaluates; if they are rows of "
            "`features`, leave `video` out of the file"
        )
    disjoint = None
    if given.pairs is None and config.protocol != "ytf":
        (labels,) = given.need("labels")
        check_integers("labels", labels, (len(given.features),))
        drawn = verification.make_pairs(labels, config.num_pairs, config.folds, seed)
        pairs, same, fold, disjoint = drawn
    else:
        pairs, same = given.need("pairs", "same")
        fold = unshuffled_folds(len(pairs), config.folds) if given.fold is None else given.fold
    if config.protocol == "lfw":
        result = protocols.lfw(given.features, *given.need("mirrored"), pairs, same, fold, config.variant)
    else:
        features = protocols.join_mirror(given.features, given.mirrored, config.flip)
        if config.protocol == "ytf":
            result = protocols.ytf(features, *given.need("video"), pairs, same, fold, config.metric)
        else:
            result = protocols.COMPARE[config.metric](features, pairs, same, fold)
    accuracy, threshold = result.folds
    numbers = {
        "accuracy": float(accuracy.mean()),
        "accuracy_std": float(accuracy.std()),
        "fold_accuracy": accuracy.tolist(),
        "fold_threshold": threshold.tolist(),
        "threshold_unit": "squared distance" if config.name == "lfw-insightface" else SCORE_UNIT[config.metric],
        "pairs": len(pairs),
        "folds_share_no_identity": disjoint,
    }
    if result.heads:
        numbers["heads"] = {
            "fitted_pairs": [head.num_pairs for head in result.heads],
            "regularisation_c": [head.regularisation for head in result.heads],
            "negative_weights": [float(np.mean(head.alpha < 0)) for head in result.heads],
        }
    if result.tar is not None:
        numbers["tar_over_folds"] = {
            "far": protocols.INSIGHTFACE_FAR,
            "far_resolved": result.tar.resolved,
            "mean": float(result.tar.tar.mean()),
            "std": float(result.tar.tar.std()),
            "far_on_the_folds": float(result.tar.far.mean()),
        }
    headline = f"{config.name}: accuracy {accuracy.mean():.2%} ± {accuracy.std():.2%} over {len(accuracy)} folds"
    return Measured(numbers, headline, verification.summarize_pairs(result.scores, same, config.far))


def _measure_megaface(config: EvaluateConfig, given: FeatureSet, seed: int, device: torch.device) -> Measured:
    (labels,) = given.need("labels")
    check_integers("labels", labels, (len(given.features),))
    features = protocols.join_mirror(given.features, given.mirrored, config.flip)
    if given.distractors is None:
        identities = np.unique(labels)
        rng = np.random.default_rng(seed)
        if len(identities) < 2:
            raise DataError("megaface needs distractors, or two identities or more to take them from; there is one")
        number = min(max(1, round(config.probes * len(identities))), len(identities) - 1)
        is_probe = np.isin(labels, rng.permutation(identities)[:number])
        # In random order, so that the first of them are not all of one identity.
        probes, distractors = features[is_probe], features[rng.permutation(np.flatnonzero(~is_probe))]
        labels = labels[is_probe]
    else:
        probes = features
        distractors = protocols.join_mirror(given.distractors, given.mirrored_distractors, config.flip)
    found = protocols.megaface(probes, labels, distractors, far=config.far, device=device)
    rows = zip(found.sizes.tolist(), found.rank1.tolist(), strict=True)
    numbers = {
        "probes": len(probes),
        "probe_identities": len(np.unique(labels)),
        "distractors": len(distractors),
        "searches": 2 * len(found.genuine),
        "rank1": [{"distractors": size, "rate": rate} for size, rate in rows],
    }
    headline = f"megaface: rank-1 {found.rank1[-1]:.2%} among {counted(len(distractors), 'distractor')}"
    summary = verification.summarize(found.genuine, found.impostor, found.tar, found.impostor_count)
    return Measured(numbers, headline, summary)


def _separation(given: FeatureSet, device: torch.device) -> tuple[np.ndarray | None, dict[str, float] | None]:
    if given.class_weight is None:
        return None, None
    check_features("class_weight", given.class_weight)
    cosine, (mean, std) = separation(torch.from_numpy(given.class_weight).to(device))
    return cosine, {"mean": mean, "std": std}


def _print_report(console: Console, report: dict[str, Any], headline: str, output: Path) -> None:
    scores, result = report["scores"], report["result"]
    console.print(report["input"]["description"], highlight=False)
    table = verification.results_table(headline)
    for row in result.get("rank1", ()):
        table.add_row(f"rank-1 among {counted(row['distractors'], 'distractor')}", f"{row['rate']:.2%}")
    if tar := result.get("tar_over_folds"):
        needed = f"{1 / tar['far']:,.0f}"
        unresolved = "" if tar["far_resolved"] else f" (needs {needed} impostors in the other folds; there are fewer)"
        table.add_row(f"TAR at FAR = {tar['far']:g}, over folds", f"{tar['mean']:.2%} ± {tar['std']:.2%}{unresolved}")
    for row in verification.score_rows(scores):
        table.add_row(*row)
    if separability := report["separability"]:
        table.add_row("Sep of the class weights", f"{separability['mean']:.3f} ± {separability['std']:.3f}")
    console.print(table)
    if skipped := report["input"]["skipped"]:
        console.print(describe_skipped(skipped), highlight=False, soft_wrap=True)
    if unreadable := report["input"]["unreadable"]:
        console.print(f"left out {counted(len(unreadable), 'unreadable image')}, named in the report")
    name = report["protocol"]
    console.print(f"files in {output}: {name}.json, {name}.png", highlight=False, soft_wrap=True)
