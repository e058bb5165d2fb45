"""Augmentation: its random numbers, and each distortion against Pillow or a known result."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from fused_margin.trainer.config import TrainConfig
from fused_margin.trainer.data.augment import augment
from fused_margin.trainer.data.base import from_input, seeded_generator, to_input, to_picture
from fused_margin.trainer.data.config import AugmentationConfig
from fused_margin.trainer.data.distortions import (
    adjust_color,
    affine,
    compress_jpeg,
    gaussian_blur,
    occlude,
    reduce_resolution,
)

NOTHING = dict.fromkeys(("rotation", "scale", "shear", "shift", "blur", "noise"), 0)
NEW = {"occlusion": 0.4, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "resolution": 0.7, "jpeg": 30}


def test_augmentation_depends_on_the_generator():
    images = 2 * torch.rand(6, 3, 16, 12) - 1
    everything = AugmentationConfig(mirror=True, **NEW)
    first = augment(images, everything, seeded_generator(0, 1))
    assert first.shape == images.shape and torch.isfinite(first).all()
    assert torch.equal(first, augment(images, everything, seeded_generator(0, 1)))
    assert not torch.equal(first, augment(images, everything, seeded_generator(0, 2)))
    same = images[:1].expand(6, -1, -1, -1)
    assert len(torch.unique(augment(same, everything, seeded_generator(0)), dim=0)) == 6
    assert augment(images, AugmentationConfig(**NOTHING), seeded_generator(0)) is images


def test_each_augmentation():
    images = torch.rand(200, 1, 12, 12)
    mirrored = augment(images, AugmentationConfig(**NOTHING, mirror=True), seeded_generator(0))
    flipped = (mirrored == images.flip(-1)).flatten(1).all(1)
    assert ((mirrored == images).flatten(1).all(1) ^ flipped).all() and 60 < flipped.sum() < 140

    point = torch.zeros(400, 1, 33, 33)
    point[:, :, 16, 16] = 1
    moved = augment(point, AugmentationConfig(**{**NOTHING, "shift": 0.2}), seeded_generator(0)).flatten(2)
    offsets = torch.cartesian_prod(torch.arange(33.0), torch.arange(33.0)) - 16
    center = (moved @ offsets).squeeze(1) / moved.sum(2)
    assert 5 < center.abs().max() < 0.2 * 33 + 1 and center.mean(0).abs().max() < 0.6

    rotated = augment(images, AugmentationConfig(**{**NOTHING, "rotation": 45}), seeded_generator(0))
    assert (rotated[..., 5:7, 5:7].mean() - images.mean()).abs() < 0.05 and not torch.equal(rotated, images)
    noisy = augment(torch.zeros(100, 1, 12, 12), AugmentationConfig(**{**NOTHING, "noise": 0.5}), seeded_generator(0))
    assert 0.2 < noisy.std(dim=(1, 2, 3)).mean() < 0.3  # uniform up to 0.5


def test_blur_keeps_the_sum_and_has_the_given_width():
    point = torch.zeros(3, 2, 21, 21)
    point[:, :, 10, 10] = 1
    blurred = gaussian_blur(point, torch.tensor([0.0, 1.0, 2.0]), 2.0)
    torch.testing.assert_close(blurred.sum(dim=(2, 3)), torch.ones(3, 2))
    torch.testing.assert_close(blurred[0], point[0])
    rows = (torch.arange(21.0) - 10) ** 2
    variance = (blurred.sum(dim=3) * rows).sum(dim=2)
    torch.testing.assert_close(variance[1], torch.ones(2), rtol=0.02, atol=0)
    assert (variance[2] > 3).all()  # four, up to the truncated tails


def test_defaults_draw_the_numbers_that_they_drew_before():
    """Runs of earlier versions continue with the same images: the draws and their order are those of 0.1."""
    images = 2 * torch.rand(5, 3, 9, 7) - 1
    generator, config = seeded_generator(3, 1), AugmentationConfig(mirror=True)
    result = augment(images, config, generator)

    again = seeded_generator(3, 1)
    angle, stretch, shear, shift = (2 * torch.rand(5, *shape, generator=again) - 1 for shape in ((), (2,), (), (2,)))
    expected = affine(images, torch.deg2rad(10.0 * angle), 1 + 0.1 * stretch, 0.1 * shear, 0.06 * shift)
    flip = 2 * torch.rand(5, 1, 1, 1, generator=again) - 1 < 0
    expected = torch.where(flip, expected.flip(-1), expected)
    expected = gaussian_blur(expected, 0.8 * (2 * torch.rand(5, generator=again) - 1).abs(), 0.8)
    noise = torch.randn(5, 3, 9, 7, generator=again)
    expected = expected + 0.15 * (2 * torch.rand(5, 1, 1, 1, generator=again) - 1).abs() * noise
    assert torch.equal(result, expected) and torch.equal(generator.get_state(), again.get_state())


def photograph(channels):
    """A smooth picture with some texture, (channels, 40, 56) uint8."""
    rng = np.random.default_rng(channels)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).resize((56, 40), Image.Resampling.BICUBIC)
    pixels = np.asarray(small.convert("L" if channels == 1 else "RGB")).reshape(40, 56, channels)
    return torch.from_numpy(np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)).permute(2, 0, 1)


def as_pixels(image, channels):
    return torch.from_numpy(np.array(image)).view(40, 56, channels).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.6])
def test_colors_change_as_in_pillow(channels, factor):
    pixels = photograph(channels)
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for place, enhancer in enumerate(enhancers):
        factors = torch.ones(3, 2)
        factors[place, 1] = factor  # of the second image only
        first, second = from_input(adjust_color(to_input(pixels.expand(2, -1, -1, -1)), *factors)).int()
        assert torch.equal(first, pixels.int())
        expected = as_pixels(enhancer(to_picture(pixels)).enhance(factor), channels).int()
        assert (second - expected).abs().max() <= 2  # Pillow rounds the gray


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [0.1, 0.5, 0.8])
def test_resolution_is_reduced_as_in_pillow(channels, scale):
    pixels = photograph(channels)
    unchanged, reduced = reduce_resolution(to_input(pixels.expand(2, -1, -1, -1)), torch.tensor([1, scale]))
    torch.testing.assert_close(unchanged, to_input(pixels))
    for plane, result in zip(pixels, reduced, strict=True):
        image = Image.fromarray(plane.numpy().astype(np.float32))
        small = image.resize((round(56 * scale), round(40 * scale)), Image.Resampling.BILINEAR)
        expected = np.array(small.resize((56, 40), Image.Resampling.BILINEAR))
        torch.testing.assert_close(result * 127.5 + 127.5, torch.from_numpy(expected), rtol=0, atol=0.01)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_loses_more_at_lower_quality(channels):
    images = to_input(photograph(channels).expand(3, -1, -1, -1))
    results = compress_jpeg(images, torch.tensor([95.0, 30, 3]))
    assert results.shape == images.shape and torch.equal(results, to_input(from_input(results)))
    fine, medium, coarse = (results - images).square().mean(dim=(1, 2, 3)).sqrt().tolist()
    assert 0 < 1.5 * fine < medium < coarse / 2 and fine < 0.05  # root mean squares; black to white is 2


def test_rectangles_have_the_area_and_lie_inside():
    images, fill = torch.zeros(4, 3, 40, 20), torch.ones(4, 3, 40, 20)
    area, aspect = torch.tensor([0.25, 0.25, 0, 0.36]), torch.tensor([1, 4, 1, 1 / 9])
    place = torch.tensor([[0.0, 1], [0, 0.5], [0, 0], [1, 0]])
    covered = occlude(images, area, aspect, place, fill)
    assert torch.equal(covered[:, :1].expand(-1, 3, -1, -1), covered)
    expected = torch.zeros(4, 40, 20)
    expected[0, :20, 10:] = 1  # half of either side
    expected[1, :, 8:13] = 1  # the whole height and a quarter of the width, rounded from 7.5
    expected[3, 32:, :] = 1  # a fifth of the height; the width would be 1.8 times that of the image
    assert torch.equal(covered[:, 0], expected)


def test_occlusion_varies_up_to_the_largest_share():
    images = torch.full((400, 1, 24, 24), 2.0)  # the fill is below 1
    covered = (augment(images, AugmentationConfig(**NOTHING, occlusion=0.4), seeded_generator(0)) < 1)[:, 0]
    share = covered.float().mean(dim=(1, 2))
    assert 0.3 < share.max() < 0.45 and share.min() < 0.02 and 0.15 < share.mean() < 0.22
    filled = augment(images, AugmentationConfig(**NOTHING, occlusion=0.4), seeded_generator(0))[:, 0][covered]
    assert -1 <= filled.min() < -0.99 and 0.99 < filled.max() < 1 and filled.std() == pytest.approx(3**-0.5, rel=0.02)
    height, width = covered.any(dim=2).sum(dim=1), covered.any(dim=1).sum(dim=1)
    assert torch.equal(height * width, covered.sum(dim=(1, 2)))  # it is a rectangle
    ratio = (height / width)[share > 0.05].log()
    assert ratio.abs().max() < math.log(4.5) and ratio.mean().abs() < 0.15
    frequency = covered.float().mean(dim=0)
    assert (frequency - frequency.flip(0, 1)).abs().max() < 0.1  # no side is preferred, and borders are reached
    assert min(edge.mean() for edge in (frequency[0], frequency[-1], frequency[:, 0], frequency[:, -1])) > 0.02


@pytest.mark.parametrize(("name", "value"), NEW.items())
@pytest.mark.parametrize("channels", [1, 3])
def test_each_new_distortion_is_independent_for_each_image(name, value, channels):
    images = to_input(photograph(channels).expand(6, -1, -1, -1))
    config = AugmentationConfig(**NOTHING, **{name: value})
    result = augment(images, config, seeded_generator(0))
    if (name, channels) == ("saturation", 1):
        torch.testing.assert_close(result, images)
        return
    assert result.shape == images.shape and len(torch.unique(result, dim=0)) == 6
    assert torch.equal(result, augment(images, config, seeded_generator(0)))


@pytest.mark.parametrize(
    ("name", "value"),
    [("occlusion", 1.0), ("resolution", 1.0), ("scale", -0.1), ("brightness", 1.1), ("contrast", math.nan)]
    + [("saturation", -0.1), ("jpeg", 96), ("jpeg", -1)],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"{name} must be in "):
        AugmentationConfig(**{name: value})


def test_configurations_of_earlier_versions_have_no_new_distortions():
    values = TrainConfig.defaults("digits").to_dict()
    values["augmentation"] = {name: value for name, value in values["augmentation"].items() if name not in NEW}
    assert TrainConfig.from_dict(values) == TrainConfig.defaults("digits")
