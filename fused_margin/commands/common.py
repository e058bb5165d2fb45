"""Options, consoles, exit codes and signals of the commands."""

from __future__ import annotations

import argparse
import inspect
import io
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro
from rich.console import Console

from fused_margin.trainer.train.checkpoint import CheckpointError, latest_run

RUNS = Path("runs")
FAILED, INVALID, INTERRUPTED = 1, 2, 130  # tyro also exits with 2 for invalid options
Config = TypeVar("Config")


def parse_options(
    config_class: type[Config], args: Sequence[str], *, prog: str, example: str, default: Config | None = None
) -> Config:
    """Options from the command line. Prints the help, or what is wrong with the options, and exits.

    Args:
        default: the defaults, if they are not those of the class.
        example: a command, which the help shows.
    """

    # If the class were given to tyro itself, its name would be part of the error message for a refused value.
    def options(options: Any) -> Any:
        return options

    options.__annotations__ = {"options": Annotated[config_class, tyro.conf.arg(name="")]}
    if default is not None:
        options.__defaults__ = (default,)
    description = f"{inspect.getdoc(config_class)}\n\nExample: {example}"
    try:
        return tyro.cli(options, prog=prog, description=description, args=args)
    except ValueError as error:
        print(f"error: {error}\n{prog} --help describes the options", file=sys.stderr)
        sys.exit(INVALID)


def completion_parser(config_class: type, prog: str) -> argparse.ArgumentParser:
    """A parser with the same options, from which shtab writes the completions of a shell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro's own completions contain lines of the help
        return cast(argparse.ArgumentParser, tyro.extras.get_parser(config_class, prog=prog))  # a copy of argparse's


def command_consoles(*, quiet: bool = False) -> tuple[Console, Console]:
    """Consoles for stdout, which `quiet` disables, and stderr."""
    # File names may have any encoding, and must not raise an error when printed.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    # File names may look like markup or emoji codes.
    return Console(quiet=quiet, markup=False, emoji=False), Console(stderr=True, markup=False, emoji=False)


def failed(errors: Console, error: Exception, code: int = FAILED) -> int:
    """Print an error; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # not a fault of the command: the program ends quietly
        raise error
    if isinstance(error, OSError) and error.filename is not None:
        error = OSError(f"{error.filename}: {error.strerror}")  # without the number
    errors.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
    return code


def find_latest_run(purpose: str, option: str) -> Path:
    """The folder of the latest run; `purpose` and `option` are for the error message.

    Raises:
        CheckpointError: there is no run.
    """
    latest = latest_run(RUNS)
    if latest is None:
        raise CheckpointError(
            f"no run to {purpose} in {RUNS}/; name its folder with {option}, or start one with fused-margin train"
        )
    return latest


@contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGTERM, as on Ctrl-C, instead of ending the process immediately."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
