"""The command `fused-margin export`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fused_margin.trainer.defaults import none_means
from fused_margin.trainer.export import ExportError, export
from fused_margin.trainer.models import BackboneError
from fused_margin.trainer.train.checkpoint import FILE_NAME, CheckpointError

from .common import INTERRUPTED, command_consoles, completion_parser, failed, find_latest_run, parse_options

PROG = "fused-margin export"
EXAMPLE = "fused-margin export runs/photographs --output exported"


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained network as PyTorch weights (backbone.pt) and as ONNX (backbone.onnx), and check both.

    Both take pixels from -1 to 1, (value - 127.5) / 127.5, as (batch, channels, height, width), and return embeddings
    (batch, size), not normalized. The batch size is dynamic. If the run has a moving average of the weights, the
    average is exported.

    Also writes the class weights, class_weight.npy (classes, size), and the identity of each of their rows,
    identities.json, if the loss has class weights.
    """

    run: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]"), none_means("the latest run in runs/")
    ] = None
    """Folder of the run, or its checkpoint."""
    output: Annotated[Path | None, none_means("the folder of the checkpoint")] = None
    """Folder for the files."""
    backbone: Annotated[str | None, none_means("the --network of the training")] = None
    """The --backbone of the training, if it had one.
    Giving the same name confirms that its code may be imported and called."""


def make_parser() -> argparse.ArgumentParser:
    return completion_parser(ExportConfig, PROG)


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = parse_options(ExportConfig, args, prog=PROG, example=EXAMPLE)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its warnings are about optional packages
    try:
        run = config.run or find_latest_run("export", f"{PROG} FOLDER")
        export(run / FILE_NAME if run.is_dir() else run, config.output, console, config.backbone)
    except KeyboardInterrupt:
        console.print("interrupted")
        return INTERRUPTED
    except (BackboneError, CheckpointError, ExportError, OSError) as error:
        return failed(errors, error)
    return 0
