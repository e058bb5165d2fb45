"""Draws cartoon faces in place of photographs that cannot be shipped: unaligned pictures, their landmarks, and pairs.

OUTPUT/train/person_000/001.jpg ... to train on; OUTPUT/lfw/Person_120/Person_120_0001.jpg ... and OUTPUT/lfw/pairs.txt,
of other people, to verify; OUTPUT/landmarks.csv for all of them. The identity determines the geometry and colors of a
face; everything else varies from picture to picture. The same seed draws the same pictures.
"""

import argparse
import csv
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

FOLDS, PEOPLE_PER_FOLD, PAIRS_PER_FOLD = 10, 4, 30  # of pairs.txt; LFW has 300 pairs of either kind in a fold
SMOOTH = 3  # pictures are drawn so many times larger


def color(text):
    """#rrggbb as an array (3,)."""
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], float)


WHITE, BLACK, BLUSH, MOUTH, LIPS = map(color, ("#fbfaf6", "#16161c", "#e05050", "#5a1a20", "#a02c3c"))
SKINS = [color(text) for text in ("#f9dcc4", "#f2c6a0", "#e0ac7e", "#c68a5c", "#9a6440", "#6b4530")]
HAIRS = [color(text) for text in ("#1c1a1e", "#3b2a20", "#6a452b", "#9c6b3c", "#d8b46a", "#a5472a", "#9a9a98")]
IRISES = [color(text) for text in ("#4a3424", "#6f5130", "#4f7a52", "#4a80b0", "#78868f")]


def make_person(rng):
    """The properties of a person, constant over pictures; lengths in half head heights, y points down."""

    def near(middle, spread):
        return middle + spread * rng.uniform(-1, 1)

    skin = rng.choice(SKINS) * near(1, 0.06)
    return SimpleNamespace(
        skin=skin, lips=skin * 0.55 + LIPS * near(0.35, 0.15),
        hair=rng.choice(HAIRS) * near(1, 0.06), iris=rng.choice(IRISES) * near(1, 0.06),
        width=near(0.78, 0.08), jaw=near(0.22, 0.18), ears=near(0.17, 0.05),
        eye_gap=near(0.34, 0.05), eye_y=near(-0.1, 0.05), eye_size=near(0.135, 0.025), eye_shape=near(0.68, 0.15),
        eye_tilt=near(0, 0.18), brow_gap=near(0.22, 0.05), brow_slope=near(0, 0.04), brow_width=near(0.055, 0.03),
        nose_y=near(0.28, 0.08), nose_width=near(0.12, 0.045),
        mouth_y=near(0.62, 0.06), mouth_width=near(0.28, 0.08), lip=near(0.06, 0.03),
        hairline=near(-0.62, 0.16), parting=near(0, 0.7), wave=near(0.04, 0.04), volume=near(1.12, 0.07),
        length=rng.choice([0, 0, 0.5, 1.1]), beard=rng.choice(["", "", "", "moustache", "full"]),
        bald=rng.random() < 0.1, freckles=rng.uniform(-1, 1, (rng.choice([0, 0, 0, 14]), 2)),
    )  # fmt: skip


def oval(x, y, rx, ry, tilt=0.0):
    """Points (48, 2) clockwise; the second half of those of an upright oval is its upper half."""
    t = np.linspace(0, 2 * np.pi, 48)
    dx, dy = rx * np.cos(t), ry * np.sin(t)
    return np.column_stack([x + dx * np.cos(tilt) - dy * np.sin(tilt), y + dx * np.sin(tilt) + dy * np.cos(tilt)])


def stroke(x, y, thickness):
    """The outline of a line through points x, y, thinner towards its ends."""
    half = thickness / 2 * np.sqrt(np.sin(np.linspace(0, np.pi, len(x))) + 0.1)
    return np.column_stack([np.r_[x, x[::-1]], np.r_[y - half, (y + half)[::-1]]])


class Sketch:
    """A picture that is drawn in the face's own coordinates."""

    def __init__(self, rng):
        self.size = width, height = rng.integers(150, 261, 2)
        self.zoom, angle = min(width, height) * rng.uniform(0.26, 0.36) * SMOOTH, np.deg2rad(rng.normal(0, 12))
        self.center = (0.5 + rng.uniform(-0.07, 0.07, 2)) * self.size * SMOOTH
        self.rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        self.turn = rng.normal(0, 0.35)
        self.backdrop = rng.uniform(60, 220) + rng.normal(0, 28, 3)
        self.image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), self.ink(self.backdrop))
        self.draw = ImageDraw.Draw(self.image)

    @staticmethod
    def ink(rgb):
        return tuple(np.clip(rgb, 0, 255).astype(int))

    def place(self, points, depth):
        """Coordinates of points in the large picture. Points in front of the face (depth > 0) shift when the head turns."""
        return (np.asarray(points, float) + (self.turn * depth, 0)) @ self.rotation * self.zoom + self.center

    def fill(self, points, rgb, depth=0.0):
        self.draw.polygon([tuple(xy) for xy in self.place(points, depth)], self.ink(rgb))


def draw_head(sketch, p, rng):
    """Background, clothes, head, and the hair behind it."""
    for _ in range(6):
        (x, y), (rx, ry) = rng.uniform(-2.5, 2.5, 2), rng.uniform(0.2, 1.2, 2)
        sketch.fill(oval(x, y, rx, ry, rng.uniform(0, 3)), sketch.backdrop + rng.normal(0, 18, 3))
    if not p.bald:
        sketch.fill(crown(p), p.hair * 0.85)
        if p.length:
            sketch.fill(oval(0, p.length / 2 - 0.2, p.width * p.volume * 1.1, 0.9 + p.length / 2), p.hair * 0.85)
    sketch.fill(oval(0, 2.3, 1.5, 1.05), any_color(rng))
    sketch.fill([(-0.3, 0.6), (0.3, 0.6), (0.36, 1.35), (0, 1.5), (-0.36, 1.35)], p.skin * 0.85)
    for side in (-1, 1):
        sketch.fill(oval(side * p.width, 0.05, p.ears * 0.6, p.ears), p.skin * 0.92, -0.1)
    head = oval(0, 0, p.width, 1)
    head[:, 0] *= 1 - p.jaw * np.maximum(head[:, 1], 0) ** 2
    sketch.fill(head, p.skin)
    if p.beard == "full":
        chin = head[head[:, 1] > 0.2]
        x = np.linspace(chin[-1, 0], chin[0, 0], 30)
        edge = p.mouth_y - (p.mouth_y - 0.15) * np.abs(x / p.width) ** 1.5
        sketch.fill(np.vstack([chin, np.column_stack([x, edge])]), p.hair * 0.7 + p.skin * 0.2)
    for side in (-1, 1):
        sketch.fill(oval(side * p.width * 0.6, 0.3, 0.16, 0.11), p.skin * 0.88 + BLUSH * 0.12, 0.1)
    for x, y in p.freckles:
        sketch.fill(oval(x * p.width * 0.7, 0.25 + y * 0.12, 0.018, 0.018), p.skin * 0.7, 0.12)


def crown(p):
    return oval(0, -0.1, p.width * p.volume, p.volume * 0.98)[24:]


def draw_face(sketch, p, rng):
    """Eyes, nose and mouth with a random expression, and the fringe; returns the five landmarks (5, 2) in the large picture."""
    (smile, raised, lid), opened = rng.uniform((-0.5, -0.5, 0.7), (1, 1, 1.05)), max(0, rng.normal(0, 0.06))
    gaze, tall = rng.normal(0, 0.2, 2) * p.eye_size, p.eye_size * p.eye_shape * lid
    iris, along = min(tall, p.eye_size * 0.6), np.linspace(-1, 1, 16)
    eyes = [(-p.eye_gap, p.eye_y), (p.eye_gap, p.eye_y)]
    for side, (x, y) in zip((-1, 1), eyes, strict=True):
        sketch.fill(oval(x, y - 0.015, p.eye_size * 1.12, tall * 1.2, side * p.eye_tilt), p.skin * 0.6, 0.12)
        sketch.fill(oval(x, y, p.eye_size, tall, side * p.eye_tilt), WHITE, 0.12)
        sketch.fill(oval(x + gaze[0], y + gaze[1] / 2, iris, iris), p.iris, 0.12)
        sketch.fill(oval(x + gaze[0], y + gaze[1] / 2, iris / 2, iris / 2), BLACK, 0.12)
        arch = y - p.brow_gap - 0.05 * raised - 0.04 * (1 - along**2) + side * along * p.brow_slope
        sketch.fill(stroke(x + along * p.eye_size * 1.25, arch, p.brow_width), p.hair * 0.7, 0.12)

    tip, half = p.nose_y, p.nose_width
    sketch.fill([(-0.03, p.eye_y + 0.1), (half, tip + 0.03), (-half, tip + 0.03)], p.skin * 0.93, 0.15)
    sketch.fill(oval(0, tip, half, 0.075), p.skin * 0.9, 0.2)
    for side in (-1, 1):
        sketch.fill(oval(side * half * 0.5, tip + 0.045, half * 0.22, 0.02), p.skin * 0.5, 0.2)

    half, bend = p.mouth_width * (1 + 0.12 * smile), p.mouth_y + 0.09 * smile * (0.4 - along**2)
    if p.beard:
        sketch.fill(stroke(along * half * 1.15, bend - p.lip - 0.07, 0.1), p.hair * 0.7 + p.skin * 0.2, 0.14)
    sketch.fill(stroke(along * half, bend, 2 * p.lip + opened * 2), p.lips, 0.12)
    sketch.fill(stroke(along * half * 0.9, bend, 0.025 + opened * 1.6), MOUTH, 0.12)

    if not p.bald:
        x = np.linspace(1, -1, 40)
        fringe = p.hairline + 0.18 * np.abs(x - p.parting) ** 1.5 + p.wave * np.sin(9 * x)
        fringe = np.maximum(fringe, -1) + 0.5 * x**6
        sketch.fill(np.vstack([crown(p), np.column_stack([x * p.width * p.volume, fringe])]), p.hair)
    corners = [(-half, bend[0]), (half, bend[-1])]
    return np.vstack([sketch.place(eyes, 0.12), sketch.place([(0, tip)], 0.2), sketch.place(corners, 0.12)])


def draw_disguise(sketch, p, rng):
    """Glasses in a fifth of the pictures, a quarter of them dark, or an object before chin or forehead in a tenth."""
    chance = rng.random()
    if chance < 0.2:
        for x in (-p.eye_gap, p.eye_gap):
            rim, glass = oval(x, p.eye_y, 0.27, 0.22), oval(x, p.eye_y, 0.24, 0.19)
            sketch.fill(rim if chance < 0.05 else np.vstack([rim, glass[::-1]]), BLACK, 0.14)
        sketch.fill(stroke(np.linspace(-0.1, 0.1, 6), np.full(6, p.eye_y), 0.05), BLACK, 0.14)
    elif chance < 0.3:
        x, y, tilt = rng.uniform(-0.7, 0.7), rng.choice([-0.7, 0.85]), rng.uniform(-0.5, 0.5)
        sketch.fill(oval(x, y, 0.55, 0.28, tilt), any_color(rng))


def any_color(rng):
    return rng.uniform(40, 210) + rng.normal(0, 40, 3)


def take_picture(person, rng):
    """A picture of a person, and the landmarks (5, 2) in it."""
    sketch = Sketch(rng)
    draw_head(sketch, person, rng)
    landmarks = draw_face(sketch, person, rng)
    draw_disguise(sketch, person, rng)
    pixels = np.asarray(sketch.image.reduce(SMOOTH), float)
    height, width = pixels.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    direction = rng.uniform(0, 2 * np.pi)
    light = rng.uniform(0.6, 1.2) + rng.uniform(0, 0.45) * (x * np.cos(direction) + y * np.sin(direction))
    pixels = pixels * light[..., None] * rng.uniform(0.85, 1.15, 3) + rng.normal(0, rng.uniform(1, 10), pixels.shape)
    landmarks += rng.normal(0, 0.02, (5, 2)) * sketch.zoom  # a detector is not exact either
    # Landmarks are counted from the middle of the first pixel.
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), (landmarks + 0.5) / SMOOTH - 0.5


def write_pairs(path, names, pictures, rng):
    """Pairs in the format of LFW: folds share no people, and each has as many genuine as impostor pairs."""
    number = min(PAIRS_PER_FOLD, PEOPLE_PER_FOLD * pictures * (pictures - 1) // 2)
    lines = [f"{FOLDS}\t{number}"]
    for first in range(0, len(names), PEOPLE_PER_FOLD):
        people = [[(name, picture) for picture in range(1, pictures + 1)] for name in names[first:][:PEOPLE_PER_FOLD]]
        same = [(*a, b[1]) for person in people for a, b in combinations(person, 2)]
        different = [(*a, *b) for one, other in combinations(people, 2) for a, b in product(one, other)]
        for pairs in (same, different):
            lines += ["\t".join(map(str, pairs[row])) for row in rng.choice(len(pairs), number, replace=False)]
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to make")
    parser.add_argument("--identities", type=int, default=120, help="people to train on (default: 120)")
    parser.add_argument("--pictures", type=int, default=12, help="pictures of each, at least two (default: 12)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.identities < 1 or args.pictures < 2 or args.seed < 0:
        parser.error("expected at least one identity, two pictures of each, and a seed that is not negative")

    everyone = args.identities + FOLDS * PEOPLE_PER_FOLD
    test_names = [f"Person_{number:03d}" for number in range(args.identities, everyone)]
    rows = [["path", *(f"{axis}{i}" for i in range(1, 6) for axis in "xy")]]
    for number in range(everyone):
        person = make_person(np.random.default_rng((args.seed, number)))
        for picture in range(1, args.pictures + 1):
            image, landmarks = take_picture(person, np.random.default_rng((args.seed, number, picture)))
            path = f"train/person_{number:03d}/{picture:03d}.jpg"
            if number >= args.identities:
                path = "lfw/{0}/{0}_{1:04d}.jpg".format(test_names[number - args.identities], picture)
            (args.output / path).parent.mkdir(parents=True, exist_ok=True)
            image.save(args.output / path, quality=90)
            rows.append([path, *(f"{value:.2f}" for value in landmarks.ravel())])
    with open(args.output / "landmarks.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    write_pairs(args.output / "lfw/pairs.txt", test_names, args.pictures, np.random.default_rng((args.seed, everyone)))
    print(f"{args.output}: {args.pictures} pictures each of {args.identities} people, and of {len(test_names)} others")


if __name__ == "__main__":
    main()
