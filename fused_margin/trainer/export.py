"""Exports a trained network as PyTorch weights and as ONNX, and checks both."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import onnxscript  # noqa: F401 - torch's exporter needs it
import torch
from rich.console import Console
from torch import Tensor, nn

from .config import TrainConfig
from .models.build import build_backbone, describe_backbone, require_named, restore_backbone
from .train.checkpoint import WEIGHTS_NAME, CheckpointError, criterion_state, load_run
from .train.criterion import stored_class_weight

ONNX_NAME, CLASSES_NAME, IDENTITIES_NAME = "backbone.onnx", "class_weight.npy", "identities.json"
INPUT = "images (batch, channels, height, width): pixels as (value - 127.5) / 127.5, that is -1 to 1, RGB or gray"
OUTPUT = "embeddings (batch, size): not normalized; compare them by their cosine"
# Relative to the largest feature. Another order of summation changes float32 features of 20 layers by 1e-6.
TOLERANCE = 1e-4
BATCHES = (1, 3)  # batch sizes to compare; the exporter's example has 2, so the batch size must be dynamic


class ExportError(Exception):
    """The network cannot be exported, or an exported file gives other features."""


def export(checkpoint: Path, output: Path | None, console: Console, own_backbone: str | None = None) -> float:
    """Write and check both files; return the largest error of ONNX features relative to the largest feature.

    Raises:
        BackboneError: the network cannot be built.
        CheckpointError: the checkpoint cannot be read, or has another backbone than `own_backbone`.
        ExportError: the network cannot be written as ONNX, or a file gives other features.
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
        onnx_error = _check_onnx(output / ONNX_NAME, backbone, batches)
    classes = _write_classes(output, config, state)
    height, width = config.model.image_size
    console.print(
        f"{describe_backbone(config)}: pixels from -1 to 1, (batch, {config.model.channels}, {height}, {width}), to "
        f"embeddings (batch, {_features(backbone, batches[0]).shape[1]})\n"
        f"{output / WEIGHTS_NAME}: gives the same features\n"
        f"{output / ONNX_NAME}: features differ by at most {onnx_error:.1e} of the largest (allowed: {TOLERANCE:g})\n"
        f"{classes}",
        highlight=False,
        soft_wrap=True,
    )
    return onnx_error


def _write_classes(output: Path, config: TrainConfig, state: dict[str, Any]) -> str:
    """Write the class weights, if there are any, and the identities of their rows; return a description."""
    weight = stored_class_weight(config.loss, criterion_state(state))
    if weight is None:
        for name in (CLASSES_NAME, IDENTITIES_NAME):
            (output / name).unlink(missing_ok=True)  # a file of another export is of another network
        return f"{config.loss.name} has no class weights"
    np.save(output / CLASSES_NAME, weight.float().numpy())
    description = f"{output / CLASSES_NAME}: class weights {tuple(weight.shape)}"
    if "identities" not in state:
        (output / IDENTITIES_NAME).unlink(missing_ok=True)  # a file of another export has other rows
        return f"{description}; the checkpoint of an older version has no names of the identities"
    # ASCII, because file names may have any encoding.
    (output / IDENTITIES_NAME).write_text(json.dumps(state["identities"], indent=0) + "\n", encoding="ascii")
    return f"{description}\n{output / IDENTITIES_NAME}: the identity of each row"


@torch.no_grad()
def _features(backbone: nn.Module, images: Tensor) -> Tensor:
    return backbone(images)


def _check_weights(path: Path, backbone: nn.Module, config: TrainConfig, batches: list[Tensor]) -> None:
    fresh = build_backbone(config).eval()
    fresh.load_state_dict(torch.load(path, weights_only=True))
    if not all(torch.equal(_features(fresh, images), _features(backbone, images)) for images in batches):
        raise ExportError(
            f"{path} loaded into a new network gives other features: the network has state outside its state_dict"
        )


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
    assert program is not None  # with dynamo=True
    program.model.doc_string = name
    program.model.metadata_props.update({"input": INPUT, "output": OUTPUT})
    program.save(path, external_data=False)


def _check_onnx(path: Path, backbone: nn.Module, batches: list[Tensor]) -> float:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for images in batches:
        (features,) = session.run(["embeddings"], {"images": images.numpy()})
        expected = _features(backbone, images).numpy()
        worst = max(worst, float(np.abs(features - expected).max() / np.abs(expected).max()))
    if not worst <= TOLERANCE:  # also if NaN
        raise ExportError(f"{path}: features differ by {worst:.1e} of the largest, more than {TOLERANCE:g}")
    return worst
