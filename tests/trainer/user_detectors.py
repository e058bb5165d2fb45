"""Face detectors, as a user might name them. They know a photograph by its width."""

from typing import ClassVar

import numpy as np

from fused_margin.trainer.align.geometry import TEMPLATES

TEMPLATE = TEMPLATES["112x112"].points


def face(left, top, scale, score=0.9, points=TEMPLATE):
    """A face whose box is 80 pixels wide and 100 high, times the scale."""
    corner = np.array([left, top])
    landmarks = corner + scale * (points - [16, 20])
    return landmarks, (left, top, left + 80 * scale, top + 100 * scale), score


SCENES = {
    200: [face(50, 30, 1)],
    201: [face(10, 10, 0.5, 0.99), face(90, 60, 0.6, 0.95), face(100, 20, 0.9, 0.5), face(5, 90, 0.1)],
    202: [],
    203: [face(50, 40, 0.2)],
    204: [face(-20, 30, 1)],
    205: [face(50, 30, 1, points=TEMPLATE * [-1, 1] + [112, 0])],
    206: RuntimeError("no memory\nfor this"),
    207: KeyboardInterrupt(),
    208: [face(500, 500, 1)],
    209: None,
    210: [face(50, 30, 1, points=TEMPLATE * np.nan)],
    211: [face(150, 130, -1, points=TEMPLATE)],
}


class Scenes:
    """Counts the photographs that it is shown."""

    seen: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, repeat=1):
        self.repeat = repeat

    def __call__(self, image):
        assert image.dtype == np.uint8 and image.flags.writeable
        self.seen.append(image.shape)
        faces = SCENES[image.shape[1]]
        if isinstance(faces, BaseException):
            raise faces
        return faces and self.repeat * faces


def other_results(result):
    """A detector that returns something else."""
    return lambda image: {
        "pair": [(TEMPLATE, (0, 0, 80, 100))],
        "four points": [(TEMPLATE[:4], (0, 0, 80, 100), 1)],
    }[result]


def unknown_model(name):
    return {}[name]


def not_a_detector():
    return 3
