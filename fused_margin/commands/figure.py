"""The command `fused-margin figure`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from fused_margin.trainer.figure.config import FigureConfig
from fused_margin.trainer.figure.run import run_figure
from fused_margin.trainer.train.interrupts import Interrupted

from .common import INTERRUPTED, command_consoles, completion_parser, failed, parse_options, termination_as_interrupt

PROG = "fused-margin figure"
EXAMPLE = "fused-margin figure --losses softmax arcface --digits 0 1 2 3"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(FigureConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = parse_options(FigureConfig, args, prog=PROG, example=EXAMPLE)
    torch.set_num_threads(1)  # enough for a small network, and results do not depend on the machine
    try:
        with termination_as_interrupt():
            run_figure(config, console)
    except (Interrupted, KeyboardInterrupt):
        console.print("interrupted: nothing was written")
        return INTERRUPTED
    except (FloatingPointError, OSError) as error:
        return failed(errors, error)
    return 0
