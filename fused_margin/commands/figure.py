"""The command `fused-margin figure`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import tyro

from fused_margin.trainer.figure.config import FigureConfig
from fused_margin.trainer.figure.run import run_figure
from fused_margin.trainer.train.interrupts import Interrupted

from .common import INTERRUPTED, command_consoles, failed, termination_as_interrupt

PROG = "fused-margin figure"


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = tyro.cli(FigureConfig, prog=PROG, args=args)
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
