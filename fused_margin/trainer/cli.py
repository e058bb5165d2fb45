"""The commands `fused-margin train` and `evaluate`: options, errors and exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from .checkpoint import FILE_NAME, CheckpointError, latest_run, load_run
from .config import EMBEDDED, TrainConfig
from .config_values import ConfigError, overlay, read_file
from .consoles import command_consoles
from .data import DataError
from .devices import is_first_process
from .evaluate_config import EvaluateConfig
from .evaluate_run import run_evaluation
from .interrupts import Interrupted
from .models import BackboneError, require_named
from .run import run

PROG = "fused-margin train"
EVALUATE_PROG = "fused-margin evaluate"
RUNS = Path("runs")
FAILED, INVALID, INTERRUPTED = 1, 2, 130  # tyro too exits with 2 on options that are not valid


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles(quiet=not is_first_process())
    config = None
    try:
        config = parse(args)
        with termination_as_interrupt():
            run(config, console)
    except (Interrupted, KeyboardInterrupt):
        if config is not None and (config.output / FILE_NAME).exists():
            command = f"{PROG} --resume --output {shlex.quote(str(config.output))}"
            console.print(f"interrupted; continue with:\n  {command}", highlight=False, soft_wrap=True)
        else:
            console.print("interrupted before the first step: nothing to resume")
        return INTERRUPTED
    except ConfigError as error:
        return failed(errors, error, INVALID)
    except (BackboneError, CheckpointError, DataError, FloatingPointError, OSError) as error:
        return failed(errors, error)
    return 0


def evaluate_main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    try:
        config = tyro.cli(EvaluateConfig, prog=EVALUATE_PROG, args=args)
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


def failed(errors: Console, error: Exception, code: int = FAILED) -> int:
    """Say what went wrong; returns the exit code."""
    errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
    return code


def find_latest_run(purpose: str, option: str) -> Path:
    """The folder of the latest run.

    Raises:
        CheckpointError: there is none; `option` names another.
    """
    latest = latest_run(RUNS)
    if latest is None:
        raise CheckpointError(f"no run to {purpose} in {RUNS}/; name its folder with {option}")
    return latest


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
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
        ConfigError: the configuration file is not valid.
    """
    file, values = _read_file(args)
    # Help is the second pass's, with the defaults of the data and the loss that are asked for.
    first = [word for word in args if word not in ("-h", "--help")]
    given = tyro.cli(TrainConfig, prog=PROG, args=first, default=_with_file(TrainConfig(), values, file))
    if given.resume and len(first) == len(args):
        output = given.output or find_latest_run("resume", "--output")
        try:
            started_with = TrainConfig.from_dict(load_run(output / FILE_NAME, "resume")["config"])
        except ValueError as error:
            raise CheckpointError(f"cannot resume {output}: {error}") from error
        require_named(started_with, given.backbone, output / FILE_NAME)
        default = started_with
    else:
        default = TrainConfig.defaults(given.data, given.network, given.loss.name)
    config = tyro.cli(TrainConfig, prog=PROG, args=args, default=_with_file(default, values, file))

    data = config.data if config.data in EMBEDDED else str(Path(config.data).resolve())
    if not given.resume:
        output = given.output or RUNS / f"{Path(data).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = dataclasses.replace(config, data=data, output=output)
    if config.weights is not None:
        config = dataclasses.replace(config, weights=config.weights.resolve())
    if given.resume and (differences := config.differences(started_with)):
        raise CheckpointError(f"cannot resume {output} with other options: {'; '.join(differences)}")
    return config


def _read_file(args: Sequence[str]) -> tuple[Path | None, dict[str, Any]]:
    """The configuration file that the arguments name, and its values."""
    finder = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--data")
    found = finder.parse_known_args(args)[0]
    if found.config is None:
        return None, {}
    values = read_file(found.config)
    if misplaced := sorted({"config", "resume"} & set(values)):
        raise ConfigError(f"{found.config}: {', '.join(misplaced)}: only on the command line")
    if found.data is not None:
        values.pop("data", None)  # what is replaced need not be there
    return found.config, values


def _with_file(default: TrainConfig, values: Mapping[str, Any], file: Path | None) -> TrainConfig:
    try:
        return overlay(default, values)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
