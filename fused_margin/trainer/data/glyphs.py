"""Images of Unicode characters: a character is an identity, and each DejaVu font face gives one image of it.

The fonts are part of matplotlib, so nothing is downloaded. A character is used if at least eight of the twelve font
faces draw it. Characters with equal images (Latin A, Greek Alpha, Cyrillic A) are merged into one identity.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional as F

from .base import Splits, TensorImages, on_gray, split_identities
from .config import AugmentationConfig

FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSerif-BoldItalic",
)
MIN_FACES = 8  # font faces that draw the character
MIN_IMAGES = 4  # distinct images; box-drawing characters look the same in all faces
ALIKE = 0.997  # cosine of the pixels above which two images are equal


def glyph_splits(image_size: tuple[int, int], channels: int, test_fraction: float, seed: int) -> Splits:
    """Render every glyph identity and split them into training and test identities."""
    images, labels, names = glyph_identities(image_size)
    images = on_gray(images)[:, None].expand(-1, channels, -1, -1)
    train, test = split_identities("glyphs", len(names), test_fraction, seed)
    return Splits(
        TensorImages.of(images, labels, names, train),
        TensorImages.of(images, labels, names, test),
        description="characters of the DejaVu fonts, one image per font face, randomly distorted",
        test_distortion=AugmentationConfig(),
    )


def glyph_identities(image_size: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
    """Images (num_images, H, W) uint8, their identity labels, and the characters of each identity."""
    images, drawn, characters = render_characters(image_size)
    identity = merge_alike(images, drawn)
    kept_images, kept_labels = [], []
    names: list[str] = []
    for label in range(int(identity.max()) + 1):
        members = (identity == label).nonzero().flatten()
        candidates = images[members][drawn[members]]
        distinct = torch.unique(candidates.flatten(1), dim=0).view(-1, *image_size)
        if len(distinct) < MIN_IMAGES:
            continue
        kept_images.append(distinct)
        kept_labels.append(torch.full((len(distinct),), len(names)))
        names.append("".join(characters[i] for i in members.tolist()))
    return torch.cat(kept_images), torch.cat(kept_labels), names


def render_characters(image_size: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
    """Draw every character that enough font faces have.

    Returns images (characters, faces, H, W) uint8, white on black and centerd, a mask (characters, faces) of the images
    that are not blank, and the characters.
    """
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = [folder / f"{face}.ttf" for face in FACES]
    charmaps = [set(TTFont(file, lazy=True).getBestCmap()) for file in files]
    candidates = sorted(set().union(*charmaps))
    candidates = [c for c in candidates if sum(c in charmap for charmap in charmaps) >= MIN_FACES]

    images = np.zeros((len(candidates), len(FACES), *image_size), np.uint8)
    for face, (file, charmap) in enumerate(zip(files, charmaps, strict=True)):
        font = ImageFont.truetype(str(file), round(0.75 * min(image_size)), layout_engine=ImageFont.Layout.BASIC)
        missing = _ink(font, "\uffff")  # no font has this character, so this is the missing-glyph image
        for i, codepoint in enumerate(candidates):
            if codepoint in charmap:
                ink = _ink(font, chr(codepoint))
                if ink.size and not np.array_equal(ink, missing):
                    _paste_centerd(images[i, face], ink)
    drawn = images.max(axis=(2, 3)) > 0
    enough = drawn.sum(axis=1) >= MIN_FACES
    characters = [chr(c) for c, keep in zip(candidates, enough, strict=True) if keep]
    return torch.from_numpy(images[enough]), torch.from_numpy(drawn[enough]), characters


def merge_alike(images: Tensor, drawn: Tensor, threshold: float = ALIKE) -> Tensor:
    """Identity label (characters,) of each character.

    Two characters are one identity if their images are equal in at least half of the faces that draw both. Some faces
    draw Cyrillic A and Latin A differently, in spacing or italics.
    """
    alike = torch.zeros(len(images), len(images))
    common = torch.zeros_like(alike)
    for face in range(images.shape[1]):
        # Half the resolution is enough, because the random distortion hides finer differences.
        pixels = F.avg_pool2d(images[:, face].float(), 2).flatten(1)
        pixels = F.normalize(pixels)  # a blank row stays zero
        alike += pixels @ pixels.T > threshold
        present = drawn[:, face].float()
        common.addr_(present, present)
    same = (alike > 0) & (alike >= common / 2)
    _, labels = connected_components(same.numpy(), directed=False)
    return torch.from_numpy(labels).long()


def _ink(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray:
    """Pixels of a character, cropped to the drawn area; empty if nothing is drawn."""
    mask = font.getmask(character)
    pixels = np.frombuffer(bytes(mask), np.uint8).reshape(mask.size[::-1])
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    if not len(rows):
        return pixels[:0]
    return pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paste_centerd(canvas: np.ndarray, ink: np.ndarray) -> None:
    """Draw `ink` at the center, shrunk if it would touch the border."""
    limits = np.array(canvas.shape) - 2
    shrink = min(1.0, *(limits / ink.shape))
    if shrink < 1:
        height, width = (max(1, int(side * shrink)) for side in ink.shape)
        ink = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    top, left = (np.array(canvas.shape) - ink.shape) // 2
    canvas[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
