"""Pictures are read as they are seen, however their numbers are stored, or not at all."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from fused_margin.trainer.data.decode import UNREADABLE, DecodedImages, read_image

GREY = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
SEEN = Image.fromarray(GREY)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return io.BytesIO(stream.getvalue())


def pixels(image):
    return np.asarray(image.convert("L")).astype(int)


def orientation(number):
    exif = Image.Exif()
    exif[0x112] = number
    return exif


# How an upright picture is stored under each EXIF orientation: the change that undoes what a viewer does.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("number", STORED)
def test_orientation(kind, number):
    stored = SEEN if STORED[number] is None else SEEN.transpose(STORED[number])
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    read = read_image(encoded(stored, kind, exif=orientation(number), **options))
    assert read.size == SEEN.size and np.abs(pixels(read) - GREY).max() <= 3  # JPEG's loss
    assert not read.info  # or whoever saves the image writes the orientation again


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12"])
def test_broken_exif_data_changes_nothing(exif):
    assert read_image(encoded(SEEN, "JPEG", exif=exif)).size == SEEN.size


def deep(factor=257):
    return Image.fromarray(GREY.astype(np.uint16) * factor)


def real(scale=1 / 255):
    return Image.fromarray(GREY.astype(np.float32) * scale)


def with_alpha(kind):
    image = SEEN.convert(kind)
    image.putalpha(255)
    return image


WHITE_ZERO = {"tiffinfo": {262: 0}}  # Pillow then stores the negative of 8-bit grey, and other grey as it is
RED_GREEN_SWAPPED = (
    ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    .tobytes()
    .replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    .replace(b"rXYZ", b"    ")
    .replace(b"gXYZ", b"rXYZ")
    .replace(b"    ", b"gXYZ", 1)
)


@pytest.mark.parametrize(
    ("file", "mode"),
    [
        (encoded(deep(), "PNG"), "L"),
        (encoded(deep(), "PPM"), "L"),
        (encoded(deep(), "TIFF"), "L"),
        (encoded(deep().transpose(Image.Transpose.ROTATE_90), "PNG", exif=orientation(6)), "L"),
        (encoded(Image.fromarray((65535 - GREY.astype(int) * 257).astype(np.uint16)), "TIFF", **WHITE_ZERO), "L"),
        (encoded(SEEN, "TIFF", **WHITE_ZERO), "L"),
        (encoded(real(), "TIFF"), "L"),
        (encoded(Image.fromarray(1 - GREY.astype(np.float32) / 255), "TIFF", **WHITE_ZERO), "L"),
        (encoded(SEEN.convert("RGB").quantize(64), "PNG"), "RGB"),
        (encoded(with_alpha("LA"), "PNG"), "L"),
        (encoded(with_alpha("RGBA"), "WEBP", lossless=True), "RGB"),
        (encoded(SEEN.convert("RGB").convert("CMYK"), "TIFF"), "RGB"),
        (encoded(SEEN.convert("RGB").convert("CMYK"), "JPEG", quality=100), "RGB"),
        (encoded(SEEN, "MPO", save_all=True, append_images=[Image.new("L", (4, 3))], quality=100), "L"),
        (encoded(SEEN, "PNG", icc_profile=b"no profile"), "L"),
        (encoded(SEEN, "PNG", icc_profile=RED_GREEN_SWAPPED), "L"),  # a profile of colours
    ],
)
def test_the_same_picture_however_it_is_stored(file, mode):
    read = read_image(file)
    assert read.mode == mode and read.size == SEEN.size
    assert np.abs(pixels(read) - GREY).max() <= 3


def test_twelve_bits():
    """Two pixels, black and white, of a microscope's or a scanner's TIFF."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = struct.pack("<2sHI", b"II", 42, 12) + b"\x00\x0f\xff\x00" + struct.pack("<H", len(tags)) + entries
    assert pixels(read_image(io.BytesIO(file + bytes(4)))).tolist() == [[0, 255]]


@pytest.mark.parametrize("transparent", ["RGBA", "LA", "grey value", "palette"])
def test_transparent_parts_are_white(transparent):
    image = Image.new("RGB", (2, 1), (40, 40, 40))
    image.putpixel((0, 0), (90, 90, 90))
    if transparent in ("RGBA", "LA"):
        image = image.convert(transparent)
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        file = encoded(image, "PNG")
    else:
        image = image.convert("L") if transparent == "grey value" else image.quantize(2)
        file = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    assert pixels(read_image(file)).tolist() == [[255, 40]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profile(mode):
    """With the profile of a device whose red is green."""
    file = encoded(Image.new("RGB", (4, 4), "red").convert(mode), "PNG", icc_profile=RED_GREEN_SWAPPED)
    read = read_image(file)
    assert np.abs(np.asarray(read)[0, 0].astype(int) - (0, 255, 0)).max() <= 1
    assert not read.info  # or whoever saves the image has it applied again


def without_adobe_marker():
    return io.BytesIO(encoded(Image.new("CMYK", (4, 4)), "JPEG").getvalue().replace(b"Adobe", b"Other"))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (encoded(real(1.0), "TIFF"), "not all between 0"),
        (encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "not all between 0"),
        (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "do not tell which"),
        (encoded(deep(), "PNG", transparency=0), "transparent value"),
        (encoded(SEEN, "GIF", save_all=True, append_images=[deep().convert("L")]), "2 frames"),
        (encoded(SEEN, "PNG", save_all=True, append_images=[Image.new("L", SEEN.size)]), "2 frames"),
        (encoded(SEEN, "WEBP", save_all=True, append_images=[Image.new("L", SEEN.size)]), "2 frames"),
        (encoded(SEEN, "TIFF", save_all=True, append_images=[SEEN]), "2 frames or pages"),
        (without_adobe_marker(), "Adobe marker"),
    ],
)
def test_what_does_not_tell_how_it_looks_is_unreadable(file, why):
    with pytest.raises(UNREADABLE, match=why):
        read_image(file)


class Files(DecodedImages):
    def __init__(self, files):
        super().__init__(torch.arange(len(files)), list(map(str, range(len(files)))), GREY.shape, 1)
        self.files = files

    def source(self, index):
        return self.identities[index], self.files[index]


def test_a_batch_has_the_pictures_as_they_are_seen_and_names_the_others():
    batch = Files([encoded(deep(), "PNG"), encoded(real(1.0), "TIFF"), encoded(SEEN, "PNG")]).__getitems__([0, 1, 2])
    assert batch.unreadable == ("1",) and batch.labels.tolist() == [0, 2]
    for image in batch.images:
        np.testing.assert_array_equal(image[0].numpy(), GREY)
