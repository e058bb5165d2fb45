"""The command `fused-margin compare`."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from fused_margin.evaluation import DataError
from fused_margin.trainer.compare.config import CompareConfig
from fused_margin.trainer.compare.run import compare
from fused_margin.trainer.train.checkpoint import CheckpointError
from fused_margin.trainer.train.interrupts import Interrupted

from .common import INTERRUPTED, command_consoles, failed, termination_as_interrupt

PROG = "fused-margin compare"


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = tyro.cli(CompareConfig, prog=PROG, args=args)
    try:
        with termination_as_interrupt():
            compare(config, console)
    except (Interrupted, KeyboardInterrupt):
        console.print("interrupted; the same command continues")
        return INTERRUPTED
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        return failed(errors, error)
    return 0
