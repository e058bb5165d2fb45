"""The results of a protocol, of which the report, the figure and the page are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fused_margin.evaluation import IdentificationResult, OperatingCurve, ScoreSummary

from .mistakes import IdentificationMistakes, Miss, ScoredPairs


@dataclass(frozen=True)
class Identified:
    """Results of the protocol identification."""

    result: IdentificationResult
    curve: OperatingCurve | None  # at rank 1; None for a closed set
    mistakes: IdentificationMistakes

    @property
    def mate_scores(self) -> np.ndarray:
        """(mated,) scores of the mates."""
        return self.result.mate_score[self.result.is_mated]

    @property
    def non_mated_scores(self) -> np.ndarray:
        """(non-mated,) best scores of the probes of unknown identities."""
        return self.result.best_score[~self.result.is_mated]


class Measured(NamedTuple):
    """Results of a protocol."""

    result: dict[str, Any]  # for the report
    headline: str
    summary: ScoreSummary | None  # of pairs; None for identification
    pairs: ScoredPairs | None = None  # of a protocol on pairs
    misses: list[Miss] | None = None  # of megaface; rows of the features, and of the distractors if they are given
    identified: Identified | None = None
