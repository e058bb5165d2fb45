"""The command `fused-margin train`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_margin import cli
from fused_margin.evaluation import DataError
from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.config_values import ConfigError, overlay, read_file
from fused_margin.trainer.data import EMBEDDED
from fused_margin.trainer.models import BackboneError
from fused_margin.trainer.models.build import require_named
from fused_margin.trainer.train.checkpoint import FILE_NAME, CheckpointError, load_run
from fused_margin.trainer.train.devices import is_first_process
from fused_margin.trainer.train.interrupts import Interrupted
from fused_margin.trainer.train.run import run

from .common import (
    INTERRUPTED,
    INVALID,
    RUNS,
    command_consoles,
    completion_parser,
    failed,
    find_latest_run,
    parse_options,
    termination_as_interrupt,
)

PROG = "fused-margin train"
EXAMPLE = "fused-margin train --data photographs --loss.name cosface --output runs/photographs"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(TrainConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles(quiet=not is_first_process())
    config = None
    try:
        config = parse(args)
        with termination_as_interrupt():
            run(config, console)
    except (Interrupted, KeyboardInterrupt):
        if config is not None and (config.output_folder / FILE_NAME).exists():
            command = f"{PROG} --resume --output {shlex.quote(str(config.output))}"
            console.print(f"interrupted; continue with:\n  {command}", highlight=False, soft_wrap=True)
        else:
            console.print("interrupted before the first checkpoint: nothing to resume")
        return INTERRUPTED
    except ConfigError as error:
        return failed(errors, error, INVALID)
    except (BackboneError, CheckpointError, DataError, FloatingPointError, OSError) as error:
        return failed(errors, error)
    return 0


def parse(args: Sequence[str]) -> TrainConfig:
    """Parse the options in two passes, because the defaults depend on some of the options.

    Raises:
        CheckpointError: there is no run to resume, or options differ from it.
        ConfigError: the configuration file is not valid.
    """
    file, values = _read_file(args)
    # The second pass prints the help, with the defaults for the given data and loss.
    first = [word for word in args if word not in ("-h", "--help")]
    given = _parse(first, _with_file(TrainConfig(), values, file))
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
    config = _parse(args, _with_file(default, values, file))

    data = config.data if config.data in EMBEDDED else str(Path(config.data).resolve())
    if not given.resume:
        output = given.output or RUNS / f"{Path(data).name}-{time.strftime('%Y%m%d-%H%M%S')}"
    config = dataclasses.replace(config, data=data, output=output)
    if config.weights is not None:
        config = dataclasses.replace(config, weights=config.weights.resolve())
    if given.resume and (differences := config.differences(started_with)):
        raise CheckpointError(f"cannot resume {output} with other options: {'; '.join(differences)}")
    return config


def _parse(args: Sequence[str], default: TrainConfig) -> TrainConfig:
    return parse_options(TrainConfig, args, prog=PROG, example=EXAMPLE, default=default)


def _read_file(args: Sequence[str]) -> tuple[Path | None, dict[str, Any]]:
    """The configuration file of the arguments, and its values."""
    finder = cli.Parser(prog=PROG, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    finder.add_argument("--data")
    known = finder.parse_known_args(args)[0]
    if known.config is None:
        return None, {}
    values = read_file(known.config)
    if misplaced := sorted({"config", "resume"} & set(values)):
        raise ConfigError(f"{known.config}: {', '.join(misplaced)}: only on the command line")
    if known.data is not None:
        values.pop("data", None)  # a replaced path need not exist
    return known.config, values


def _with_file(default: TrainConfig, values: Mapping[str, Any], file: Path | None) -> TrainConfig:
    try:
        return overlay(default, values)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
