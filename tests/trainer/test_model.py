"""The networks have the published shapes at any size; user-defined backbones are loaded, or errors name the cause."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data.base import on_gray, to_input
from fused_margin.trainer.models import BackboneError, LeNet, ModelConfig, ResNet
from fused_margin.trainer.models.build import build_backbone, embedding_size


def convolutions(network: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d) for m in network.modules())


def published_resnet20_parameters() -> int:
    """The count from the paper's table: weights of convolutions, PReLU slopes, the last layer."""
    count, channels = 0, 3
    for width, units in zip((64, 128, 256, 512), (1, 2, 4, 1), strict=True):
        count += channels * width * 9 + width + width  # stride-2 convolution with bias, PReLU
        count += units * 2 * (width * width * 9 + width)  # two convolutions and PReLUs per unit
        channels = width
    return count + 512 * 7 * 6 * 512 + 512


def test_published_resnet20():
    with torch.device("meta"):
        network = ResNet(ModelConfig.of("paper"))
        embeddings = network(torch.empty(2, 3, 112, 96))
    assert embeddings.shape == (2, 512)
    assert convolutions(network) == 20  # "20" is the number of convolutions here: 4 + 2 * (1 + 2 + 4 + 1)
    assert network.embedding.in_features == 512 * 7 * 6
    assert sum(p.numel() for p in network.parameters()) == published_resnet20_parameters()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules())


@pytest.mark.parametrize("depth", [4, 10, 20, 36, 64])
def test_depth_is_the_number_of_convolutions(depth):
    with torch.device("meta"):
        assert convolutions(ResNet(ModelConfig(depth=depth, width=0.1))) == depth


def test_published_lenet():
    """LeNet++'s table: (5, 32) x 2, (5, 64) x 2, (5, 128) x 2, each pooled, then a layer from 128 * 3 * 3 to 2."""
    network = LeNet(ModelConfig.of("lenet"))
    assert network(torch.zeros(5, 1, 28, 28)).shape == (5, 2)
    channels = (1, 32, 32, 64, 64, 128, 128)
    kernels = sum(25 * a * b + b for a, b in itertools.pairwise(channels))
    slopes = sum(channels[1:])
    assert sum(p.numel() for p in network.parameters()) == kernels + slopes + 128 * 3 * 3 * 2 + 2
    color = LeNet(ModelConfig(channels=3, image_size=(17, 40), width=0.25, embedding_size=5))
    assert color(torch.zeros(2, 3, 17, 40)).shape == (2, 5)
    assert color.features[0].out_channels == 8


@pytest.mark.parametrize("image_size", [(32, 32), (33, 17), (112, 96)])
def test_any_input_size(image_size):
    config = ModelConfig(image_size=image_size, widths=(2, 3, 4, 5), embedding_size=7)
    assert ResNet(config)(torch.randn(3, 1, *image_size)).shape == (3, 7)


def test_width_and_widths():
    published = (64, 128, 256, 512)
    assert ModelConfig(width=0.25).stage_widths(published) == (16, 32, 64, 128)  # the small network
    assert ModelConfig(width=1e-3).stage_widths(published) == (1, 1, 1, 1)
    assert ModelConfig(width=0.5, widths=(1, 2, 3, 4)).stage_widths(published) == (1, 2, 3, 4)
    with pytest.raises(BackboneError, match="model.widths must be 3 numbers"):
        LeNet(ModelConfig(widths=(1, 2, 3, 4)))


def test_gray_background_separates_initial_embeddings(glyph_identities):
    """Without batch norm and with a black background, all initial embeddings have nearly the same direction."""
    torch.manual_seed(0)
    network = ResNet(ModelConfig(image_size=(16, 16)))
    glyphs = glyph_identities[0][::100, None]

    @torch.no_grad()
    def mean_cosine(images):
        return float(nn.functional.normalize(network(to_input(images))).mean(dim=0).square().sum())

    assert mean_cosine(on_gray(glyphs)) < mean_cosine(glyphs) - 0.1


@pytest.mark.parametrize(
    "wrong",
    [{"channels": 2}, {"image_size": (4, 32)}, {"widths": (0, 1, 1, 1)}, {"embedding_size": 1}, {"width": 0.0}],
)
def test_invalid_config(wrong):
    with pytest.raises(ValueError, match=f"model.{next(iter(wrong))}"):
        ModelConfig(**wrong)


def with_backbone(name, **options):
    model = ModelConfig(image_size=(8, 8))
    return dataclasses.replace(TrainConfig(), backbone=name, backbone_options=options, model=model)


def test_user_backbone():
    config = with_backbone("user_networks.BatchNormNet", size=6)
    backbone = build_backbone(config)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert embedding_size(backbone, config.model) == 6
    assert backbone.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nowhere.Net", {}, "no module 'nowhere'"),
        ("torch.nowhere.Net", {}, "no module 'torch.nowhere'"),
        ("Net", {}, "expected package.module.factory, got 'Net'"),
        ("user_networks.Net", {}, "user_networks has no 'Net'"),
        ("user_networks.not_callable", {}, "to be a class or function, got int"),
        ("user_networks.BatchNormNet", {"sise": 3}, r"BatchNormNet\(sise=3\) failed: .*unexpected keyword"),
        ("user_networks.pair", {"images": 1}, "expected user_networks.pair to return an nn.Module, got tuple"),
        ("user_networks.Pair", {}, "expected embeddings .* got tuple"),
        ("user_networks.integer_features", {}, "floating-point embeddings, got torch.int64"),
        ("torch.nn.Identity", {}, r"expected embeddings \(2, D\).* got \(2, 1, 8, 8\)"),
        (
            "torch.nn.Conv2d",
            {"in_channels": 3, "out_channels": 1, "kernel_size": 1},
            "does not accept images of 1 x 8 x 8",
        ),
    ],
)
def test_user_backbone_errors(name, options, message):
    config = with_backbone(name, **options)
    with pytest.raises(BackboneError, match=message):
        embedding_size(build_backbone(config), config.model)


def test_missing_import_of_a_user_module_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "imports_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        build_backbone(with_backbone("imports_more.Net"))
