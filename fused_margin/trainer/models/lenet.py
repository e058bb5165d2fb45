"""LeNet++ of the center-loss paper (Wen et al., ECCV 2016, table 1), for 2-d embeddings."""

from __future__ import annotations

from torch import Tensor, nn

from .config import ModelConfig

WIDTHS = (32, 64, 128)


class LeNet(nn.Module):
    """LeNet++ of the center-loss paper, from images (N, channels, H, W) to embeddings (N, embedding_size).

    See Wen et al., ECCV 2016, table 1. Three stages of two 5x5 convolutions with PReLU and 2x2 max pooling, then one
    fully connected layer.

    Args:
        config: input and width.

    Raises:
        BackboneError: ``config.widths`` does not have three numbers.

    Examples:
        >>> import torch
        >>> from fused_margin.trainer.models import LeNet, ModelConfig
        >>> backbone = LeNet(ModelConfig(image_size=(28, 28), width=0.1, embedding_size=2))
        >>> backbone(torch.zeros(1, 1, 28, 28)).shape
        torch.Size([1, 2])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        height, width = config.image_size
        channels = config.channels
        layers: list[nn.Module] = []
        for stage_width in config.stage_widths(WIDTHS):
            for inputs in (channels, stage_width):
                layers += [nn.Conv2d(inputs, stage_width, 5, padding=2), nn.PReLU(stage_width)]
            layers += [nn.MaxPool2d(2)]
            channels, height, width = stage_width, height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.embedding = nn.Linear(channels * height * width, config.embedding_size)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (N, embedding_size) of images (N, channels, H, W), whose pixels are (value - 127.5) / 127.5."""
        return self.embedding(self.features(images).flatten(1))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        nn.init.kaiming_normal_(module.weight, a=0.25)  # the initial slope of a PReLU
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
