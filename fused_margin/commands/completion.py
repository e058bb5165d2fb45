"""The command `fused-margin completion`: prints a script for a shell, which completes without starting Python."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

import shtab

from fused_margin import cli

PROG = "fused-margin completion"
DESCRIPTION = """Print a script that completes commands, options and their values in a shell.

Write the script to a file once, and again after an upgrade:

  mkdir -p ~/.local/share/fused-margin
  fused-margin completion bash > ~/.local/share/fused-margin/completion.bash

Then add one line to the startup file of the shell:

  bash  ~/.bashrc   . ~/.local/share/fused-margin/completion.bash
  zsh   ~/.zshrc    eval "$(< ~/.local/share/fused-margin/completion.zsh)"   after compinit
  tcsh  ~/.tcshrc   source ~/.local/share/fused-margin/completion.tcsh
  fish  no line: fused-margin completion fish > ~/.config/fish/completions/fused-margin.fish
"""


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog=PROG, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="shell to write the script for")
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    given = make_parser().parse_args(args)
    parsers = {PROG.split()[-1]: make_parser()}
    for name in cli.COMMANDS.keys() - parsers.keys():
        try:
            command = importlib.import_module(f"{__package__}.{name}")
        except ModuleNotFoundError as error:
            if error.name not in cli.EXTRAS:
                raise
            print(f"without the options of {name}, which needs {cli.EXTRAS[error.name]}", file=sys.stderr)
        else:
            parsers[name] = command.make_parser()
            for action in parsers[name]._actions:
                if not action.option_strings or "PATH" in str(action.metavar):
                    action.complete = shtab.FILE  # type: ignore[attr-defined]
    for name, parser in parsers.items():
        parser.description = cli.COMMANDS[name].help  # shells show it beside the name
    print(shtab.complete(cli.make_parser(parsers), given.shell))
    return 0
