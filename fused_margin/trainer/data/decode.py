"""Decodes images as a viewer shows them and resizes them by batch; unreadable images are skipped and reported."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from fused_margin.evaluation.errors import DataError

from .base import Batch, ImageSet

WHITE_IS_ZERO = 0  # TIFF's PhotometricInterpretation
UNSIGNED, REAL = 1, 3  # TIFF's SampleFormat
UPRIGHT = 1  # EXIF's Orientation of an image that needs no transposition
# The transposition for each other EXIF orientation.
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PACKED_GRAY = {"L;2": 85, "L;4": 17}  # a PNG's gray of 2 and 4 bits, and Pillow's factor to 8 bits


class UnreadableError(Exception):
    """An image cannot be decoded, or its appearance is ambiguous. The message is the reason."""


class DecodedImages(ImageSet):
    """Labelled encoded images. Subclasses define `source`."""

    def __init__(self, labels: Tensor, identities: Sequence[str], image_size: tuple[int, int], channels: int) -> None:
        super().__init__(labels, identities)
        self.image_size, self.channels = image_size, channels

    def source(self, index: int) -> tuple[str, Path | BytesIO]:
        """Name of an image, and its path or encoded bytes."""
        raise NotImplementedError

    def __getitems__(self, indices: list[int]) -> Batch:
        images, readable, unreadable = [], [], []
        for index in indices:
            name, file = self.source(index)
            try:
                images.append(_decode(file, self.image_size, self.channels))
            except UnreadableError as error:
                unreadable.append(f"{name}: {error}")
            else:
                readable.append(index)
        shape = (0, self.channels, *self.image_size)
        stacked = torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        return Batch(stacked, self.labels[readable], readable, tuple(unreadable))

    def name(self, index: int) -> str:
        return self.source(index)[0]

    def picture(self, index: int) -> Image.Image:
        try:
            return read_image(self.source(index)[1])
        except UnreadableError as error:
            raise DataError(str(error)) from error


def read_image(file: Path | BytesIO) -> Image.Image:
    """Read an image as an image viewer shows it: upright, opaque, mode "L" or "RGB".

    The EXIF orientation and an embedded color profile are applied. Transparent parts become white. White is the
    largest value of integer gray with more than 8 bits, and 1 in floating-point gray. A PNG's gAMA is ignored, as in
    most viewers.

    Raises:
        UnreadableError: the file is damaged, has several frames or pages, or does not define which value is white.
    """
    try:
        return _read(file)
    except UnidentifiedImageError as error:  # its message has the file name or a memory address
        raise UnreadableError("it is damaged, no image, or in a format that Pillow does not read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Without the file name, which the caller adds.
        raise UnreadableError(getattr(error, "strerror", None) or str(error)) from error
    except Exception as error:  # Pillow raises many types for damaged files: TypeError, struct.error, ...
        raise UnreadableError(f"Pillow fails with {type(error).__name__}: {error}") from error


def _read(file: Path | BytesIO) -> Image.Image:
    with Image.open(file) as image:
        # Phones write MPO files whose further frames are depth maps and previews of one photograph.
        if image.format != "MPO" and (frames := getattr(image, "n_frames", 1)) > 1:
            raise ValueError(f"it has {frames} frames or pages: expected one image")
        if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
            raise ValueError("its CMYK values may be inverted: there is no Adobe marker")
        # These checks come before loading, which discards the metadata that they read.
        deep = image.mode == "F" or image.mode.startswith("I")  # more than 8 bits
        black_and_white = _black_and_white(image) if deep else ()
        if isinstance(image, PngImagePlugin.PngImageFile):
            _prepare_png(image, file)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_tiff(image)
        upright = _upright(image)
        shown = _eight_bits(upright, *black_and_white) if deep else _on_white(upright)
        return _in_srgb(shown, upright.info.get("icc_profile"))


def _prepare_png(image: PngImagePlugin.PngImageFile, file: Path | BytesIO) -> None:
    """Verify the checksums, and scale a transparent gray value to 8 bits as Pillow scales the pixels.

    Raises:
        OSError, SyntaxError: a checksum is wrong, or the file is truncated.
        ValueError: a transparent color has 16 bits, of which Pillow reads 8.
    """
    with Image.open(file) as checked:  # Pillow does not verify pixel data when it loads it
        checked.verify()
    packed = image.tile[0][3]
    if "transparency" in image.info:
        if packed == "RGB;16B":
            raise ValueError("its 16-bit colors have a transparent one")
        if packed in PACKED_GRAY:
            image.info["transparency"] *= PACKED_GRAY[packed]


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Refuse TIFF images whose appearance is ambiguous.

    Raises:
        ValueError: samples are signed, or the meaning of the fourth sample or of the palette is undefined.
    """
    tags = image.tag_v2
    formats = tags.get(TiffImagePlugin.SAMPLEFORMAT, (UNSIGNED,))
    if not set(formats) <= {UNSIGNED, REAL}:
        raise ValueError("its values are signed: white is undefined")
    if image.mode == "RGBA" and TiffImagePlugin.EXTRASAMPLES not in tags:
        raise ValueError("it has four values per pixel, the fourth without a meaning")
    if image.mode in ("P", "PA") and 0 < max(tags[TiffImagePlugin.COLORMAP]) < 256:
        raise ValueError("its palette has 8-bit values where 16 bits are expected")


def _black_and_white(image: Image.Image) -> tuple[int, int]:
    """The values of black and white in gray of more than 8 bits.

    Raises:
        ValueError: they are undefined.
    """
    black, white = 0, 1
    if image.mode != "F" and image.format in ("PNG", "PPM"):
        white = 2**16 - 1  # Pillow scales a PGM to it
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        if image.mode.startswith("I;16"):
            white = 2 ** image.tag_v2[ExifTags.Base.BitsPerSample][0] - 1
        # Pillow inverts it at 8 bits only.
        if image.tag_v2.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
            black, white = white, black
    if image.mode != "F" and {black, white} == {0, 1}:
        raise ValueError(f"its integers ({image.mode}) do not define which value is white")
    if "transparency" in image.info:
        raise ValueError("its 16-bit gray has a transparent value")
    return black, white


def _upright(image: Image.Image) -> Image.Image:
    """The loaded image with its EXIF orientation applied; unreadable EXIF data is ignored, as in viewers."""
    image.load()
    try:
        # ImageOps.exif_transpose writes all EXIF data again, which fails for some files.
        method = TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    except Exception:  # noqa: BLE001  Pillow raises many types for damaged data
        return image
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    """Gray of more than 8 bits as mode "L".

    Raises:
        ValueError: floating-point values are out of range.
    """
    gray = (np.asarray(image, np.float64) - black) / (white - black)
    if not (gray.min() >= 0 and gray.max() <= 1):  # NaN too
        raise ValueError("its floating-point values are not all between 0 (black) and 1 (white)")
    return Image.fromarray(np.rint(255 * gray).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    """An image of at most 8 bits as mode "L", "RGB" or "CMYK", blended with white."""
    if image.mode == "La":  # premultiplied gray, which Pillow converts to LA only
        image = image.convert("LA")
    kind = "L" if image.mode in ("1", "L", "LA") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "CMYK" else image.convert(kind)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image with its ICC profile applied, as mode "L" or "RGB"; an unsuitable profile is ignored, as in viewers."""
    kind = "L" if image.mode == "L" else "RGB"
    if profile:
        try:
            # It returns None only if asked to change the image in place.
            image = ImageCms.applyTransform(image, _to_srgb(profile, image.mode)) or image
        except (ImageCms.PyCMSError, OSError):
            pass
    image = image.convert(kind)
    image.info = {}  # profile and transparency no longer apply
    return image


@lru_cache(maxsize=16)  # photographs of one camera share a profile, and building a transform takes milliseconds
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    """Transform from a mode with an ICC profile to sRGB. The transform of an sRGB profile changes values by at most 1.

    Raises:
        ImageCms.PyCMSError, OSError: the profile is invalid or for another mode.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _decode(file: Path | BytesIO, image_size: tuple[int, int], channels: int) -> Tensor:
    height, width = image_size
    image = read_image(file).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).view(height, width, channels).permute(2, 0, 1)
