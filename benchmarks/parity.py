"""The drop-ins against the libraries they replace, from your checkouts of those: `python -m benchmarks.parity`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from .parity_insightface import InsightFace
from .parity_pml import PytorchMetricLearning

SUBJECTS = {"pytorch-metric-learning": PytorchMetricLearning, "insightface": InsightFace}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print, write; exit with 1 where ours does not do what theirs does."""
    config = tyro.extras.subcommand_cli_from_dict(SUBJECTS, prog="python -m benchmarks.parity", args=arguments)
    if differences := config.run():
        sys.exit("\n".join(["Ours does not do what theirs does:", *differences]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
