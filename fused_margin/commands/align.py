"""The command `fused-margin align`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_margin.evaluation import DataError
from fused_margin.trainer.align.run import AlignConfig, align

from .common import FAILED, INTERRUPTED, command_consoles, completion_parser, failed, parse_options

PROG = "fused-margin align"
EXAMPLE = "fused-margin align photographs landmarks.csv aligned"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(AlignConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = parse_options(AlignConfig, args, prog=PROG, example=EXAMPLE)
    try:
        outcome = align(config, console, errors)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        return INTERRUPTED
    except (DataError, OSError) as error:
        return failed(errors, error)
    console.print(
        f"{outcome.aligned:,} aligned, {outcome.present:,} already existed, {outcome.failed:,} failed", highlight=False
    )
    return 0 if outcome.aligned or outcome.present else FAILED
