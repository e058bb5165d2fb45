"""Images decoded as a person sees them, and resized when their batch is read; unreadable ones are left out and named."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin
from torch import Tensor

from .base import Batch, ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".pgm", ".ppm", ".tif", ".tiff")
WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
# What Pillow raises for a broken file, and `read_image` for one whose look is not known.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


class DecodedImages(ImageSet):
    """Labelled images that are kept encoded; subclasses say where each is."""

    def __init__(self, labels: Tensor, identities: Sequence[str], image_size: tuple[int, int], channels: int) -> None:
        super().__init__(labels, identities)
        self.image_size, self.channels = image_size, channels

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        """Name of an image, and its file or its encoded bytes."""
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Batch:
        images, kept, unreadable = [], [], []
        for index in indices:
            name, file = self.source(index)
            try:
                images.append(_decode(file, self.image_size, self.channels))
            except UNREADABLE:
                unreadable.append(name)
            else:
                kept.append(index)
        shape = (0, self.channels, *self.image_size)
        stacked = torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        return Batch(stacked, self.labels[kept], tuple(unreadable))


def read_image(file: Path | BytesIO) -> Image.Image:
    """The picture in a file as an image viewer shows it: upright, opaque, mode "L" or "RGB".

    The EXIF orientation and an embedded colour profile are applied. Transparent parts are white. In
    grey of more than 8 bits the largest number is white, in floating-point grey 1 is.

    Raises:
        OSError, SyntaxError, ValueError, Image.DecompressionBombError: the file is broken, it is an
            animation or has several pages, or it does not tell which of its numbers is white. These
            are `UNREADABLE`.
    """
    with Image.open(file) as image:
        # Further frames of an MPO, as telephones write it, are depth and previews of one photograph.
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"it has {frames} frames or pages: expected one picture")
        if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
            raise ValueError("its CMYK numbers may be inverted: there is no Adobe marker to tell")
        deep = image.mode == "F" or image.mode.startswith("I")  # more than 8 bits
        black_and_white = _black_and_white(image) if deep else ()  # before loading, which drops the tags
        _turn_upright(image)
        shown = _eight_bits(image, *black_and_white) if deep else _on_white(image)
        return _in_srgb(shown, image.info.get("icc_profile"))


def _black_and_white(image: Image.Image) -> tuple[int, int]:
    """The numbers that are black and white, in grey of more than 8 bits.

    Raises:
        ValueError: they are not known.
    """
    black, white = 0, 1
    if image.mode != "F" and image.format in ("PNG", "PPM"):
        white = 2**16 - 1  # Pillow scales a PGM to it
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.mode.startswith("I;16"):
            white = 2 ** image.tag_v2[ExifTags.Base.BitsPerSample][0] - 1
        # Pillow inverts such grey at 8 bits only.
        if image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
            black, white = white, black
    if image.mode != "F" and {black, white} == {0, 1}:
        raise ValueError(f"its integers ({image.mode}) do not tell which of them is white")
    if "transparency" in image.info:
        raise ValueError("its 16-bit grey has a transparent value")
    return black, white


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation; a viewer ignores EXIF data that it cannot read."""
    try:
        image.getexif()
    except (struct.error, *UNREADABLE):
        return
    ImageOps.exif_transpose(image, in_place=True)


def _eight_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    """Grey of more bits as mode "L".

    Raises:
        ValueError: floating-point numbers go beyond black and white.
    """
    grey = (np.asarray(image, np.float64) - black) / (white - black)
    if not (grey.min() >= 0 and grey.max() <= 1):  # NaN too
        raise ValueError("its floating-point numbers are not all between 0 (black) and 1 (white)")
    return Image.fromarray(np.rint(255 * grey).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """An image of 8 bits or fewer as mode "L", "RGB" or "CMYK", without alpha."""
    kind = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "CMYK" else image.convert(kind)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image with its ICC profile applied, as mode "L" or "RGB"; a viewer ignores a profile that does not fit."""
    kind = "L" if image.mode == "L" else "RGB"
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                image = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass
    image = image.convert(kind)
    image.info = {}  # profile and transparency no longer apply
    return image


def _decode(file: Path | BytesIO, image_size: tuple[int, int], channels: int) -> Tensor:
    height, width = image_size
    image = read_image(file).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)
