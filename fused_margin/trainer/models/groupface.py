"""A network with the head of GroupFace, whose embeddings depend on latent groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

import fused_margin as fm

from .config import ModelConfig

SHARED_FACTOR = 8  # the paper has shared features of 4,096 dimensions for embeddings of 512


class GroupFaceNetwork(nn.Module):
    """A network whose output :class:`fused_margin.GroupFace` turns into embeddings.

    From images (N, channels, H, W) to embeddings (N, config.embedding_size) in evaluation mode, and to
    :class:`fused_margin.GroupFaceOutput` in training mode.

    Args:
        network: from images to the features that the groups share.
        in_features: length of these features.
        config: number of groups, aggregation and length of the embeddings.

    Examples:
        >>> import torch
        >>> from fused_margin.trainer.models import GroupFaceNetwork, ModelConfig, ResNet
        >>> config = ModelConfig(depth=4, width=0.1, embedding_size=16, groups=4)
        >>> network = GroupFaceNetwork.of(ResNet, config)
        >>> network(torch.zeros(2, 1, 24, 24)).group_logits.shape
        torch.Size([2, 4])
        >>> network.eval()(torch.zeros(2, 1, 24, 24)).shape
        torch.Size([2, 16])
    """

    def __init__(self, network: nn.Module, in_features: int, config: ModelConfig) -> None:
        super().__init__()
        self.network = network
        self.head = fm.GroupFace(
            in_features, config.embedding_size, config.groups, aggregation=config.group_aggregation
        )

    @classmethod
    def of(cls, make: Callable[[ModelConfig], nn.Module], config: ModelConfig) -> GroupFaceNetwork:
        """A :class:`ResNet` or :class:`LeNet` whose last layer gives the shared features, with PReLU after it."""
        features = config.group_features or SHARED_FACTOR * config.embedding_size
        network = make(dataclasses.replace(config, embedding_size=features))
        return cls(nn.Sequential(network, nn.PReLU(features)), features, config)

    def forward(self, images: Tensor) -> fm.GroupFaceOutput | Tensor:
        """Embeddings (N, embedding_size) of images (N, channels, H, W); in training mode with logits of the groups."""
        return self.head(self.network(images))
