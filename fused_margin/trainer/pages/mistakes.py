"""The mistakes that a page shows: pairs and searches, with pictures of their images where there are any."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from fused_margin.evaluation import DataError, FeatureSet
from fused_margin.evaluation.plurals import counted

from ..data.decode import DecodedImages
from ..evaluate.mistakes import MAX_SHOWN, Miss, ScoredPairs
from ..evaluate.network import ShownImages
from .results import short_path

THUMBNAIL = 160  # longest side in pixels
PAIR = "first", "second"  # of a pair
LOSSLESS = 64  # longest side of images that are small enough for PNG, and are enlarged without smoothing


class Thumbnail(NamedTuple):
    """A picture inside the page."""

    uri: str
    width: int
    height: int
    enlarged: bool


class Side(NamedTuple):
    """One of the images, feature rows or videos of a mistake."""

    identity: str  # empty: unknown, or the same as the name
    name: str
    thumbnail: Thumbnail | None = None
    problem: str = ""  # why there is no picture, if there should be one


class Mistake(NamedTuple):
    """A pair or a search, with its numbers by their names."""

    sides: list[Side]
    numbers: dict[str, float]


class MistakeGroup(NamedTuple):
    """Mistakes of one kind, the worst first, or identified probes."""

    kind: Literal["accept", "reject", "miss", "known", "unknown"]
    title: str
    text: str
    columns: Sequence[str]  # names of the sides
    mistakes: list[Mistake]

    @property
    def has_roles(self) -> bool:
        """Whether each picture has the name of its side, because the sides differ."""
        return self.columns != PAIR

    @property
    def has_pictures(self) -> bool:
        """Whether there are images behind the rows, even if some or all of them cannot be read."""
        return any(side.thumbnail or side.problem for mistake in self.mistakes for side in mistake.sides)


Describe = Callable[[int], Side]  # of a row of features, or of a video


def describe_images(shown: ShownImages) -> Describe:
    """The image of a row."""

    def describe(row: int) -> Side:
        identity, name = shown.identity(row), shown.name(row)
        short = short_path(name)
        # A verification set has no identities; a folder's are part of the path.
        identity = "" if identity == name or identity in short.split("/") else identity
        try:
            return Side(identity, short, thumbnail(shown.picture(row)))
        except (DataError, OSError) as error:
            return Side(identity, short, problem=str(error))

    return describe


def describe_videos(video: np.ndarray, shown: ShownImages | None) -> Describe:
    """The middle frame of a video; `video` (num_rows,) has the video of each frame."""

    def describe(number: int) -> Side:
        frames = np.flatnonzero(video == number)
        if shown is None:
            return Side("", f"video {number}, {counted(len(frames), 'frame')}")
        return describe_images(shown)(int(frames[len(frames) // 2]))

    return describe


def describe_rows(labels: np.ndarray | None, array: str = "") -> Describe:
    """The number and label of a row of a feature file; `array` names it if there are several."""

    def describe(row: int) -> Side:
        return Side("" if labels is None else f"label {labels[row]}", f"row {row} {array}".strip())

    return describe


def describe_inputs(arrays: FeatureSet, shown: ShownImages | None, *, videos: bool) -> Describe:
    """What the numbers in the pairs of an evaluation stand for."""
    if videos and arrays.video is not None:
        return describe_videos(arrays.video, shown)
    return describe_rows(arrays.labels) if shown is None else describe_images(shown)


def picture_note(shown: ShownImages | None, *, videos: bool = False) -> str:
    """What the pictures are, as an introduction to the mistakes."""
    if shown is None:
        return "Features have no pictures; their rows are counted from 0."
    images = shown.images
    if not isinstance(images, DecodedImages):
        return "The pictures are what the network sees."
    height, width = images.image_size
    files = "the middle frames of the videos" if videos else "the image files"
    color = "gray" if images.channels == 1 else "color"
    return f"The pictures are {files}. The network sees them in {color} and at {width} x {height} pixels."


def pair_mistakes(pairs: ScoredPairs, describe: Describe, unit: str) -> list[MistakeGroup]:
    """The most confident false accepts and false rejects."""
    impostors = int(np.count_nonzero(~pairs.same))
    accepts, rejects = pairs.false_accepts, pairs.false_rejects

    def listed(positions: np.ndarray) -> list[Mistake]:
        return [
            Mistake(
                [describe(int(row)) for row in pairs.pairs[position]],
                {unit: float(pairs.scores[position]), "threshold": float(pairs.threshold[position])},
            )
            for position in positions[:MAX_SHOWN]
        ]

    return [
        MistakeGroup(
            "accept",
            "False accepts",
            f"{len(accepts):,} of {counted(impostors, 'impostor pair')} scored above the threshold of their fold: two "
            f"identities taken for one. {describe_number(len(accepts), 'highest')}",
            PAIR,
            listed(accepts),
        ),
        MistakeGroup(
            "reject",
            "False rejects",
            f"{len(rejects):,} of {counted(len(pairs.same) - impostors, 'genuine pair')} scored below the threshold of "
            f"their fold: one identity taken for two. {describe_number(len(rejects), 'lowest')}",
            PAIR,
            listed(rejects),
        ),
    ]


def search_mistakes(
    misses: list[Miss], num_missed: int, searches: int, probe: Describe, distractor: Describe
) -> list[MistakeGroup]:
    """The searches whose best distractor exceeds the mate by most."""
    mistakes = [
        Mistake(
            [probe(miss.probe), probe(miss.mate), distractor(miss.distractor)],
            {"cosine to the mate": miss.mate_cosine, "to the distractor": miss.distractor_cosine},
        )
        for miss in misses
    ]
    text = f"{num_missed:,} of {counted(searches, 'search', 'searches')} found a distractor before the mate."
    if mistakes:
        text += " The largest differences, at most one of each probe: the probe, its mate, and the distractor."
    return [MistakeGroup("miss", "Missed searches", text, ("probe", "mate", "distractor"), mistakes)]


def describe_number(number: int, which: str) -> str:
    """Introduces the mistakes that are shown, of a `number`."""
    if not number:
        return ""
    return f"The {which} {min(number, MAX_SHOWN)}:" if number > MAX_SHOWN else "All of them:"


def thumbnail(image: Image.Image) -> Thumbnail:
    """A picture of at most `THUMBNAIL` pixels as a data: URI; tiny images keep every pixel."""
    image = image.copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    tiny = max(image.size) <= LOSSLESS
    file = BytesIO()
    image.save(file, "PNG" if tiny else "JPEG", **({} if tiny else {"quality": 85}))
    encoded = base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/{'png' if tiny else 'jpeg'};base64,{encoded}", *image.size, tiny)
