"""The command `fused-margin evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence

from fused_margin.evaluation import DataError
from fused_margin.trainer.evaluate.config import EvaluateConfig
from fused_margin.trainer.evaluate.run import run_evaluation
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

PROG = "fused-margin evaluate"
EXAMPLE = "fused-margin evaluate --checkpoint runs/photographs --data lfw --protocol lfw"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(EvaluateConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    try:
        config = parse_options(EvaluateConfig, args, prog=PROG, example=EXAMPLE)
        if config.checkpoint is None and config.features is None:
            config = dataclasses.replace(config, checkpoint=find_latest_run("evaluate", "--checkpoint"))
        with termination_as_interrupt():
            run_evaluation(config, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (BackboneError, CheckpointError, DataError, OSError) as error:
        return failed(errors, error)
    return 0
