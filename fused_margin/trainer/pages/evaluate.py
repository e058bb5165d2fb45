"""The page of an evaluation, <protocol>.html."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_margin.evaluation.plurals import counted, counted_identities

from ..evaluate.config import EvaluateConfig, Protocol, ProtocolOptions
from ..evaluate.inputs import EvaluationInput
from ..evaluate.measured import Measured
from ..evaluate.reports import SCORE_UNIT
from .charts import Chart
from .identification import (
    identification_charts,
    identification_facts,
    identification_mistakes,
    identification_results,
)
from .mistakes import (
    MistakeGroup,
    describe_images,
    describe_inputs,
    describe_rows,
    pair_mistakes,
    picture_note,
    search_mistakes,
)
from .plots import rank_chart, roc_chart, score_chart, separability_chart
from .render import Command, Facts, Result, command_line, percent, version_facts, write_page
from .results import duration, fold_table, score_results, separability_result, short_path, skipped_lines

PROTOCOLS = {
    "pairs": "Pairs of images. Each fold is decided at the threshold that is best for the other folds.",
    "pairs-weighted-l1": "Pairs of images, scored by DeepFace's weighted L1, which is learned on the other folds.",
    "pairs-siamese-l1": "Pairs of images, scored by DeepFace's weighted L1, which the training has learned.",
    "lfw-insightface": "Labeled Faces in the Wild as in ArcFace's code: sum of the features of image and mirror image, "
    "squared distance.",
    "lfw-regularface": "Labeled Faces in the Wild as in RegularFace and SphereFace: concatenated features of image and "
    "mirror image minus the mean of the other folds, cosine.",
    "ytf": "YouTube Faces: pairs of videos, each with the mean feature of its frames.",
    "ytf-weighted-l1": "YouTube Faces: pairs of videos, scored by DeepFace's weighted L1, which is learned on the other "
    "folds.",
    "ytf-siamese-l1": "YouTube Faces: pairs of videos, scored by DeepFace's weighted L1, which the training has learned.",
    "identification": "Identification: each probe searches the gallery of known identities. The closed set has probes of "
    "known identities, the open set also probes of unknown ones, which a threshold must reject.",
    "megaface": "MegaFace: each probe searches the other image of its identity among distractors, one mate at a time.",
}  # What the names of protocols stand for


@dataclass(frozen=True)
class EvaluationContent:
    """What the page shows besides the values of the report."""

    config: EvaluateConfig
    options: ProtocolOptions
    inputs: EvaluationInput
    measured: Measured
    nearest_cosine: np.ndarray | None  # (num_classes,) if there are class weights


def write_evaluation_page(path: Path, report: Mapping[str, Any], content: EvaluationContent) -> None:
    """Write the page of an evaluation; `report` has the values of its JSON file."""
    result, given, inputs = report["result"], report["input"], content.inputs
    results, charts = _results_and_charts(report, content)
    if content.nearest_cosine is not None:
        results.append(separability_result(report["separability"]))
        charts.append(separability_chart(content.nearest_cosine))
    videos = content.options.protocol == "ytf"
    write_page(
        path,
        "report.html",
        {
            "kind": "evaluation",
            "title": f"{content.options.name} on {short_path(inputs.source)}",
            "lead": f"{given['description'][:1].upper()}{given['description'][1:]}. {PROTOCOLS[content.options.name]}",
            "results": results,
            "notes": [],
            "charts": charts,
            "folds": fold_table(result, result["threshold_unit"]) if "fold_accuracy" in result else None,
            "mistakes": _mistakes(result, content),
            "pictures": picture_note(inputs.shown, videos=videos),
            "unreadable": given["unreadable"],
            "skipped": skipped_lines(given["skipped"]),
            "settings_title": "What was evaluated",
            "facts": [
                Facts("Input", _input_facts(report, content)),
                Facts("Protocol", _protocol_facts(report, content.options)),
                Facts(
                    "Run",
                    [
                        ("device", report["device"]),
                        ("time", duration(report["seconds"])),
                        *version_facts(report["versions"]),
                    ],
                ),
            ],
            "commands": _commands(content),
            "json_name": path.with_suffix(".json").name,
        },
    )


def _results_and_charts(report: Mapping[str, Any], content: EvaluationContent) -> tuple[list[Result], list[Chart]]:
    """The headline numbers and the charts of the protocol."""
    result, measured = report["result"], content.measured
    if measured.identified is not None:
        return identification_results(result), identification_charts(measured.identified, result)
    assert measured.summary is not None
    results, charts = [], []
    if measured.pairs is not None:
        accuracy = percent(result["accuracy"], result["accuracy_std"])
        over = f"mean ± standard deviation over {counted(len(result['fold_accuracy']), 'fold')}"
        results.append(Result("Accuracy", accuracy, over))
    else:
        last = result["rank1"][-1]
        among = f"among {counted(last['distractors'], 'distractor')}"
        results.append(Result("Rank-1 rate", percent(last["rate"]), among))
        charts.append(rank_chart(result["rank1"]))
    if tar := result.get("tar_over_folds"):
        resolved = f"at a measured FAR of {tar['far_on_the_folds']:.2g}"
        if not tar["far_resolved"]:
            resolved = f"needs {1 / tar['far']:,.0f} impostors in the other folds; there are fewer"
        results.append(Result(f"TAR at FAR = {tar['far']:g}, over folds", percent(tar["mean"], tar["std"]), resolved))
    results += score_results(report["scores"])
    charts += [roc_chart(measured.summary), score_chart(measured.summary, SCORE_UNIT[content.options.metric])]
    return results, charts


def _mistakes(result: Mapping[str, Any], content: EvaluationContent) -> list[MistakeGroup]:
    measured = content.measured
    if measured.identified is not None:
        return identification_mistakes(measured.identified, result, content.inputs)
    arrays, shown = content.inputs.features, content.inputs.shown
    describe = describe_inputs(arrays, shown, videos=content.options.protocol == "ytf")
    if measured.pairs is not None:
        return pair_mistakes(measured.pairs, describe, SCORE_UNIT[content.options.metric])
    assert measured.misses is not None
    searches, rate = result["searches"], result["rank1"][-1]["rate"]
    if (images := content.inputs.shown_distractors) is not None:
        distractor = describe_images(images)
    else:
        distractor = describe if arrays.distractors is None else describe_rows(None, "of the distractors")
    return search_mistakes(measured.misses, round(searches * (1 - rate)), searches, describe, distractor)


def _input_facts(report: Mapping[str, Any], content: EvaluationContent) -> list[tuple[str, Any]]:
    given = report["input"]
    kind = "checkpoint" if content.config.features is None else "features"
    others = {"distractors": content.config.distractors, "gallery": content.config.gallery}
    return [
        (kind, given["file"]),
        *((name, path) for name, path in others.items() if path is not None),
        ("data", given["description"]),
        ("rows", f"{given['rows']:,}"),
        ("dimensions", f"{given['dimensions']:,}"),
        ("unreadable", f"{len(given['unreadable']):,}"),
    ]


def _protocol_facts(report: Mapping[str, Any], options: ProtocolOptions) -> list[tuple[str, Any]]:
    result = report["result"]
    flips = {"none": "not used", "sum": "added", "concat": "concatenated"}
    facts = [
        ("protocol", options.name),
        ("score", SCORE_UNIT[options.metric]),
        ("mirror image", flips[report["flip"]]),
    ]
    if report["scores"] is None:
        return facts + identification_facts(result)
    if "pairs" in result:
        facts += [
            ("pairs", f"{result['pairs']:,}"),
            ("folds", f"{len(result['fold_accuracy']):,}"),
        ]
    else:
        probes = f"{result['probes']:,} of {counted_identities(result['probe_identities'])}"
        facts += [
            ("probes", probes),
            ("distractors", f"{result['distractors']:,}"),
            ("searches", f"{result['searches']:,}"),
        ]
    scores = report["scores"]
    return [*facts, ("genuine pairs", f"{scores['genuine']:,}"), ("impostor pairs", f"{scores['impostors']:,}")]


def _commands(content: EvaluationContent) -> list[Command]:
    config = content.config
    program = "fused-margin evaluate"
    commands = [Command("Repeat this evaluation:", command_line(program, config))]
    labels = content.inputs.features.labels
    if labels is not None and config.distractors is None and config.gallery is None and labels.dtype.kind in "iu":
        plain = dataclasses.replace(
            config,
            metric="cosine",
            flip=None,
            far=None,
            num_pairs=None,
            folds=None,
            unknown=None,
            enrolled=None,
            template="mean",
        )
        others: dict[Protocol, str] = {
            "megaface": "Search each image among others:",
            "identification": "Identify the images in a gallery of some of the identities:",
        }
        if config.protocol in others:
            others["pairs"] = "Verify pairs of the images:"
        for protocol, purpose in others.items():
            if protocol != config.protocol:
                other = dataclasses.replace(plain, protocol=protocol)
                commands.append(Command(purpose, command_line(program, other)))
    if config.checkpoint is not None:
        backbone = ["--backbone", config.backbone] if config.backbone else []
        export = ["fused-margin", "export", str(config.checkpoint), *backbone]
        commands.append(Command("Export the network for PyTorch and ONNX:", shlex.join(export)))
    return commands
