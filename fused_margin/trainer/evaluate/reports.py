"""Parts that the reports of training and evaluation have in common: values, tables, versions."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

import fused_margin as fm
from fused_margin.evaluation import ScoreSummary
from fused_margin.evaluation.plurals import counted

SCORE_UNIT = {"cosine": "cosine", "weighted-l1": "log odds", "siamese-l1": "log odds"}  # by metric


def versions() -> dict[str, str]:
    """Versions of the software that computed a report."""
    return {
        "fused_margin": fm.build_info()["version"],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def score_values(summary: ScoreSummary) -> dict[str, Any]:
    """The metrics of verification scores, as JSON values."""
    tar = summary.tar
    return {
        "genuine": len(summary.genuine),
        "impostors": round(1 / tar.smallest_far),
        "auc": summary.auc,
        "equal_error_rate": summary.equal_error_rate,
        "far": tar.far,
        "tar_at_far": tar.tar,
        "threshold_at_far": tar.threshold if math.isfinite(tar.threshold) else None,
        "far_resolved": tar.resolved,
    }


def score_rows(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Table rows for `score_values`."""
    unresolved = "" if scores["far_resolved"] else f" (0 of {counted(scores['impostors'], 'impostor')} accepted)"
    return [
        (f"TAR at FAR = {scores['far']:g}", f"{scores['tar_at_far']:.2%}{unresolved}"),
        ("equal error rate", f"{scores['equal_error_rate']:.2%}"),
        ("area under the ROC curve", f"{scores['auc']:.4f}"),
    ]


def results_table(title: str) -> Table:
    """An empty table of names and values. On a narrow screen, only the names wrap."""
    table = Table(title=title, show_header=False)
    table.add_column()
    table.add_column(no_wrap=True)
    return table
