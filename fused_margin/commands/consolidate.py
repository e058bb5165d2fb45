"""The command `fused-margin consolidate`: merges a distributed checkpoint into one file."""

from __future__ import annotations

import argparse
import logging
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

from fused_margin import cli

# Raised by the unpickler and its callers for damaged files.
DAMAGED = (AssertionError, AttributeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError)
PROG = "fused-margin consolidate"


def make_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog=PROG,
        description="Merge a folder written by torch.distributed.checkpoint, such as the sharded_state_dict of a loss, "
        "into one file for torch.load. The whole checkpoint must fit into memory.",
        epilog="example: fused-margin consolidate checkpoint/step-1000 loss.pt",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("file", type=Path, help="file to write")
    return parser


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    given = make_parser().parse_args(args)
    if not (given.checkpoint / ".metadata").is_file():
        print(
            f"error: {given.checkpoint} is not a checkpoint of torch.distributed.checkpoint; expected a folder with a file "
            ".metadata, as torch.distributed.checkpoint.save writes it",
            file=sys.stderr,
        )
        return 1
    if given.file.is_dir() or not given.file.parent.is_dir():
        print(f"error: cannot write {given.file}: name a file in a folder that exists", file=sys.stderr)
        return 1
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    logging.disable(logging.CRITICAL)  # torch logs tracebacks of errors that it raises again
    temporary = given.file.with_name(f"{given.file.name}.{os.getpid()}.tmp")
    try:
        dcp_to_torch_save(given.checkpoint, temporary)
        os.replace(temporary, given.file)
    except (*DAMAGED, CheckpointException, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"error: cannot read the checkpoint {given.checkpoint} or write {given.file}: {reason}", file=sys.stderr)
        return 1
    finally:
        logging.disable(logging.NOTSET)
        temporary.unlink(missing_ok=True)
    print(f"wrote {given.file}")
    return 0
