"""`python -m benchmarks.parity`: compares a drop-in with the library that it replaces, from your checkout of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import tyro

from .insightface import InsightFace
from .pytorch_metric_learning import PytorchMetricLearning

SUBJECTS = {"pytorch-metric-learning": PytorchMetricLearning, "insightface": InsightFace}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print and write the result; exit with 1 if the drop-in behaves differently."""
    config = tyro.extras.subcommand_cli_from_dict(SUBJECTS, prog="python -m benchmarks.parity", args=arguments)
    if differences := config.run():
        sys.exit("\n".join(["fused_margin differs from the library:", *differences]))


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
