"""The program `fused-margin`: runs the module of `fused_margin.commands` with the name of the subcommand."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import NamedTuple, NoReturn

EXAMPLES = """examples:
  fused-margin benchmark --num-classes 100000
  fused-margin train --data photographs --loss.name arcface
  fused-margin evaluate

fused-margin COMMAND --help has the options of a command, their defaults and an example.
"""


class Command(NamedTuple):
    """What a command does, and the extra of the package that it needs."""

    help: str
    extra: str | None = None


# In the order of use. The `main` of the module takes the arguments and returns the exit code; `make_parser` returns a
# parser with its options, for the completion of a shell.
COMMANDS = {
    "info": Command("show the version and the kernels of this build"),
    "benchmark": Command(
        "time a training step of a loss on this machine, beside PyTorch and other libraries", "benchmark"
    ),
    "align": Command("align faces to a template by five landmarks, from a file or a face detector", "trainer"),
    "train": Command("train and verify a network; the defaults take about a minute on two CPU cores", "trainer"),
    "evaluate": Command("evaluate a trained network, or features from a file, under a named protocol", "trainer"),
    "identify": Command("rank the known identities for images or features, or say that they are unknown", "trainer"),
    "compare": Command("train several losses with the same settings and write a table of their results", "trainer"),
    "figure": Command("draw the 2-d embeddings that losses learn for a few digits", "trainer"),
    "export": Command("write a trained network as PyTorch weights and as ONNX", "export"),
    "consolidate": Command("merge a checkpoint written by several ranks into one file"),
    "completion": Command("print a script that completes commands and options in a shell", "trainer"),
}

EXTRAS = {
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "PIL": "Pillow",
    "fontTools": "fonttools",
    "jinja2": "Jinja2",
    "pydantic": "pydantic",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "rich": "rich",
    "scipy": "scipy",
    "shtab": "shtab",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "tyro": "tyro",
    "yaml": "PyYAML",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "onnxscript": "onnxscript",
}  # Package of each module that only an extra installs.


class Parser(argparse.ArgumentParser):
    """Its errors name the next step."""

    def error(self, message: str) -> NoReturn:
        shown = "lists the commands" if self.prog == "fused-margin" else "describes the options"
        self.exit(2, f"error: {message}\n{self.prog} --help {shown}\n")


def make_parser(parsers: Mapping[str, argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """The parser of the program.

    Args:
        parsers: parsers of commands. A command without one parses its own options.
    """
    parser = Parser(
        prog="fused-margin",
        description="Margin-softmax losses: fused, exact and bounded in memory.",
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=16),
    )
    parser.add_argument("--version", action="version", version=f"fused-margin {version('fused_margin')}")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", parser_class=argparse.ArgumentParser
    )
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help, add_help=False)  # the command prints its own help
    subparsers.choices.update(parsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser({})
    if argv and argv[0] not in COMMANDS and argv[0] not in ("-h", "--help", "--version"):
        parser.error(_not_a_command(argv[0]))
    known, rest = parser.parse_known_args(argv)
    if known.command is None:
        parser.print_help()
        return 0
    try:
        command = importlib.import_module(f"fused_margin.commands.{known.command}")
    except ModuleNotFoundError as error:
        return _report_missing_module(known.command, error)
    return command.main(rest)


def _not_a_command(word: str) -> str:
    if word.startswith("-"):
        return f"expected a command before {word}, as in `fused-margin train {word}`"
    close = difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    return f"no command {word!r}" + (f"; did you mean {close[0]!r}?" if close else "")


def _report_missing_module(command: str, error: ModuleNotFoundError) -> int:
    """Prints which package and extra `command` needs. Raises the error again if another module is missing."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    extra = COMMANDS[command].extra
    print(f'fused-margin {command} needs {EXTRAS[module]}: pip install "fused_margin[{extra}]"', file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
