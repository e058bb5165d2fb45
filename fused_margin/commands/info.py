"""The command `fused-margin info`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from fused_margin import cli
from fused_margin.info import build_info


def make_parser() -> argparse.ArgumentParser:
    return cli.Parser(
        prog="fused-margin info",
        description="Show the version, the CPU instructions and the CUDA build in use, and the kernels of each device.",
        epilog="example: fused-margin info",
    )


def main(args: Sequence[str]) -> int:
    """Print `build_info`; returns the exit code."""
    make_parser().parse_args(args)
    _print_nested(build_info())
    return 0


def _print_nested(values: Mapping[str, object], indent: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            print(f"{indent}{name}:")
            _print_nested(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{name}: {shown}")
