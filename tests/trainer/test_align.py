"""Alignment: the transform against SVD and known cases, the warp to half a pixel, the command on files."""

import json

import numpy as np
import pytest
from PIL import Image

from fused_margin import cli
from fused_margin.trainer.align.geometry import TEMPLATES, goodness_of_fit, similarity_transform, warp

EVERY_TEMPLATE = pytest.mark.parametrize("name", list(TEMPLATES))


def similarity(degrees, scale, shift):
    angle = np.deg2rad(degrees)
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([linear, shift])


def moved(matrix, points):
    return points @ matrix[:, :2].T + matrix[:, 2]


def umeyama(points, target):
    """The published algorithm, by SVD, with the sign that excludes reflections."""
    a, b = points - points.mean(0), target - target.mean(0)
    u, singular, v = np.linalg.svd(b.T @ a / len(a))
    sign = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    linear = (singular * sign).sum() / a.var(0).sum() * (u * sign) @ v
    return np.column_stack([linear, target.mean(0) - linear @ points.mean(0)])


@EVERY_TEMPLATE
@pytest.mark.parametrize("degrees", [0, 20, -75, 180])
def test_known_similarity_is_recovered(name, degrees):
    template = TEMPLATES[name].points
    known = similarity(degrees, 3.7, (210.5, -40.25))
    back = similarity_transform(moved(known, template), template)
    np.testing.assert_allclose(moved(back, moved(known, template)), template, rtol=0, atol=1e-9)
    np.testing.assert_allclose(similarity_transform(template, moved(known, template)), known, rtol=0, atol=1e-9)
    assert goodness_of_fit(moved(known, template), template, back) == pytest.approx(1)


def test_least_squares_matches_umeyama():
    rng = np.random.default_rng(0)
    for template in (template.points for template in TEMPLATES.values()):
        for noise in (1, 10, 100):
            points = template + rng.normal(0, noise, (5, 2))
            np.testing.assert_allclose(
                similarity_transform(points, template), umeyama(points, template), rtol=0, atol=1e-9
            )


@EVERY_TEMPLATE
def test_reflections_are_never_returned(name):
    template = TEMPLATES[name].points
    mirrored = template * [-1, 1]
    matrix = similarity_transform(mirrored, template)
    assert np.linalg.det(matrix[:, :2]) > 0
    np.testing.assert_allclose(matrix, umeyama(mirrored, template), rtol=0, atol=1e-9)
    assert goodness_of_fit(mirrored, template, matrix) < 0.2
    from_the_side = template * [0, 1]  # a profile fits better than exchanged landmarks
    assert goodness_of_fit(from_the_side, template, similarity_transform(from_the_side, template)) > 0.55


def test_degenerate_points():
    template = TEMPLATES["112x112"].points
    with pytest.raises(ValueError, match="no unique similarity"):
        similarity_transform(np.full((5, 2), 3.0), template)
    with pytest.raises(ValueError, match="no unique similarity"):
        similarity_transform(template, np.zeros((5, 2)))


def centroid(pixels, near):
    """The centroid of the brightness within six pixels of a point."""
    rows, columns = np.indices(pixels.shape)
    weight = pixels * (np.hypot(columns - near[0], rows - near[1]) < 6)
    return np.array([(columns * weight).sum(), (rows * weight).sum()]) / weight.sum()


def draw_face(points, size):
    """Draw white dots with soft edges at exact positions."""
    height, width = size
    rows, columns = np.indices((height, width))
    light = sum(np.clip(6 - np.hypot(columns - x, rows - y), 0, 1) for x, y in points)
    return Image.fromarray((255 * light).astype(np.uint8))


@EVERY_TEMPLATE
@pytest.mark.parametrize("degrees", [0, 12, -40])
def test_drawn_dots_land_on_the_template(name, degrees):
    size, template = TEMPLATES[name]
    points = moved(similarity(degrees, 1.9, (60, 70)), template)
    face = warp(draw_face(points, (420, 420)), similarity_transform(points, template), size)
    assert face.size == size[::-1]
    pixels = np.asarray(face, float)
    errors = [np.hypot(*(centroid(pixels, point) - point)) for point in template]
    assert max(errors) < 0.1  # confusing pixel corners with pixel centers would give half a pixel


def test_identity_keeps_every_pixel():
    pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    identity = np.eye(2, 3)
    np.testing.assert_array_equal(np.asarray(warp(Image.fromarray(pixels), identity, (112, 112))), pixels)
    shifted = np.asarray(warp(Image.fromarray(pixels), identity + [[0, 0, 5], [0, 0, 3]], (112, 112)))
    np.testing.assert_array_equal(shifted[3:, 5:], pixels[:-3, :-5])
    assert not shifted[:3].any() and not shifted[:, :5].any()


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    """Three photographs in a folder tree, and their landmarks by path."""
    monkeypatch.setenv("COLUMNS", "200")
    template = TEMPLATES["112x112"].points
    landmarks = {}
    for number, path in enumerate(["anna/1.png", "anna/2.jpg", "b b/deep/3.png"]):
        points = moved(similarity(10 * number, 1.5, (70, 50)), template)
        file = tmp_path / "photos" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_face(points, (300, 300)).save(file)
        landmarks[path] = points.tolist()
    return tmp_path / "photos", landmarks


def write_csv(path, landmarks, heading=True):
    lines = ["path,x1,y1,x2,y2,x3,y3,x4,y4,x5,y5"] if heading else []
    lines += [
        ",".join([f'"{name}"', *(str(v) for point in points for v in point)]) for name, points in landmarks.items()
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run(capsys, *arguments):
    code = cli.main(["align", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize("kind", ["csv", "csv without heading", "json", "flat json"])
@EVERY_TEMPLATE
def test_folder_tree_is_aligned(photographs, tmp_path, capsys, kind, name):
    images, landmarks = photographs
    if "csv" in kind:
        file = write_csv(tmp_path / "landmarks.csv", landmarks, heading=kind == "csv")
    else:
        flat = {path: np.ravel(points).tolist() for path, points in landmarks.items()}
        file = tmp_path / "landmarks.json"
        file.write_text(json.dumps(flat if "flat" in kind else landmarks))
    code, out, err = run(capsys, images, file, tmp_path / "out", "--size", name)
    assert (code, err) == (0, "") and "3 aligned, 0 already existed, 0 failed" in out
    written = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert written == sorted(landmarks)
    size, template = TEMPLATES[name]
    for path in landmarks:
        with Image.open(tmp_path / "out" / path) as face:
            assert face.size == size[::-1]
            pixels = np.asarray(face.convert("L"), float)
        for point in template:
            assert np.hypot(*(centroid(pixels, point) - point)) < 0.5


def test_heading_names_columns_in_any_order(photographs, tmp_path, capsys):
    images, landmarks = photographs
    names = ["y5", "x5", "y4", "x4", "y3", "x3", "y2", "x2", "score", "y1", "x1", "path", "note"]
    lines = [",".join(names)]
    for path, points in landmarks.items():
        row = {
            f"{axis}{n}": value for n, point in enumerate(points, 1) for axis, value in zip("xy", point, strict=True)
        }
        lines.append(",".join(str({**row, "path": path, "score": 0.9, "note": "good"}[name]) for name in names))
    lines += ["," * 11 + "none.png,", "," * 9 + "1,2,short.png"]
    (tmp_path / "landmarks.csv").write_text("\n".join(lines))
    plain = write_csv(tmp_path / "plain.csv", landmarks)
    code, out, err = run(capsys, images, tmp_path / "landmarks.csv", tmp_path / "out")
    assert code == 0 and "3 aligned, 0 already existed, 2 failed" in out
    assert "line 5: none.png: it has no landmarks" in err and "line 6: short.png: expected ten numbers" in err
    assert run(capsys, images, plain, tmp_path / "plain")[0] == 0
    for path in landmarks:
        assert (tmp_path / "out" / path).read_bytes() == (tmp_path / "plain" / path).read_bytes()


def test_existing_outputs_are_kept(photographs, tmp_path, capsys):
    images, landmarks = photographs
    file, out = write_csv(tmp_path / "landmarks.csv", landmarks), tmp_path / "out"
    (out / "anna").mkdir(parents=True)
    (out / "anna" / "1.png").write_bytes(b"made before")
    assert "2 aligned, 1 already existed" in run(capsys, images, file, out)[1]
    assert (out / "anna" / "1.png").read_bytes() == b"made before"
    code, printed, _ = run(capsys, images, file, out)
    assert code == 0 and "0 aligned, 3 already existed" in printed


def test_existing_outputs_of_another_size_are_errors(photographs, tmp_path, capsys):
    images, landmarks = photographs
    file, out = write_csv(tmp_path / "landmarks.csv", landmarks), tmp_path / "out"
    assert run(capsys, images, file, out)[0] == 0
    code, _, err = run(capsys, images, file, out, "--size", "112x96")
    assert code == 1 and f"{out / 'anna' / '1.png'} is 112x112, not 112x96: name another output folder" in err
    for path in landmarks:
        with Image.open(out / path) as face:
            assert face.size == (112, 112)


def test_points_outside_the_picture_are_errors(photographs, tmp_path, capsys):
    images, landmarks = photographs
    inside = np.array(landmarks["anna/1.png"])
    for name, points in (
        ("outside.png", inside + 500),
        ("cut-off.png", inside - [inside[:, 0].max(), 0]),  # one point is at the left edge, the others outside
    ):
        (images / name).write_bytes((images / "anna/1.png").read_bytes())
        landmarks[name] = points.tolist()
    file, out = write_csv(tmp_path / "landmarks.csv", landmarks), tmp_path / "out"
    code, printed, err = run(capsys, images, file, out)
    assert code == 0 and "4 aligned, 0 already existed, 1 failed" in printed
    assert "outside.png: none of the points is in the upright image, which is 300 wide and 300 high" in err
    assert not (out / "outside.png").exists()


def test_names_are_printed_unchanged(photographs, tmp_path, capsys):
    images, landmarks = photographs
    landmarks["x[/b] :cat:.png"] = landmarks["anna/1.png"]
    file = write_csv(tmp_path / "a [old].csv", landmarks)
    code, printed, err = run(capsys, images, file, tmp_path / "out")
    assert code == 0 and "3 aligned" in printed
    assert f"{file}, line 5: x[/b] :cat:.png: cannot be read: No such file or directory" in err


def test_bad_rows_are_reported_and_the_others_aligned(photographs, tmp_path, capsys):
    images, landmarks = photographs
    good = "anna/1.png"
    numbers = [str(v) for point in landmarks[good] for v in point]
    mirrored = [str(v) for x, y in landmarks[good] for v in (300 - x, y)]
    (images / "broken.png").write_bytes((images / good).read_bytes()[:200])
    (images / "text.png").write_text("not an image")
    rows = [
        [good, *numbers],
        ["anna/2.jpg", *numbers[:9]],
        ["anna/2.jpg", *numbers],
        ["absent.png", *numbers],
        ["broken.png", *numbers],
        ["text.png", *numbers],
        ["../photos/anna/1.png", *numbers],
        ["notes.txt", *numbers],
        ["word.png", *numbers[:9], "left"],
        ["nan.png", *numbers[:9], "nan"],
        ["one-point.png", *["7"] * 10],
        ["mirrored.png", *mirrored],
        ["b b/deep/3.png", *(str(v) for point in landmarks["b b/deep/3.png"] for v in point)],
    ]
    file = tmp_path / "landmarks.csv"
    file.write_text("\n".join(map(",".join, rows)))
    code, out, err = run(capsys, images, file, tmp_path / "out", "--workers", "2")
    assert code == 0 and "2 aligned, 0 already existed, 11 failed" in out
    printed = err.splitlines()
    assert len(printed) == 11
    for line, words in {
        2: "anna/2.jpg: expected ten numbers, x and y of five points, got",
        3: "anna/2.jpg: it has landmarks already",
        4: "absent.png: cannot be read",
        5: "broken.png: cannot be read",
        6: "text.png: cannot be read",
        7: "../photos/anna/1.png: the path leaves the folder",
        8: "notes.txt: expected an image ending in",
        9: "word.png: expected ten numbers",
        10: "nan.png: expected ten numbers",
        11: "one-point.png: no unique similarity transform fits",
        12: "mirrored.png: the points are not those of a face",
    }.items():
        assert any(entry.startswith(f"{file}, line {line}: {words}") for entry in printed), words
    assert sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file()) == ["1.png", "3.png"]


@pytest.mark.parametrize(("orientation", "stored"), [(3, "ROTATE_180"), (6, "ROTATE_90"), (8, "ROTATE_270")])
def test_landmarks_refer_to_the_upright_picture(photographs, tmp_path, capsys, orientation, stored):
    images, landmarks = photographs
    with Image.open(images / "anna/1.png") as image:
        exif = image.getexif()
        exif[0x112] = orientation
        image.transpose(Image.Transpose[stored]).save(images / "anna/1.png", exif=exif)
    file = write_csv(tmp_path / "landmarks.csv", {"anna/1.png": landmarks["anna/1.png"]})
    assert run(capsys, images, file, tmp_path / "out")[0] == 0
    with Image.open(tmp_path / "out/anna/1.png") as face:
        assert face.getexif().get(0x112, 1) == 1
        pixels = np.asarray(face.convert("L"), float)
    for point in TEMPLATES["112x112"].points:
        assert np.hypot(*(centroid(pixels, point) - point)) < 0.5


def test_help_names_the_picture_that_landmarks_refer_to(capsys):
    with pytest.raises(SystemExit):
        cli.main(["align", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "upright image" in printed and "EXIF orientation" in printed


def test_errors_before_alignment(photographs, tmp_path, capsys):
    images, landmarks = photographs
    file = write_csv(tmp_path / "landmarks.csv", landmarks)
    for content in ("[1]", "{", '{"a.png": '):
        (tmp_path / "bad.json").write_text(content)
        code, _, err = run(capsys, images, tmp_path / "bad.json", tmp_path / "out")
        assert code == 1 and "bad.json" in err
    for name, content in (("a.csv", b""), ("b.csv", b"path,x1,y1\n"), ("c.json", b"{}")):
        (tmp_path / name).write_bytes(content)
        code, _, err = run(capsys, images, tmp_path / name, tmp_path / "out")
        assert code == 1 and f"error: {tmp_path / name} has no landmarks" in err
    (tmp_path / "bad.csv").write_bytes(file.read_text().encode("utf-16"))
    assert "bad.csv is not UTF-8 text" in run(capsys, images, tmp_path / "bad.csv", tmp_path / "out")[2]
    assert "expected landmarks in a .csv or .json" in run(capsys, images, images / "anna/1.png", tmp_path / "out")[2]
    assert run(capsys, images, tmp_path / "absent.csv", tmp_path / "out")[0] == 1
    (tmp_path / "none.json").write_text('{"anna/1.png": null}')
    code, out, err = run(capsys, images, tmp_path / "none.json", tmp_path / "out")
    assert (
        code == 1 and "0 aligned" in out and "anna/1.png: expected ten numbers, x and y of five points, got None" in err
    )
    for arguments, message in (
        ((tmp_path / "nowhere", file, tmp_path / "out"), "no folder"),
        ((images, file, images), "name another folder"),
        ((images, file, tmp_path / "out", "--workers", "0"), "workers must be at least 1"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["align", *map(str, arguments)])
        assert exit_.value.code == 2
        streams = capsys.readouterr()
        assert message in " ".join((streams.out + streams.err).split())
    assert not (tmp_path / "out").exists()
