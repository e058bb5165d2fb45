"""What the commands print to: text stays as it is, since names of files may look like markup or emoji codes."""

from __future__ import annotations

import io
import sys

from rich.console import Console


def plain_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)


def command_consoles(*, quiet: bool = False) -> tuple[Console, Console]:
    """For what a command says, on stdout, which may be quiet, and for its errors, on stderr."""
    # Names of files may be in any encoding: where stdout takes its own only, they would end the command.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    return plain_console(quiet=quiet), plain_console(stderr=True)
