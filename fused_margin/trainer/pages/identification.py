"""Identification on the page of an evaluation: headline numbers, charts, and the most confident mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fused_margin.evaluation import OperatingCurve
from fused_margin.evaluation.plurals import counted, counted_identities

from ..evaluate.histograms import histogram
from ..evaluate.inputs import EvaluationInput
from ..evaluate.measured import Identified
from ..evaluate.mistakes import Misidentified
from .charts import Chart, Mark, Tick, dots, line_marks, plot_scales, step_path
from .mistakes import Describe, Mistake, MistakeGroup, describe_images, describe_inputs, describe_number, describe_rows
from .plots import histogram_chart
from .render import Number, Result, percent

DIR_POINTS = 300  # of the drawn curve


def identification_results(result: Mapping[str, Any]) -> list[Result]:
    """Headline numbers, from the result of the report."""
    gallery, probes = result["gallery"], result["probes"]
    at_far, verified = result["dir_at_far"], result["by_verification"]
    known = counted(probes["mated"], "known probe")
    first, *others = result["rank_rates"]
    size = f"in a gallery of {counted_identities(gallery['identities'])}"
    closed_set = [
        Result("Rank-1 rate", percent(first["rate"]), size),
        *(Result(f"Rank-{row['rank']} rate", percent(row["rate"]), f"of {known}") for row in others),
    ]
    if at_far is None:
        return closed_set
    unknown = counted(probes["non_mated"], "unknown probe")
    alarms = f"of {unknown}, accepted" if at_far["far_resolved"] else f"below the rate of one of {unknown}"
    return [
        *closed_set,
        Result(
            f"DIR at FAR = {at_far['far']:g}",
            percent(at_far["dir"]),
            "known probes at rank 1 and at or above the threshold",
        ),
        Result("Threshold", Number(at_far["threshold"], f"{at_far['threshold']:.3f}"), "cosine, at this FAR"),
        Result("FNIR", percent(at_far["fnir"]), f"of {known}, missed"),
        Result("FPIR", percent(at_far["fpir"]), alarms),
        Result(
            "By verification",
            percent(verified["mated_correct"]),
            f"of known probes accepted as their identity only; {verified['mated_ambiguous']:.2%} as others too, "
            f"{verified['mated_wrong']:.2%} only as others, {verified['mated_none']:.2%} as nobody",
        ),
    ]


def identification_charts(identified: Identified, result: Mapping[str, Any]) -> list[Chart]:
    """CMC and, for an open set, DIR over FAR and the scores of known and unknown probes."""
    closed_set = cmc_chart(np.array(result["cmc"]))
    at_far, curve = result["dir_at_far"], identified.curve
    if curve is None:
        return [closed_set]
    bins = histogram(identified.mate_scores, identified.non_mated_scores)
    scores = histogram_chart(
        bins,
        (
            f"{counted(bins.num_genuine, 'known probe')}, own identity",
            f"{counted(bins.num_impostor, 'unknown probe')}, best identity",
        ),
        (at_far["threshold"], f"threshold at FAR {at_far['far']:g}"),
        "Histograms of the scores of known probes with their identity and of unknown probes with the best one.",
        "cosine",
        "share of the probes",
    )
    return [closed_set, dir_chart(curve, at_far), scores]


def cmc_chart(cmc: np.ndarray) -> Chart:
    """The identification rate over the rank."""
    rank = np.arange(1, len(cmc) + 1)
    low = max(0.0, float(np.floor(10 * cmc[0] - 0.5) / 10))  # the curve begins above the axis
    scales = to_x, to_y = plot_scales((1, len(cmc)), (low, 1))
    return Chart(
        "Closed set (CMC)",
        f"Identification rate over rank: {cmc[0]:.2%} at rank 1, {cmc[-1]:.2%} at rank {len(cmc)}.",
        "rank",
        "identification rate",
        [Tick(float(to_x(number)), f"{number}") for number in sorted({1, *rank[rank % 5 == 0].tolist(), len(cmc)})],
        to_y.ticks,
        line_marks(rank, cmc, scales, "first", number=".2%"),
    )


def dir_chart(curve: OperatingCurve, at_far: Mapping[str, Any]) -> Chart:
    """DIR at rank 1 over a logarithmic FAR, with the reported one."""
    left = min(at_far["smallest_far"], at_far["far"], 0.5) / 2  # shows the part without false positives
    scales = to_x, to_y = plot_scales((left, 1), (0, 1), log_x=True)
    far = np.geomspace(left, 1, DIR_POINTS)
    reached = (1 - curve.fnir)[np.searchsorted(curve.fpir, far, side="right") - 1]
    point = np.array([at_far["far"]]), np.array([at_far["dir"]])
    marks = [
        Mark("line", "first", step_path(to_x(far), to_y(reached)), label="measured"),
        Mark(
            "dots",
            "second",
            dots=dots(*point, scales, ".2%"),
            label=f"DIR {at_far['dir']:.2%} at FAR {at_far['far']:g}",
        ),
    ]
    return Chart(
        "Open set (DIR over FAR)",
        f"Detection and identification rate over false alarm rate: {at_far['dir']:.2%} at {at_far['far']:g}.",
        "false alarm rate (FAR, FPIR)",
        "detection and identification rate",
        to_x.ticks,
        to_y.ticks,
        marks,
    )


def identification_mistakes(
    identified: Identified, result: Mapping[str, Any], inputs: EvaluationInput
) -> list[MistakeGroup]:
    """Wrong identities and, for an open set, accepted unknown and rejected known probes, the most confident first."""
    found, probes = identified.mistakes, result["probes"]
    probe = describe_inputs(inputs.features, inputs.shown, videos=False)
    enrolled = _describe_enrolled(inputs, probe)
    wrong = [
        Mistake(
            [probe(row.probe), enrolled(row.best), enrolled(row.mate)],
            {"cosine to the match": row.best_score, "to its identity": row.mate_score},
        )
        for row in found.wrong
        if row.mate is not None and row.mate_score is not None
    ]
    columns = "probe", "match"
    mated = counted(probes["mated"], "known probe")
    groups = [
        MistakeGroup(
            "miss",
            "Wrong identities",
            f"{found.num_wrong:,} of {mated} have a higher score with another identity than with their own. "
            f"{describe_number(found.num_wrong, 'most confident')}",
            (*columns, "its identity"),
            wrong,
        )
    ]
    if result["dir_at_far"] is None:
        return groups
    threshold = result["dir_at_far"]["threshold"]

    def listed(rows: list[Misidentified]) -> list[Mistake]:
        return [
            Mistake([probe(row.probe), enrolled(row.best)], {"cosine": row.best_score, "threshold": threshold})
            for row in rows
        ]

    return [
        *groups,
        MistakeGroup(
            "accept",
            "Accepted unknown probes",
            f"{found.num_accepted:,} of {counted(probes['non_mated'], 'unknown probe')} have a score at or above the "
            f"threshold with an identity of the gallery. {describe_number(found.num_accepted, 'highest')}",
            columns,
            listed(found.accepted),
        ),
        MistakeGroup(
            "reject",
            "Rejected known probes",
            f"{found.num_rejected:,} of {mated} have their own identity as the best match, with a score below the "
            f"threshold. {describe_number(found.num_rejected, 'lowest')}",
            columns,
            listed(found.rejected),
        ),
    ]


def _describe_enrolled(inputs: EvaluationInput, probe: Describe) -> Describe:
    if inputs.gallery is None:
        return probe
    if inputs.shown_gallery is not None:
        return describe_images(inputs.shown_gallery)
    return describe_rows(inputs.gallery.labels, "of the gallery")


def identification_facts(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Numbers of identities, templates and probes."""
    gallery, probes = result["gallery"], result["probes"]
    template = {"mean": "mean of the images", "all": "each image"}[gallery["template"]]
    return [
        ("gallery", f"{counted(gallery['images'], 'image')} of {counted_identities(gallery['identities'])}"),
        ("templates", f"{gallery['templates']:,} ({template})"),
        ("known probes", f"{probes['mated']:,} of {counted_identities(probes['mated_identities'])}"),
        ("unknown probes", f"{probes['non_mated']:,} of {counted_identities(probes['non_mated_identities'])}"),
    ]
