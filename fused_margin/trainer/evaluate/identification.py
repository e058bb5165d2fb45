"""The protocol identification: a gallery of known identities, which mated probes search, and non-mated ones if any."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fused_margin.evaluation import (
    DataError,
    DirAtFar,
    IdentificationResult,
    OperatingCurve,
    VerifiedIdentities,
    enroll,
    identification,
    identify_by_verification,
    join_mirror,
    split_gallery,
)
from fused_margin.evaluation.checks import check_features, check_labels
from fused_margin.evaluation.plurals import counted, counted_identities

from .config import ProtocolOptions
from .inputs import EvaluationInput
from .measured import Identified, Measured
from .mistakes import Misidentified, identification_mistakes
from .progress import Show, show_progress

RANKS = 1, 5, 10  # reported, if the gallery has as many identities
CURVE_POINTS = 2000  # of the operating curve, which charts draw


def choose_rows(
    labels: np.ndarray, gallery_labels: np.ndarray | None, options: ProtocolOptions, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rows to enrol and those to identify, of given images, or of a given gallery and probes.

    Raises:
        DataError: there are no mated probes.
        ValueError: the labels do not allow a split.
    """
    labels = check_labels("labels", labels)
    if gallery_labels is None:
        gallery, probes, _ = split_gallery(labels, options.unknown, options.enrolled, seed)
        return gallery, probes
    if not np.isin(labels, gallery_labels).any():
        raise DataError(
            f"no probe has an identity of the gallery: the probes' are such as {labels[0]!s}, the gallery's such as "
            f"{gallery_labels[0]!s}"
        )
    return np.arange(len(gallery_labels)), np.arange(len(labels))


def measure_identification(
    options: ProtocolOptions,
    inputs: EvaluationInput,
    seed: int,
    device: torch.device,
    show: Show,
) -> Measured:
    """Enrol the gallery, and identify the probes; `show` is called with texts of the progress.

    Raises:
        DataError: an array is missing, or there are no mated probes.
        ValueError: an array is invalid.
    """
    arrays, given = inputs.features, inputs.gallery
    (labels,) = arrays.require("labels")
    check_labels("labels", labels, len(arrays.features))
    gallery_labels = None if given is None else given.require("labels")[0]
    gallery_rows, probe_rows = choose_rows(labels, gallery_labels, options, seed)
    features = join_mirror(arrays.features, arrays.mirrored, options.flip)
    check_features("features", features)
    source = features if given is None else join_mirror(given.features, given.mirrored, options.flip)
    enrolled, probes = source[gallery_rows], features[probe_rows]
    enrolled_labels = (labels if gallery_labels is None else gallery_labels)[gallery_rows]
    gallery, probe_labels = enroll(enrolled, enrolled_labels, options.template), labels[probe_rows]

    progress = show_progress(show, "searching the gallery", "probes")
    result = identification(probes, probe_labels, gallery, device=device, progress=progress)
    at_far: DirAtFar | None = None
    verified: VerifiedIdentities | None = None
    curve: OperatingCurve | None = None
    threshold = -math.inf  # of a closed set, which accepts all
    if not result.is_mated.all():
        at_far = result.dir_at_far(options.far)
        threshold = at_far.threshold
        curve = result.operating_curve(max_points=CURVE_POINTS)
        progress = show_progress(show, "verifying all identities", "probes")
        verified = identify_by_verification(probes, probe_labels, gallery, threshold, device=device, progress=progress)
    mistakes = identification_mistakes(probes, enrolled, gallery.index_of(enrolled_labels), result, threshold)

    def to_input(row: Misidentified) -> Misidentified:
        mate = None if row.mate is None else int(gallery_rows[row.mate])
        return row._replace(probe=int(probe_rows[row.probe]), best=int(gallery_rows[row.best]), mate=mate)

    mistakes = mistakes._replace(
        wrong=[to_input(row) for row in mistakes.wrong],
        rejected=[to_input(row) for row in mistakes.rejected],
        accepted=[to_input(row) for row in mistakes.accepted],
    )
    numbers = {
        "gallery": {
            "identities": len(gallery.names),
            "images": len(enrolled),
            "templates": len(gallery.templates),
            "template": options.template,
        },
        "probes": _probe_values(probe_labels, result),
        "cmc": result.cmc.tolist(),
        "rank_rates": [{"rank": rank, "rate": result.rank_rate(rank)} for rank in RANKS if rank <= result.max_rank],
        "dir_at_far": None if at_far is None else _dir_values(result, at_far),
        "by_verification": None if verified is None else _verified_values(verified),
    }
    headline = (
        f"identification: rank-1 {result.rank_rate(1):.2%} in a gallery of {counted_identities(len(gallery.names))}"
    )
    if at_far is not None:
        headline += f", DIR {at_far.dir:.2%} at FAR {options.far:g}"
    return Measured(numbers, headline, summary=None, identified=Identified(result, curve, mistakes))


def _probe_values(labels: np.ndarray, result: IdentificationResult) -> dict[str, int]:
    is_mated = result.is_mated
    return {
        "mated": int(np.count_nonzero(is_mated)),
        "mated_identities": len(np.unique(labels[is_mated])),
        "non_mated": int(np.count_nonzero(~is_mated)),
        "non_mated_identities": len(np.unique(labels[~is_mated])),
    }


def _dir_values(result: IdentificationResult, at_far: DirAtFar) -> dict[str, Any]:
    return {
        "far": at_far.far,
        "rank": at_far.rank,
        "dir": at_far.dir,
        "threshold": at_far.threshold,
        "fnir": result.fnir(at_far.threshold),
        "fpir": result.fpir(at_far.threshold),
        "smallest_far": at_far.smallest_far,
        "far_resolved": at_far.resolved,
    }


def _verified_values(verified: VerifiedIdentities) -> dict[str, float]:
    return {
        "threshold": verified.threshold,
        "false_match_rate": verified.false_match_rate,
        "mated_correct": verified.correct,
        "mated_ambiguous": verified.ambiguous,
        "mated_wrong": verified.wrong,
        "mated_none": verified.none,
        "non_mated_one": verified.non_mated_one,
        "non_mated_several": verified.non_mated_several,
        "non_mated_none": verified.non_mated_none,
    }


def identification_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Table rows for the result of `measure_identification`."""
    at_far, verified, probes = result["dir_at_far"], result["by_verification"], result["probes"]
    rows = [
        ("known probes, unknown probes", f"{probes['mated']:,}, {probes['non_mated']:,}"),
        *((f"rank-{row['rank']}", f"{row['rate']:.2%}") for row in result["rank_rates"]),
    ]
    if at_far is None:
        return rows
    unresolved = "" if at_far["far_resolved"] else f" (0 of {counted(probes['non_mated'], 'unknown probe')} accepted)"
    return [
        *rows,
        (f"DIR at FAR = {at_far['far']:g}, rank 1", f"{at_far['dir']:.2%}{unresolved}"),
        ("threshold (cosine)", f"{at_far['threshold']:.3f}"),
        ("known probes missed at it (FNIR)", f"{at_far['fnir']:.2%}"),
        ("unknown probes accepted at it (FPIR)", f"{at_far['fpir']:.2%}"),
        ("known probes verified as themselves only", f"{verified['mated_correct']:.2%}"),
        ("known probes verified as themselves and others", f"{verified['mated_ambiguous']:.2%}"),
        ("known probes verified as others only", f"{verified['mated_wrong']:.2%}"),
        ("known probes verified as nobody", f"{verified['mated_none']:.2%}"),
    ]
