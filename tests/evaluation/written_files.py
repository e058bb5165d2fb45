"""Images and files that the tests of verification sets write and read."""

import io

import pytest
from PIL import Image


def picture(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, kind)
    return buffer.getvalue()


def image_set(benchmark, channels):
    """The images of a set, as read by the trainer."""
    trainer = pytest.importorskip("fused_margin.trainer.data.verification_images", exc_type=ImportError)
    return trainer.VerificationImages(benchmark, (8, 8), channels)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


class Command:
    """Pickles as a call."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call
