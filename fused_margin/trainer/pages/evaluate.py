"""The page of an evaluation, <protocol>.html."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fused_margin.evaluation import ScoreSummary
from fused_margin.evaluation.plurals import counted, counted_identities

from ..evaluate.config import EvaluateConfig, ProtocolOptions
from ..evaluate.inputs import EvaluationInput
from ..evaluate.mistakes import Miss, ScoredPairs
from ..evaluate.reports import SCORE_UNIT
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
    "lfw-insightface": "Labeled Faces in the Wild as in ArcFace's code: sum of the features of image and mirror image, "
    "squared distance.",
    "lfw-regularface": "Labeled Faces in the Wild as in RegularFace and SphereFace: concatenated features of image and "
    "mirror image minus the mean of the other folds, cosine.",
    "ytf": "YouTube Faces: pairs of videos, each with the mean feature of its frames.",
    "ytf-weighted-l1": "YouTube Faces: pairs of videos, scored by DeepFace's weighted L1, which is learned on the other "
    "folds.",
    "megaface": "MegaFace: each probe searches the other image of its identity among distractors, one mate at a time.",
}  # What the names of protocols stand for


@dataclass(frozen=True)
class EvaluationContent:
    """What the page shows besides the values of the report."""

    config: EvaluateConfig
    options: ProtocolOptions
    inputs: EvaluationInput
    summary: ScoreSummary
    pairs: ScoredPairs | None  # of a protocol on pairs
    misses: list[Miss] | None  # of megaface
    nearest_cosine: np.ndarray | None  # (num_classes,) if there are class weights


def write_evaluation_page(path: Path, report: Mapping[str, Any], content: EvaluationContent) -> None:
    """Write the page of an evaluation; `report` has the values of its JSON file."""
    result, given, inputs = report["result"], report["input"], content.inputs
    if content.pairs is not None:
        accuracy = percent(result["accuracy"], result["accuracy_std"])
        over = f"mean ± standard deviation over {counted(len(result['fold_accuracy']), 'fold')}"
        results = [Result("Accuracy", accuracy, over)]
        charts = []
    else:
        last = result["rank1"][-1]
        results = [Result("Rank-1 rate", percent(last["rate"]), f"among {counted(last['distractors'], 'distractor')}")]
        charts = [rank_chart(result["rank1"])]
    if tar := result.get("tar_over_folds"):
        resolved = f"at a measured FAR of {tar['far_on_the_folds']:.2g}"
        if not tar["far_resolved"]:
            resolved = f"needs {1 / tar['far']:,.0f} impostors in the other folds; there are fewer"
        results.append(Result(f"TAR at FAR = {tar['far']:g}, over folds", percent(tar["mean"], tar["std"]), resolved))
    results += score_results(report["scores"])
    charts += [roc_chart(content.summary), score_chart(content.summary, SCORE_UNIT[content.options.metric])]
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


def _mistakes(result: Mapping[str, Any], content: EvaluationContent) -> list[MistakeGroup]:
    arrays, shown = content.inputs.features, content.inputs.shown
    describe = describe_inputs(arrays, shown, videos=content.options.protocol == "ytf")
    if content.pairs is not None:
        return pair_mistakes(content.pairs, describe, SCORE_UNIT[content.options.metric])
    assert content.misses is not None
    searches, rate = result["searches"], result["rank1"][-1]["rate"]
    if (images := content.inputs.shown_distractors) is not None:
        distractor = describe_images(images)
    else:
        distractor = describe if arrays.distractors is None else describe_rows(None, "of the distractors")
    return search_mistakes(content.misses, round(searches * (1 - rate)), searches, describe, distractor)


def _input_facts(report: Mapping[str, Any], content: EvaluationContent) -> list[tuple[str, Any]]:
    given = report["input"]
    kind = "checkpoint" if content.config.features is None else "features"
    distractors = [] if content.config.distractors is None else [("distractors", content.config.distractors)]
    return [
        (kind, given["file"]),
        *distractors,
        ("data", given["description"]),
        ("rows", f"{given['rows']:,}"),
        ("dimensions", f"{given['dimensions']:,}"),
        ("unreadable", f"{len(given['unreadable']):,}"),
    ]


def _protocol_facts(report: Mapping[str, Any], options: ProtocolOptions) -> list[tuple[str, Any]]:
    result, scores = report["result"], report["scores"]
    flips = {"none": "not used", "sum": "added", "concat": "concatenated"}
    facts = [
        ("protocol", options.name),
        ("score", SCORE_UNIT[options.metric]),
        ("mirror image", flips[report["flip"]]),
    ]
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
    return [*facts, ("genuine pairs", f"{scores['genuine']:,}"), ("impostor pairs", f"{scores['impostors']:,}")]


def _commands(content: EvaluationContent) -> list[Command]:
    config = content.config
    program = "fused-margin evaluate"
    commands = [Command("Repeat this evaluation:", command_line(program, config))]
    if content.inputs.features.labels is not None and config.distractors is None:
        plain = dataclasses.replace(config, metric="cosine", flip=None, far=None, num_pairs=None, folds=None)
        if config.protocol != "megaface":
            search = dataclasses.replace(plain, protocol="megaface")
            commands.append(Command("Search each image among others:", command_line(program, search)))
        else:
            pairs = dataclasses.replace(plain, protocol="pairs")
            commands.append(Command("Verify pairs of the images:", command_line(program, pairs)))
    if config.checkpoint is not None:
        backbone = ["--backbone", config.backbone] if config.backbone else []
        export = ["fused-margin", "export", str(config.checkpoint), *backbone]
        commands.append(Command("Export the network for PyTorch and ONNX:", shlex.join(export)))
    return commands
