"""The network has the published shape at any size."""

import pytest
import torch
from torch import nn

from fused_margin.trainer.data.base import on_gray, to_input
from fused_margin.trainer.model import ResNet20, ResNet20Config


def published_parameters() -> int:
    """Counted by hand from the paper's table: weights of the convolutions, PReLU slopes, the layer on top."""
    count, channels = 0, 3
    for width, units in zip((64, 128, 256, 512), (1, 2, 4, 1), strict=True):
        count += channels * width * 9 + width + width  # stride-2 convolution with bias, PReLU
        count += units * 2 * (width * width * 9 + width)  # two convolutions and PReLUs per unit
        channels = width
    return count + 512 * 7 * 6 * 512 + 512


def test_published_network():
    with torch.device("meta"):
        network = ResNet20(ResNet20Config.paper())
        embeddings = network(torch.empty(2, 3, 112, 96))
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert embeddings.shape == (2, 512)
    assert len(layers) == 20 + 1  # "20" counts the convolutions here: 4 + 2 * (1 + 2 + 4 + 1)
    assert network.embedding.in_features == 512 * 7 * 6
    assert sum(p.numel() for p in network.parameters()) == published_parameters()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("image_size", [(32, 32), (33, 17), (112, 96)])
def test_any_input_size(image_size):
    config = ResNet20Config(image_size=image_size, widths=(2, 3, 4, 5), embedding_size=7)
    assert ResNet20(config)(torch.randn(3, 1, *image_size)).shape == (3, 7)


def test_gray_background_starts_embeddings_apart(glyph_identities):
    """Without batch norm a black background makes all embeddings one direction before training."""
    torch.manual_seed(0)
    network = ResNet20(ResNet20Config(image_size=(16, 16)))
    glyphs = glyph_identities[0][::100, None]

    @torch.no_grad()
    def mean_cosine(images):
        return float(nn.functional.normalize(network(to_input(images))).mean(dim=0).square().sum())

    assert mean_cosine(on_gray(glyphs)) < mean_cosine(glyphs) - 0.1


@pytest.mark.parametrize(
    "wrong", [{"channels": 2}, {"image_size": (4, 32)}, {"widths": (0, 1, 1, 1)}, {"embedding_size": 1}]
)
def test_invalid_config(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ResNet20Config(**wrong)
