"""The program `fused-margin`: runs the module of `fused_margin.commands` with the name of the subcommand."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    "info": "show the version and the kernels of this build",
    "train": "train and verify a network; the defaults take minutes on two CPU cores",
    "evaluate": "evaluate a trained network, or features from a file, under a named protocol",
    "export": "write a trained network as PyTorch weights and as ONNX",
    "compare": "train several losses with the same settings and write a table of their results",
    "consolidate": "merge a checkpoint written by several ranks into one file",
    "figure": "draw the 2-d embeddings that losses learn for a few digits",
    "align": "align faces to a template by their five landmarks",
}  # Name and help. The `main` of the module takes the arguments and returns the exit code.

EXTRAS = {
    "lightning": ("lightning", "trainer"),
    "matplotlib": ("matplotlib", "trainer"),
    "PIL": ("Pillow", "trainer"),
    "fontTools": ("fonttools", "trainer"),
    "jinja2": ("Jinja2", "trainer"),
    "pydantic": ("pydantic", "trainer"),
    "pytorch_metric_learning": ("pytorch-metric-learning", "trainer"),
    "rich": ("rich", "trainer"),
    "scipy": ("scipy", "trainer"),
    "sklearn": ("scikit-learn", "trainer"),
    "tensorboard": ("tensorboard", "trainer"),
    "tyro": ("tyro", "trainer"),
    "yaml": ("PyYAML", "trainer"),
    "onnx": ("onnx", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "onnxscript": ("onnxscript", "export"),
}  # Package of a module, and the extra that installs it.


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="fused-margin", description="Fused margin losses for face recognition.")
    parser.add_argument("--version", action="version", version=f"fused-margin {version('fused_margin')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, help_text in COMMANDS.items():
        subparsers.add_parser(name, help=help_text, add_help=False)  # the command prints its own help

    known, rest = parser.parse_known_args(argv)
    if known.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 0
    try:
        command = importlib.import_module(f"fused_margin.commands.{known.command}")
    except ModuleNotFoundError as error:
        return _report_missing_module(known.command, error)
    return command.main(rest)


def _report_missing_module(command: str, error: ModuleNotFoundError) -> int:
    """Prints which package and extra `command` needs. Raises the error again if another module is missing."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    package, extra = EXTRAS[module]
    print(f'fused-margin {command} needs {package}: pip install "fused_margin[{extra}]"', file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
