"""The command `fused-margin align`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_margin.evaluation import DataError
from fused_margin.trainer.align.config import AlignConfig
from fused_margin.trainer.align.detectors import DetectorError
from fused_margin.trainer.align.photographs import align_photographs
from fused_margin.trainer.align.run import align

from .common import (
    FAILED,
    INTERRUPTED,
    command_consoles,
    completion_parser,
    failed,
    parse_options,
    termination_as_interrupt,
)

PROG = "fused-margin align"
EXAMPLE = "fused-margin align photographs aligned --detector mtcnn"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(AlignConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = parse_options(AlignConfig, args, prog=PROG, example=EXAMPLE)
    try:
        with termination_as_interrupt():
            outcome = (align if config.detector is None else align_photographs)(config, console, errors)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues")
        return INTERRUPTED
    except (DataError, DetectorError, OSError) as error:
        return failed(errors, error)
    console.print(
        f"{outcome.aligned:,} aligned, {outcome.present:,} already existed, {outcome.failed:,} failed", highlight=False
    )
    for note in outcome.notes:
        console.print(note, highlight=False, soft_wrap=True)
    return 0 if outcome.aligned or outcome.present else FAILED
