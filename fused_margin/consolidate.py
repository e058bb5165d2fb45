"""The command `fused-margin consolidate`: a checkpoint that ranks have written together, as one file."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

PROG = "fused-margin consolidate"


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROG,
        description="Write a folder that torch.distributed.checkpoint has made (a sharded_state_dict of a loss, or more) "
        "as one file for torch.load. All of it goes through this machine's memory.",
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("file", type=Path, help="file to write")
    given = parser.parse_args(args)
    if not (given.checkpoint / ".metadata").is_file():
        print(f"error: {given.checkpoint} is no checkpoint of torch.distributed.checkpoint", file=sys.stderr)
        return 1
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    temporary = given.file.with_name(f"{given.file.name}.{os.getpid()}.tmp")
    try:
        dcp_to_torch_save(given.checkpoint, temporary)
        os.replace(temporary, given.file)
    except (OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {given.file}")
    return 0
