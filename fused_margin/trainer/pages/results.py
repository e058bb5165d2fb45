"""Parts that the pages of trainings and evaluations have in common: headline numbers, folds, skipped files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from fused_margin.evaluation.plurals import counted

from .render import Number, Result, Table, percent


def score_results(scores: Mapping[str, Any]) -> list[Result]:
    """Headline numbers of verification scores, from the values of `reports.score_values`."""
    resolved = f"at the threshold {scores['threshold_at_far']:.3f}" if scores["threshold_at_far"] is not None else ""
    if not scores["far_resolved"]:
        resolved = f"below the rate of one of {counted(scores['impostors'], 'impostor')}, so none is accepted"
    return [
        Result(f"TAR at FAR = {scores['far']:g}", percent(scores["tar_at_far"]), resolved),
        Result("Equal error rate", percent(scores["equal_error_rate"]), "false accepts equal false rejects"),
        Result("AUC", Number(scores["auc"], f"{scores['auc']:.4f}"), "area under the ROC curve"),
    ]


def separability_result(separability: Mapping[str, float]) -> Result:
    """Headline number of the separability of the class weights."""
    mean, std = separability["mean"], separability["std"]
    number = Number(mean, f"{mean:.3f}", f"± {std:.3f}")
    return Result("Sep", number, "cosine of a class weight to its nearest other; lower is further apart")


def fold_table(result: Mapping[str, Any], unit: str) -> Table:
    """Accuracy and threshold of each fold and, for a learned metric, its heads."""
    header = ["fold", "accuracy", f"threshold ({unit})"]
    columns: list[list[str | Number]] = [
        [percent(value) for value in result["fold_accuracy"]],
        [Number(value, f"{value:.4f}") for value in result["fold_threshold"]],
    ]
    if heads := result.get("heads"):
        header += ["fitted pairs", "C", "negative weights"]
        columns += [
            [Number(value, f"{value:,}") for value in heads["fitted_pairs"]],
            [Number(value, f"{value:.3g}") for value in heads["regularisation_c"]],
            [percent(value) for value in heads["negative_weights"]],
        ]
    rows = [[str(number), *cells] for number, cells in enumerate(zip(*columns, strict=True), 1)]
    share = result["folds_share_no_identity"]
    disjoint = (
        "" if share is None else " No identity is in two folds." if share else " Identities are in several folds."
    )
    caption = f"Each fold is decided at the threshold that is best for the other folds.{disjoint}"
    return Table(caption, header, rows)


def skipped_lines(skipped: Mapping[str, int]) -> list[str]:
    """A line for each kind of files, folders or lines that were skipped on purpose."""
    return [f"{kind}: {number:,}" for kind, number in sorted(skipped.items())]


def short_path(path: str) -> str:
    """The last two parts of a path."""
    return "/".join(PurePath(path).parts[-2:])


def duration(seconds: float) -> str:
    """A time to read: "0.4 s", "58 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
