"""The command `fused-margin consolidate`: merges a distributed checkpoint into one file."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

# Raised by the unpickler and its callers for damaged files.
DAMAGED = (AssertionError, AttributeError, EOFError, LookupError, TypeError, ValueError, pickle.UnpicklingError)
PROG = "fused-margin consolidate"


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Merge a folder written by torch.distributed.checkpoint, such as the sharded_state_dict of a loss, "
        "into one file for torch.load. The whole checkpoint must fit into memory.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("file", type=Path, help="file to write")
    given = parser.parse_args(args)
    if not (given.checkpoint / ".metadata").is_file():
        print(f"error: {given.checkpoint} is not a checkpoint of torch.distributed.checkpoint", file=sys.stderr)
        return 1
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    temporary = given.file.with_name(f"{given.file.name}.{os.getpid()}.tmp")
    try:
        dcp_to_torch_save(given.checkpoint, temporary)
        os.replace(temporary, given.file)
    except (*DAMAGED, CheckpointException, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        print(f"error: cannot read the checkpoint {given.checkpoint} or write {given.file}: {reason}", file=sys.stderr)
        return 1
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {given.file}")
    return 0
