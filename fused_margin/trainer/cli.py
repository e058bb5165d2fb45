"""The commands `fused-margin train` and `evaluate`: options, errors and exit codes."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tyro
from rich.console import Console

from .checkpoint import FILE_NAME, CheckpointError, latest_run, load_checkpoint
from .config import EMBEDDED, TrainConfig
from .data import DataError
from .evaluate_config import EvaluateConfig
from .evaluate_run import run_evaluation
from .interrupts import Interrupted
from .run import run

PROG = "fused-margin train"
EVALUATE_PROG = "fused-margin evaluate"
RUNS = Path("runs")
FAILED, INTERRUPTED = 1, 130  # tyro exits with 2 on options that are not valid


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = Console(), Console(stderr=True)
    config = None
    try:
        config = parse(args)
        with _termination_as_interrupt():
            run(config, console)
    except (Interrupted, KeyboardInterrupt):
        if config is not None and (config.output / FILE_NAME).exists():
            command = f"{PROG} --resume --output {shlex.quote(str(config.output))}"
            console.print(f"interrupted; continue with:\n  {command}", highlight=False, soft_wrap=True)
        else:
            console.print("interrupted before the first step: nothing to resume")
        return INTERRUPTED
    except (CheckpointError, DataError, FloatingPointError, OSError) as error:
        return _failed(errors, error)
    return 0


def evaluate_main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = Console(), Console(stderr=True)
    try:
        config = tyro.cli(EvaluateConfig, prog=EVALUATE_PROG, args=args)
        if config.checkpoint is None and config.features is None:
            latest = latest_run(RUNS)
            if latest is None:
                raise CheckpointError(f"no run to evaluate in {RUNS}/; name its folder with --checkpoint")
            config = dataclasses.replace(config, checkpoint=latest)
        with _termination_as_interrupt():
            run_evaluation(config, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (CheckpointError, DataError, OSError) as error:
        return _failed(errors, error)
    return 0


def _failed(errors: Console, error: Exception) -> int:
    errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return FAILED


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the run as Ctrl-C does, where it would end the process at once."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def parse(args: Sequence[str]) -> TrainConfig:
    """Read the options in two passes: the defaults of the second depend on the first.

    Raises:
        CheckpointError: there is no run to resume, or options contradict it.
    """
    given = tyro.cli(TrainConfig, prog=PROG, args=args)
    if given.resume:
        output = given.output or latest_run(RUNS)
        if output is None:
            raise CheckpointError(f"no run to resume in {RUNS}/; name its folder with --output")
        try:
            started_with = TrainConfig.from_dict(load_checkpoint(output / FILE_NAME)["config"])
        except ValueError as error:
            raise CheckpointError(f"cannot resume {output}: {error}") from error
        default = started_with
    else:
        default = TrainConfig.defaults(given.data, given.network)
    config = tyro.cli(TrainConfig, prog=PROG, args=args, default=default)

    data = config.data if config.data in EMBEDDED else str(Path(config.data).resolve())
    if not given.resume:
        output = given.output or RUNS / f"{Path(data).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = dataclasses.replace(config, data=data, output=output)
    if given.resume and (differences := config.differences(started_with)):
        raise CheckpointError(f"cannot resume {output} with other options: {'; '.join(differences)}")
    return config
