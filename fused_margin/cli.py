"""The command `fused-margin`: hands each subcommand to its module, imported only when asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

EXTRAS = {
    "lightning": "lightning",
    "matplotlib": "matplotlib",
    "PIL": "Pillow",
    "fontTools": "fonttools",
    "rich": "rich",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tyro": "tyro",
}  # module: package of the trainer's extra


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    parser = argparse.ArgumentParser(prog="fused-margin", description="Fused margin losses for face recognition.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    info = commands.add_parser("info", help="show the version and what this build can do")
    info.set_defaults(run=_info)
    train = commands.add_parser(
        "train",
        help="train and verify a ResNet20; without options, in minutes on two CPU cores",
        add_help=False,  # the trainer's own parser answers --help
    )
    train.set_defaults(run=_train)
    evaluate = commands.add_parser(
        "evaluate",
        help="evaluate a trained network, or features from a file, under a named protocol",
        add_help=False,
    )
    evaluate.set_defaults(run=_evaluate)
    align = commands.add_parser("align", help="bring faces onto a template by their five landmarks", add_help=False)
    align.set_defaults(run=_align)

    known, rest = parser.parse_known_args(argv)
    if not hasattr(known, "run"):
        parser.print_help()
        return 2 if rest else 0
    if known.run is _info and rest:
        info.error(f"unrecognized arguments: {' '.join(rest)}")
    return known.run(rest)


def _info(_rest: list[str]) -> int:
    import fused_margin

    _print_nested(fused_margin.build_info())
    return 0


def _print_nested(values: dict, indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print_nested(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name}: {shown}")


def _train(rest: list[str]) -> int:
    try:
        from fused_margin.trainer.cli import main as train
    except ModuleNotFoundError as error:
        return _missing("train", error)
    return train(rest)


def _evaluate(rest: list[str]) -> int:
    try:
        from fused_margin.trainer.cli import evaluate_main as evaluate
    except ModuleNotFoundError as error:
        return _missing("evaluate", error)
    return evaluate(rest)


def _align(rest: list[str]) -> int:
    try:
        from fused_margin.trainer.align import main as align
    except ModuleNotFoundError as error:
        return _missing("align", error)
    return align(rest)


def _missing(command: str, error: ModuleNotFoundError) -> int:
    """Say which package of the trainer's extra `command` lacks; any other missing module is raised."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        raise error
    print(f'fused-margin {command} needs {EXTRAS[module]}: pip install "fused_margin[trainer]"', file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
