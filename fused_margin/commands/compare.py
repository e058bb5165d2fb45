"""The command `fused-margin compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_margin.evaluation import DataError
from fused_margin.trainer.compare.config import CompareConfig
from fused_margin.trainer.compare.run import compare
from fused_margin.trainer.models import BackboneError
from fused_margin.trainer.train.checkpoint import CheckpointError
from fused_margin.trainer.train.interrupts import Interrupted

from .common import INTERRUPTED, command_consoles, completion_parser, failed, parse_options, termination_as_interrupt

PROG = "fused-margin compare"
EXAMPLE = "fused-margin compare --losses arcface cosface arcface+exclusive --seeds 0 1"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(CompareConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = parse_options(CompareConfig, args, prog=PROG, example=EXAMPLE)
    try:
        with termination_as_interrupt():
            compare(config, console)
    except (Interrupted, KeyboardInterrupt):
        console.print("interrupted; the same command continues")
        return INTERRUPTED
    except (BackboneError, CheckpointError, DataError, FloatingPointError, OSError) as error:
        return failed(errors, error)
    return 0
