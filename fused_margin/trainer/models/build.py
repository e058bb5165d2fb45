"""Builds backbones from a configuration, or restores them from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..train.checkpoint import CheckpointError, backbone_state, load_into_backbone
from .config import BackboneError, ModelConfig
from .custom import make_backbone
from .groupface import GroupFaceNetwork
from .lenet import LeNet
from .resnet import ResNet


def build_backbone(config: TrainConfig) -> nn.Module:
    """A network from images (N, channels, H, W) to embeddings (N, D).

    With groups, its output in training mode is a `fused_margin.GroupFaceOutput`.

    Raises:
        BackboneError: the sizes do not suit the network, or a user's backbone cannot be made.
    """
    if config.backbone is not None:
        backbone = make_backbone(config.backbone, config.backbone_options)
        if not config.model.groups:
            return backbone
        return GroupFaceNetwork(backbone, embedding_size(backbone, config.model), config.model)
    network = LeNet if config.network == "lenet" else ResNet
    return GroupFaceNetwork.of(network, config.model) if config.model.groups else network(config.model)


def require_named(config: TrainConfig, named: str | None, path: Path) -> None:
    """Check that the user has named the backbone in a checkpoint, because a file must not decide which code runs.

    Raises:
        CheckpointError: the configuration in `path` has another backbone than `named`.
    """
    if config.backbone is None and named is not None:
        raise CheckpointError(
            f"backbone: the network in {path} is not {named}, but {config.network}; leave out the option"
        )
    if config.backbone not in (None, named):
        raise CheckpointError(
            f"the network in {path} is {config.backbone}, which would be imported and called: "
            f"if you trust it, add --backbone {config.backbone}"
        )


def restore_backbone(config: TrainConfig, state: dict[str, Any], path: Path) -> nn.Module:
    """The trained network of a checkpoint's `state`, in evaluation mode; `path` is for error messages.

    Raises:
        BackboneError: the network cannot be built.
        CheckpointError: the weights do not fit the network.
    """
    backbone = build_backbone(config)
    load_into_backbone(backbone_state(state), backbone, path)
    return backbone.eval()


def describe_backbone(config: TrainConfig) -> str:
    """The network's name."""
    name = config.backbone or ("LeNet++" if config.network == "lenet" else f"ResNet{config.model.depth}")
    return f"{name} and GroupFace ({config.model.groups} groups)" if config.model.groups else name


def channels_last(backbone: nn.Module) -> nn.Module:
    """The backbone with weights in channels-last order, in which CPU and GPU convolutions are fastest."""
    return backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs omit it


@torch.no_grad()
def embedding_size(backbone: nn.Module, config: ModelConfig) -> int:
    """D of the embeddings (N, D), measured with two gray images.

    Raises:
        BackboneError: the network does not accept the images, or does not return embeddings.
    """
    images = torch.zeros(2, config.channels, *config.image_size)
    height, width = config.image_size
    given = f"images of {config.channels} x {height} x {width} (--model.channels, --model.image-size)"
    training = backbone.training
    try:
        embeddings = backbone.eval()(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(f"backbone: it does not accept {given}: {error}") from error
    finally:
        backbone.train(training)
    is_tensor = isinstance(embeddings, Tensor)
    if not is_tensor or embeddings.ndim != 2 or len(embeddings) != 2 or embeddings.shape[1] < 2:
        got = tuple(embeddings.shape) if is_tensor else type(embeddings).__name__
        raise BackboneError(f"backbone: expected embeddings (2, D), D at least 2, for two {given}, got {got}")
    if not embeddings.is_floating_point():
        raise BackboneError(f"backbone: expected floating-point embeddings, got {embeddings.dtype}")
    return embeddings.shape[1]
