"""Images are decoded as viewers show them, for all supported encodings; others are unreadable."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from fused_margin.trainer.data.decode import DecodedImages, UnreadableError, read_image

GRAY = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
PICTURE = Image.fromarray(GRAY)


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


# How an upright picture is stored under each EXIF orientation: the inverse of the viewer's transform.
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
    stored = PICTURE if STORED[number] is None else PICTURE.transpose(STORED[number])
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    read = read_image(encoded(stored, kind, exif=orientation(number), **options))
    assert read.size == PICTURE.size and np.abs(pixels(read) - GRAY).max() <= 3  # JPEG is lossy
    assert not read.info  # otherwise, saving the image would write the orientation again


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12"])
def test_broken_exif_data_is_ignored(exif):
    assert read_image(encoded(PICTURE, "JPEG", exif=exif)).size == PICTURE.size


def test_unusual_exif_data_does_not_prevent_rotation():
    """XResolution is stored as text, which Pillow can read and not write."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    exif += struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x11A, 2, 4, b"abc\0") + bytes(4)
    read = read_image(encoded(PICTURE.transpose(STORED[6]), "JPEG", quality=100, exif=exif))
    assert read.size == PICTURE.size and np.abs(pixels(read) - GRAY).max() <= 3


def deep(factor=257):
    return Image.fromarray(GRAY.astype(np.uint16) * factor)


def real(scale=1 / 255):
    return Image.fromarray(GRAY.astype(np.float32) * scale)


def with_alpha(kind):
    image = PICTURE.convert(kind)
    image.putalpha(255)
    return image


WHITE_ZERO = {"tiffinfo": {262: 0}}  # Pillow then inverts 8-bit gray, and stores other gray unchanged
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Its description says sRGB, as in some profiles of other color spaces.
RED_GREEN_SWAPPED = SRGB.replace(b"rXYZ", b"    ").replace(b"gXYZ", b"rXYZ").replace(b"    ", b"gXYZ", 1)


def tiff(width, height, data, tags):
    """An uncompressed TIFF with one strip; each tag is a number or several 16-bit numbers."""
    usual = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    data += bytes(len(data) % 2)
    tags = sorted({**usual, **tags}.items())
    entries, after, place = b"", b"", 8 + len(data) + 2 + 12 * len(tags) + 4
    for tag, value in tags:
        values = (value,) if isinstance(value, int) else value
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            packed, after = struct.pack("<I", place + len(after)), after + packed
        entries += struct.pack("<HHI4s", tag, 3, len(values), packed)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return io.BytesIO(head + data + struct.pack("<H", len(tags)) + entries + bytes(4) + after)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, bits, color, row, transparent):
    """A PNG with one row and a tRNS chunk."""
    header = struct.pack(">IIBBBBB", width, 1, bits, color, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


@pytest.mark.parametrize(
    ("file", "mode"),
    [
        (encoded(deep(), "PNG"), "L"),
        (encoded(deep(), "PPM"), "L"),
        (encoded(deep(), "TIFF"), "L"),
        (encoded(deep().transpose(Image.Transpose.ROTATE_90), "PNG", exif=orientation(6)), "L"),
        (encoded(Image.fromarray((65535 - GRAY.astype(int) * 257).astype(np.uint16)), "TIFF", **WHITE_ZERO), "L"),
        (encoded(PICTURE, "TIFF", **WHITE_ZERO), "L"),
        (encoded(real(), "TIFF"), "L"),
        (encoded(Image.fromarray(1 - GRAY.astype(np.float32) / 255), "TIFF", **WHITE_ZERO), "L"),
        (encoded(PICTURE.convert("RGB").quantize(64), "PNG"), "RGB"),
        (encoded(with_alpha("LA"), "PNG"), "L"),
        (encoded(with_alpha("RGBA"), "WEBP", lossless=True), "RGB"),
        (encoded(PICTURE.convert("RGB").convert("CMYK"), "TIFF"), "RGB"),
        (encoded(PICTURE.convert("RGB").convert("CMYK"), "JPEG", quality=100), "RGB"),
        (encoded(PICTURE, "MPO", save_all=True, append_images=[Image.new("L", (4, 3))], quality=100), "L"),
        (encoded(PICTURE, "PNG", icc_profile=b"no profile"), "L"),
        (encoded(PICTURE, "PNG", icc_profile=RED_GREEN_SWAPPED), "L"),  # a profile for color images
    ],
)
def test_same_picture_in_all_encodings(file, mode):
    read = read_image(file)
    assert read.mode == mode and read.size == PICTURE.size
    assert np.abs(pixels(read) - GRAY).max() <= 3


def test_twelve_bits():
    """A TIFF as from a microscope or a scanner, with a black and a white pixel."""
    assert pixels(read_image(tiff(2, 1, b"\x00\x0f\xff", {258: 12}))).tolist() == [[0, 255]]


def test_gray_with_premultiplied_alpha():
    file = tiff(2, 1, bytes([50, 128, 100, 255]), {258: (8, 8), 277: 2, 338: 1})
    assert pixels(read_image(file)).tolist() == [[50 + 127, 100]]


@pytest.mark.parametrize("transparent", ["RGBA", "LA", "gray value", "palette"])
def test_transparent_parts_are_white(transparent):
    image = Image.new("RGB", (2, 1), (40, 40, 40))
    image.putpixel((0, 0), (90, 90, 90))
    if transparent in ("RGBA", "LA"):
        image = image.convert(transparent)
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        file = encoded(image, "PNG")
    else:
        image = image.convert("L") if transparent == "gray value" else image.quantize(2)
        file = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    assert pixels(read_image(file)).tolist() == [[255, 40]]


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [(1, 0b01000000, [255, 255]), (2, 0b01100000, [255, 170]), (4, 0x1F, [255, 255]), (8, 1, [255])],
)
def test_transparent_gray_with_few_bits(bits, row, expected):
    file = png(len(expected), bits, 0, bytes([row]), struct.pack(">H", 0 if bits == 1 else 1))
    assert pixels(read_image(file)).tolist() == [expected]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_color_profile(mode):
    """The profile of a device that swaps red and green is applied."""
    file = encoded(Image.new("RGB", (4, 4), "red").convert(mode), "PNG", icc_profile=RED_GREEN_SWAPPED)
    read = read_image(file)
    assert np.abs(np.asarray(read)[0, 0].astype(int) - (0, 255, 0)).max() <= 1
    assert not read.info  # otherwise, saving the image would apply the profile again


def test_srgb_profile_changes_nothing():
    colors = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    read = read_image(encoded(Image.fromarray(colors), "PNG", icc_profile=SRGB))
    assert np.abs(np.asarray(read).astype(int) - colors).max() <= 1


def without_adobe_marker():
    return io.BytesIO(encoded(Image.new("CMYK", (4, 4)), "JPEG").getvalue().replace(b"Adobe", b"Other"))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (encoded(real(1.0), "TIFF"), "not all between 0"),
        (encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "not all between 0"),
        (encoded(Image.fromarray(GRAY.astype(np.int32)), "TIFF"), "do not define which"),
        (encoded(deep(), "PNG", transparency=0), "transparent value"),
        (png(1, 16, 2, bytes(6), bytes(6)), "16-bit colors have a transparent one"),
        (tiff(2, 1, bytes([0, 200]), {339: 2}), "its values are signed"),
        (tiff(1, 1, bytes(4), {258: (8, 8, 8, 8), 262: 2, 277: 4}), "the fourth without a meaning"),
        (tiff(1, 1, bytes(1), {262: 3, 320: (255,) * 768}), "palette has 8-bit values"),
        (encoded(PICTURE, "GIF", save_all=True, append_images=[deep().convert("L")]), "2 frames"),
        (encoded(PICTURE, "PNG", save_all=True, append_images=[Image.new("L", PICTURE.size)]), "2 frames"),
        (encoded(PICTURE, "WEBP", save_all=True, append_images=[Image.new("L", PICTURE.size)]), "2 frames"),
        (encoded(PICTURE, "TIFF", save_all=True, append_images=[PICTURE]), "2 frames or pages"),
        (without_adobe_marker(), "Adobe marker"),
    ],
)
def test_ambiguous_encodings_are_unreadable(file, why):
    with pytest.raises(UnreadableError, match=why):
        read_image(file)


@pytest.mark.parametrize("as_file", [True, False])
def test_every_changed_byte_of_png_pixels_is_detected(tmp_path, as_file):
    content = encoded(PICTURE, "PNG").getvalue()
    start = content.index(b"IDAT") + 4
    for place in range(start, content.index(b"IEND") - 4):
        changed = bytearray(content)
        changed[place] ^= 1
        file = io.BytesIO(changed)
        if as_file:
            file = tmp_path / "a.png"
            file.write_bytes(changed)
        with pytest.raises(UnreadableError, match="checksum"):
            read_image(file)


def test_errors_do_not_contain_the_path(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for file, why in ((tmp_path / "text.png", "no image"), (tmp_path / "absent.png", "No such file or directory")):
        with pytest.raises(UnreadableError, match=why) as error:
            read_image(file)
        assert str(tmp_path) not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "file",
    [
        encoded(PICTURE.convert("RGB"), "JPEG", exif=orientation(6)),
        encoded(PICTURE, "PNG", exif=orientation(6)),
        encoded(PICTURE, "TIFF", exif=orientation(6)),
        encoded(deep(), "TIFF", compression="tiff_lzw"),
        encoded(PICTURE, "WEBP", exif=orientation(6), icc_profile=SRGB),
        encoded(PICTURE, "BMP"),
        encoded(PICTURE, "PPM"),
        encoded(PICTURE, "GIF"),
    ],
)
def test_damaged_bytes_raise_only_unreadable_error(file):
    rng, content = random.Random(0), file.getvalue()
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 4))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_image(io.BytesIO(damaged))
        except UnreadableError as error:
            assert str(error)


@pytest.mark.parametrize("damage", [TypeError("odd"), struct.error("odd"), KeyError("odd"), MemoryError("odd")])
def test_any_error_of_pillow_makes_an_image_unreadable(monkeypatch, damage):
    def fail(*_):
        raise damage

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UnreadableError, match=f"Pillow fails with {type(damage).__name__}.*odd"):
        read_image(encoded(PICTURE, "BMP"))


class Files(DecodedImages):
    def __init__(self, files):
        super().__init__(torch.arange(len(files)), list(map(str, range(len(files)))), GRAY.shape, 1)
        self.files = files

    def source(self, index):
        return self.identities[index], self.files[index]


def test_batch_has_decoded_pictures_and_names_unreadable_ones():
    batch = Files([encoded(deep(), "PNG"), encoded(real(1.0), "TIFF"), encoded(PICTURE, "PNG")]).__getitems__([0, 1, 2])
    assert batch.unreadable == ("1: its floating-point values are not all between 0 (black) and 1 (white)",)
    assert batch.labels.tolist() == [0, 2]
    for image in batch.images:
        np.testing.assert_array_equal(image[0].numpy(), GRAY)
