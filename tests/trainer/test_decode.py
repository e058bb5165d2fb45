"""Pictures are read as they are seen, however their numbers are stored, or not at all."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from fused_margin.trainer.data.decode import DecodedImages, UnreadableError, read_image

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


def test_odd_exif_data_does_not_keep_a_picture_from_being_turned():
    """XResolution stored as text, which Pillow reads and cannot write."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    exif += struct.pack("<HHIHH", 0x112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x11A, 2, 4, b"abc\0") + bytes(4)
    read = read_image(encoded(SEEN.transpose(STORED[6]), "JPEG", quality=100, exif=exif))
    assert read.size == SEEN.size and np.abs(pixels(read) - GREY).max() <= 3


def deep(factor=257):
    return Image.fromarray(GREY.astype(np.uint16) * factor)


def real(scale=1 / 255):
    return Image.fromarray(GREY.astype(np.float32) * scale)


def with_alpha(kind):
    image = SEEN.convert(kind)
    image.putalpha(255)
    return image


WHITE_ZERO = {"tiffinfo": {262: 0}}  # Pillow then stores the negative of 8-bit grey, and other grey as it is
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Its description says sRGB, as some profiles of other colours do.
RED_GREEN_SWAPPED = SRGB.replace(b"rXYZ", b"    ").replace(b"gXYZ", b"rXYZ").replace(b"    ", b"gXYZ", 1)


def tiff(width, height, data, tags):
    """One strip of an uncompressed TIFF; each tag is a number, or several of 16 bits."""
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


def png(width, bits, colour, row, transparent):
    """One row of a PNG, with a tRNS chunk."""
    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks))


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
    assert pixels(read_image(tiff(2, 1, b"\x00\x0f\xff", {258: 12}))).tolist() == [[0, 255]]


def test_grey_that_is_multiplied_by_its_alpha():
    file = tiff(2, 1, bytes([50, 128, 100, 255]), {258: (8, 8), 277: 2, 338: 1})
    assert pixels(read_image(file)).tolist() == [[50 + 127, 100]]


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


@pytest.mark.parametrize(
    ("bits", "row", "seen"),
    [(1, 0b01000000, [255, 255]), (2, 0b01100000, [255, 170]), (4, 0x1F, [255, 255]), (8, 1, [255])],
)
def test_a_transparent_grey_of_few_bits(bits, row, seen):
    file = png(len(seen), bits, 0, bytes([row]), struct.pack(">H", 0 if bits == 1 else 1))
    assert pixels(read_image(file)).tolist() == [seen]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_profile(mode):
    """With the profile of a device whose red is green."""
    file = encoded(Image.new("RGB", (4, 4), "red").convert(mode), "PNG", icc_profile=RED_GREEN_SWAPPED)
    read = read_image(file)
    assert np.abs(np.asarray(read)[0, 0].astype(int) - (0, 255, 0)).max() <= 1
    assert not read.info  # or whoever saves the image has it applied again


def test_the_usual_profile_changes_nothing():
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    read = read_image(encoded(Image.fromarray(colours), "PNG", icc_profile=SRGB))
    assert np.abs(np.asarray(read).astype(int) - colours).max() <= 1


def without_adobe_marker():
    return io.BytesIO(encoded(Image.new("CMYK", (4, 4)), "JPEG").getvalue().replace(b"Adobe", b"Other"))


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (encoded(real(1.0), "TIFF"), "not all between 0"),
        (encoded(Image.fromarray(np.full((2, 2), np.nan, np.float32)), "TIFF"), "not all between 0"),
        (encoded(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "do not define which"),
        (encoded(deep(), "PNG", transparency=0), "transparent value"),
        (png(1, 16, 2, bytes(6), bytes(6)), "16-bit colours have a transparent one"),
        (tiff(2, 1, bytes([0, 200]), {339: 2}), "its values are signed"),
        (tiff(1, 1, bytes(4), {258: (8, 8, 8, 8), 262: 2, 277: 4}), "the fourth without a meaning"),
        (tiff(1, 1, bytes(1), {262: 3, 320: (255,) * 768}), "palette has 8-bit values"),
        (encoded(SEEN, "GIF", save_all=True, append_images=[deep().convert("L")]), "2 frames"),
        (encoded(SEEN, "PNG", save_all=True, append_images=[Image.new("L", SEEN.size)]), "2 frames"),
        (encoded(SEEN, "WEBP", save_all=True, append_images=[Image.new("L", SEEN.size)]), "2 frames"),
        (encoded(SEEN, "TIFF", save_all=True, append_images=[SEEN]), "2 frames or pages"),
        (without_adobe_marker(), "Adobe marker"),
    ],
)
def test_what_does_not_tell_how_it_looks_is_unreadable(file, why):
    with pytest.raises(UnreadableError, match=why):
        read_image(file)


@pytest.mark.parametrize("as_file", [True, False])
def test_every_changed_bit_of_a_pngs_pixels_is_noticed(tmp_path, as_file):
    whole = encoded(SEEN, "PNG").getvalue()
    start = whole.index(b"IDAT") + 4
    for place in range(start, whole.index(b"IEND") - 4):
        changed = bytearray(whole)
        changed[place] ^= 1
        file = io.BytesIO(changed)
        if as_file:
            file = tmp_path / "a.png"
            file.write_bytes(changed)
        with pytest.raises(UnreadableError, match="checksum"):
            read_image(file)


def test_what_is_no_picture_is_told_without_its_name(tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    for file, why in ((tmp_path / "text.png", "no image"), (tmp_path / "absent.png", "No such file or directory")):
        with pytest.raises(UnreadableError, match=why) as error:
            read_image(file)
        assert str(tmp_path) not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "file",
    [
        encoded(SEEN.convert("RGB"), "JPEG", exif=orientation(6)),
        encoded(SEEN, "PNG", exif=orientation(6)),
        encoded(SEEN, "TIFF", exif=orientation(6)),
        encoded(deep(), "TIFF", compression="tiff_lzw"),
        encoded(SEEN, "WEBP", exif=orientation(6), icc_profile=SRGB),
        encoded(SEEN, "BMP"),
        encoded(SEEN, "PPM"),
        encoded(SEEN, "GIF"),
    ],
)
def test_damaged_bytes_raise_nothing_else(file):
    rng, whole = random.Random(0), file.getvalue()
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_image(io.BytesIO(damaged))
        except UnreadableError as error:
            assert str(error)


@pytest.mark.parametrize("damage", [TypeError("odd"), struct.error("odd"), KeyError("odd"), MemoryError("odd")])
def test_whatever_pillow_fails_with_makes_an_image_unreadable(monkeypatch, damage):
    def fail(*_):
        raise damage

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(UnreadableError, match=f"Pillow fails with {type(damage).__name__}.*odd"):
        read_image(encoded(SEEN, "BMP"))


class Files(DecodedImages):
    def __init__(self, files):
        super().__init__(torch.arange(len(files)), list(map(str, range(len(files)))), GREY.shape, 1)
        self.files = files

    def source(self, index):
        return self.identities[index], self.files[index]


def test_a_batch_has_the_pictures_as_they_are_seen_and_names_the_others():
    batch = Files([encoded(deep(), "PNG"), encoded(real(1.0), "TIFF"), encoded(SEEN, "PNG")]).__getitems__([0, 1, 2])
    assert batch.unreadable == ("1: its floating-point values are not all between 0 (black) and 1 (white)",)
    assert batch.labels.tolist() == [0, 2]
    for image in batch.images:
        np.testing.assert_array_equal(image[0].numpy(), GREY)
