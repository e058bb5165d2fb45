"""The networks, built from a configuration or restored from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checkpoint import CheckpointError, backbone_state, load_into_backbone
from .config import BackboneError, ModelConfig, Network
from .custom import make_backbone
from .lenet import LeNet
from .resnet import ResNet

if TYPE_CHECKING:
    from ..config import TrainConfig

__all__ = [
    "BackboneError",
    "LeNet",
    "ModelConfig",
    "Network",
    "ResNet",
    "build_backbone",
    "describe_backbone",
    "embedding_size",
    "require_named",
    "restore_backbone",
]


def build_backbone(config: TrainConfig) -> nn.Module:
    """The network that turns images (N, channels, H, W) into embeddings (N, D).

    Raises:
        BackboneError: the sizes are not this network's, or the user's own cannot be made.
    """
    if config.backbone is not None:
        return make_backbone(config.backbone, config.backbone_options)
    return (LeNet if config.network == "lenet" else ResNet)(config.model)


def require_named(config: TrainConfig, named: str | None, path: Path) -> None:
    """A checkpoint does not decide alone what is imported and called: a backbone of one's own is named by who reads it.

    Raises:
        CheckpointError: it is not the one that the configuration in `path` has.
    """
    if config.backbone not in (None, named):
        raise CheckpointError(
            f"the network in {path} is {config.backbone}, which reading it imports and calls: "
            f"if you trust that, name it with --backbone {config.backbone}"
        )


def restore_backbone(config: TrainConfig, state: dict[str, Any], path: Path) -> nn.Module:
    """The trained network in a checkpoint's state, which was read from `path`, in evaluation mode.

    Raises:
        BackboneError: the network cannot be built.
        CheckpointError: the weights do not fit it.
    """
    backbone = build_backbone(config)
    load_into_backbone(backbone_state(state), backbone, path)
    return backbone.eval()


def describe_backbone(config: TrainConfig) -> str:
    """The network's name."""
    return config.backbone or ("LeNet++" if config.network == "lenet" else f"ResNet{config.model.depth}")


@torch.no_grad()
def embedding_size(backbone: nn.Module, config: ModelConfig) -> int:
    """D of the embeddings (N, D), found with two black images.

    Raises:
        BackboneError: the network takes no such images, or gives something else.
    """
    images = torch.zeros(2, config.channels, *config.image_size)
    height, width = config.image_size
    given = f"images of {config.channels} x {height} x {width} (--model.channels, --model.image-size)"
    training = backbone.training
    try:
        embeddings = backbone.eval()(images)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BackboneError(f"backbone: it does not take {given}: {error}") from error
    finally:
        backbone.train(training)
    is_tensor = isinstance(embeddings, Tensor)
    if not is_tensor or embeddings.ndim != 2 or len(embeddings) != 2 or embeddings.shape[1] < 2:
        got = tuple(embeddings.shape) if is_tensor else type(embeddings).__name__
        raise BackboneError(f"backbone: expected embeddings (2, D), D at least 2, for two {given}, got {got}")
    if not embeddings.is_floating_point():
        raise BackboneError(f"backbone: expected floating-point embeddings, got {embeddings.dtype}")
    return embeddings.shape[1]
