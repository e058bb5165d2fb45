"""Input and size of the networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from ..defaults import none_means

Network = Literal["small", "paper", "lenet"]
Depth = Literal[4, 10, 20, 36, 64]
Aggregation = Literal["soft", "hard"]


class BackboneError(ValueError):
    """A backbone cannot be made, or does not map images to embeddings.

    Examples:
        >>> from fused_margin.trainer.models import BackboneError, ModelConfig, ResNet
        >>> try:
        ...     ResNet(ModelConfig(widths=(8, 16)))
        ... except BackboneError as error:
        ...     print(error)
        model.widths must be 4 numbers for this network, got (8, 16)
    """


@dataclass(frozen=True)
class ModelConfig:
    """Input and size of the network. Its stages and activations follow the papers.

    Raises:
        ValueError: for a value out of range.

    Examples:
        >>> from fused_margin.trainer.models import ModelConfig
        >>> ModelConfig.of("paper").image_size
        (112, 96)
    """

    channels: int = 1
    """Image channels: 1 (grayscale) or 3 (RGB)."""
    image_size: tuple[int, int] = (24, 24)
    """Height and width of the input in pixels. Images are rendered at or resized to this size."""
    depth: Depth = 20
    """Number of convolutions of the ResNet, as in SphereFace's paper. RegularFace's has 20."""
    width: float = 0.25
    """Factor on the published channels of the stages:
    64, 128, 256, 512 in the ResNet; 32, 64, 128 in LeNet++."""
    widths: Annotated[tuple[int, ...] | None, none_means("the published channels times --model.width")] = None
    """Channels of each stage. Overrides --model.width."""
    embedding_size: int = 128
    """Dimensions of the embedding. A --backbone ignores this and has its own, unless there are --model.groups."""
    groups: int = 0
    """Number of latent groups of GroupFace, whose head then turns the network's features into embeddings. Paper: 32.
    0: no groups."""
    group_aggregation: Aggregation = "soft"
    """How the representations of the groups are combined.
    soft: their mean, weighted by the probabilities of the groups.
    hard: that of the most probable group."""
    group_features: Annotated[int | None, none_means("8 times --model.embedding-size, as in the paper")] = None
    """Dimensions of the network's features, which the groups share. A --backbone has its own."""
    group_weight: float = 0.1
    """Weight of GroupFace's self-grouping loss. Paper: 0.1."""
    group_batches: int = 16
    """Number of recent batches over which the groups are balanced.
    Many batches lag behind the network where it changes fast, and all images may then get one group."""

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"model.channels must be 1 or 3, got {self.channels}")
        if min(self.image_size) < 8:
            raise ValueError(f"model.image_size must be at least 8 x 8, got {self.image_size}")
        if not 0 < self.width < math.inf:
            raise ValueError(f"model.width must be positive and finite, got {self.width}")
        if self.widths is not None and min(self.widths, default=0) < 1:
            raise ValueError(f"model.widths must be positive, got {self.widths}")
        if self.embedding_size < 2:
            raise ValueError(f"model.embedding_size must be at least 2, got {self.embedding_size}")
        if self.groups < 0 or self.groups == 1:
            raise ValueError(f"model.groups must be 0 or at least 2, got {self.groups}")
        if self.group_features is not None and self.group_features < 1:
            raise ValueError(f"model.group_features must be at least 1, got {self.group_features}")
        if self.group_batches < 1:
            raise ValueError(f"model.group_batches must be at least 1, got {self.group_batches}")
        if not 0 <= self.group_weight < math.inf:
            raise ValueError(f"model.group_weight must be finite and not negative, got {self.group_weight}")

    @classmethod
    def of(cls, network: Network) -> ModelConfig:
        """Default settings of a network."""
        if network == "paper":
            return cls(channels=3, image_size=(112, 96), width=1.0, embedding_size=512)
        if network == "lenet":
            return cls(image_size=(28, 28), width=1.0, embedding_size=2)
        return cls()

    def stage_widths(self, published: tuple[int, ...]) -> tuple[int, ...]:
        """Channels of each stage, from the `published` ones.

        Raises:
            BackboneError: `widths` has another number of stages.
        """
        if self.widths is None:
            return tuple(max(1, round(self.width * channels)) for channels in published)
        if len(self.widths) != len(published):
            raise BackboneError(f"model.widths must be {len(published)} numbers for this network, got {self.widths}")
        return self.widths
