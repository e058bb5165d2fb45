"""The command `fused-margin benchmark`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fused_margin.benchmark.run import BenchmarkConfig, DoesNotFitError, run_benchmark

from .common import INTERRUPTED, command_consoles, completion_parser, failed, parse_options, termination_as_interrupt

PROG = "fused-margin benchmark"
EXAMPLE = "fused-margin benchmark --batch-size 256 --num-classes 100000 --output result.json"


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(BenchmarkConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = parse_options(BenchmarkConfig, args, prog=PROG, example=EXAMPLE)
    try:
        with termination_as_interrupt():
            run_benchmark(config, console, args)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (DoesNotFitError, OSError) as error:
        return failed(errors, error)
    return 0
