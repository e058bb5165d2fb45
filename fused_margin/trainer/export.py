"""The command `fused-margin export`: a trained network as PyTorch weights and as ONNX, both checked."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from .checkpoint import FILE_NAME, WEIGHTS_NAME, CheckpointError, criterion_state, load_run
from .cli import failed, find_latest_run
from .config import TrainConfig
from .consoles import command_consoles
from .losses import stored_class_weight
from .models import BackboneError, build_backbone, describe_backbone, require_named, restore_backbone

PROG = "fused-margin export"
ONNX_NAME, CLASSES_NAME, IDENTITIES_NAME = "backbone.onnx", "class_weight.npy", "identities.json"
INPUT = "images (batch, channels, height, width): pixels as (value - 127.5) / 127.5, that is -1 to 1, RGB or gray"
OUTPUT = "embeddings (batch, size): not normalised; compare them by their cosine"
# Relative to the largest feature. Kernels of another library add in another order; 20 layers of float32 differ by 1e-6.
TOLERANCE = 1e-4
BATCHES = (1, 3)  # sizes that are compared, other than the exporter's example: the batch must be free


class ExportError(Exception):
    """What was written does not compute what was trained."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained network as PyTorch weights (backbone.pt) and as ONNX (backbone.onnx), and check both.

    The input of both is pixels from -1 to 1, (value - 127.5) / 127.5, as (batch, channels, height, width), with a batch
    of any size. The output is embeddings (batch, size), not normalised. If the run keeps a moving average of the
    weights, the average is exported.

    The class weights are written as class_weight.npy (classes, size), and the identity of each row as identities.json,
    a list of names.
    """

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """Folder of the run, or its checkpoint. If not given, the latest run in runs/."""
    output: Path | None = None
    """Folder for the files. If not given, the folder of the checkpoint."""
    backbone: str | None = None
    """The --backbone that the checkpoint was trained with, named again, if it has one.
    It is imported and called."""


def main(args: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    console, errors = command_consoles()
    config = tyro.cli(ExportConfig, prog=PROG, args=args)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that it would support too
    try:
        run = config.run or find_latest_run("export", "its path")
        export(run / FILE_NAME if run.is_dir() else run, config.output, console, config.backbone)
    except (BackboneError, CheckpointError, ExportError, OSError) as error:
        return failed(errors, error)
    return 0


def export(checkpoint: Path, output: Path | None, console: Console, own_backbone: str | None = None) -> float:
    """Write and check both files; returns the largest difference of an ONNX feature, relative to the largest one.

    Raises:
        BackboneError: the network cannot be built.
        CheckpointError: the checkpoint cannot be read, or its network is another one's than `own_backbone`.
        ExportError: the network cannot be written as ONNX, or a file does not give the same features.
    """
    output = output or checkpoint.parent
    state = load_run(checkpoint, "export")
    try:
        config = TrainConfig.from_dict(state["config"], reads_data=False)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"cannot export {checkpoint}: {error}") from error
    require_named(config, own_backbone, checkpoint)
    backbone = restore_backbone(config, state, checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    shape = (config.model.channels, *config.model.image_size)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(size, *shape, generator=generator) * 2 - 1 for size in BATCHES]

    torch.save(backbone.state_dict(), output / WEIGHTS_NAME)
    _check_weights(output / WEIGHTS_NAME, backbone, config, batches)
    name = f"{describe_backbone(config)} trained by fused_margin"
    with console.status("writing ONNX"):
        _write_onnx(output / ONNX_NAME, backbone, torch.zeros(2, *shape), name)
        error = _check_onnx(output / ONNX_NAME, backbone, batches)
    classes = _write_classes(output, config, state)
    height, width = config.model.image_size
    console.print(
        f"{describe_backbone(config)}: pixels from -1 to 1, (batch, {config.model.channels}, {height}, {width}), to "
        f"embeddings (batch, {_features(backbone, batches[0]).shape[1]})\n"
        f"{output / WEIGHTS_NAME}: gives the same features\n"
        f"{output / ONNX_NAME}: features differ by {error:.1e} of the largest at most (allowed: {TOLERANCE:g})\n"
        f"{classes}",
        highlight=False,
        soft_wrap=True,
    )
    return error


def _write_classes(output: Path, config: TrainConfig, state: dict[str, Any]) -> str:
    """Write the class weights and the name of each row's identity; returns what to say of them."""
    weight = stored_class_weight(config.loss, criterion_state(state)).float().numpy()
    np.save(output / CLASSES_NAME, weight)
    said = f"{output / CLASSES_NAME}: class weights {weight.shape}"
    if "identities" not in state:
        (output / IDENTITIES_NAME).unlink(missing_ok=True)  # of another export: the rows are other ones
        return f"{said}; the checkpoint is of an older version, without the names of the identities"
    # ASCII, because names of files may be in any encoding.
    (output / IDENTITIES_NAME).write_text(json.dumps(state["identities"], indent=0) + "\n", encoding="ascii")
    return f"{said}\n{output / IDENTITIES_NAME}: the identity of each of their rows"


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    return backbone(images)


def _check_weights(path: Path, backbone: nn.Module, config: TrainConfig, batches: list[Tensor]) -> None:
    fresh = build_backbone(config).eval()
    fresh.load_state_dict(torch.load(path, weights_only=True))
    if not all(torch.equal(_features(fresh, images), _features(backbone, images)) for images in batches):
        raise ExportError(f"{path} loaded into a new network gives other features: the network has state elsewhere")


def _write_onnx(path: Path, backbone: nn.Module, example: Tensor, name: str) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                backbone,
                (example,),
                input_names=["images"],
                output_names=["embeddings"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ExportError(f"the network cannot be written as ONNX: {reason[0]}") from error
    program.model.doc_string = name
    program.model.metadata_props.update({"input": INPUT, "output": OUTPUT})
    program.save(path, external_data=False)


def _check_onnx(path: Path, backbone: nn.Module, batches: list[Tensor]) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in batches:
        (found,) = session.run(["embeddings"], {"images": images.numpy()})
        expected = _features(backbone, images).numpy()
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    if not worst <= TOLERANCE:  # NaN is none
        raise ExportError(f"{path}: features differ by {worst:.1e} of the largest, more than {TOLERANCE:g}")
    return worst
