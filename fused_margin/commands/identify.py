"""The command `fused-margin identify`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_margin.evaluation import DataError
from fused_margin.trainer.identify.config import IdentifyConfig
from fused_margin.trainer.identify.run import run_identify, uses_features
from fused_margin.trainer.models import BackboneError
from fused_margin.trainer.train.checkpoint import CheckpointError

from .common import (
    INTERRUPTED,
    command_consoles,
    completion_parser,
    failed,
    find_latest_run,
    parse_options,
    termination_as_interrupt,
)

PROG = "fused-margin identify"
EXAMPLE = "fused-margin identify aligned/people aligned/visitors --checkpoint runs/photographs"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(IdentifyConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    try:
        config = parse_options(IdentifyConfig, args, prog=PROG, example=EXAMPLE)
        checkpoint = None
        if not uses_features(config):
            checkpoint = config.checkpoint or find_latest_run("identify with", "--checkpoint")
        with termination_as_interrupt():
            run_identify(config, console, checkpoint)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (BackboneError, CheckpointError, DataError, OSError) as error:
        return failed(errors, error)
    return 0
