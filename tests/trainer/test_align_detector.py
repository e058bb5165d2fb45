"""Alignment by a face detector: which face is aligned, what is listed, continuing, and the adapters of two packages."""

import csv
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import user_detectors
from PIL import Image

from fused_margin import cli
from fused_margin.trainer.align import detectors
from fused_margin.trainer.align.geometry import TEMPLATES, goodness_of_fit, similarity_transform

OURS = ("--detector", "user_detectors.Scenes")


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(user_detectors.Scenes, "seen", [])
    return user_detectors.Scenes.seen


@pytest.fixture
def photos(tmp_path):
    """A folder of photographs, by the width that `user_detectors.SCENES` knows."""
    folder = tmp_path / "photos"
    rng = np.random.default_rng(0)

    def add(**widths):
        for name, width in widths.items():
            file = folder / name.replace("__", "/")
            file = file.with_name(f"{file.name}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (150, width, 3), np.uint8)).save(file)
        return folder

    return add


def run(capsys, *arguments):
    code = cli.main(["align", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def listed(folder):
    with open(folder / "landmarks.csv", newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def faces_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_every_photograph_is_counted_and_listed(photos, tmp_path, capsys, seen):
    folder = photos(a__one=200, a__deep__several=201, none=202, tiny=203, border=204, mirrored=205, fails=206, out=208)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / ".hidden").mkdir()
    Image.new("RGB", (200, 150)).save(folder / ".hidden" / "one.png")
    (folder / "notes.txt").write_text("")
    code, out, err = run(capsys, folder, tmp_path / "out", *OURS)
    assert code == 0
    assert out.splitlines() == [
        "3 aligned, 0 already existed, 6 failed",
        "several faces: 1, face at the border: 2, no face: 1, tiny faces only: 1, unreadable: 1, failed otherwise: 3",
        "skipped: files ending in .txt (1), hidden or system files and folders (1)",
        f"list in {tmp_path / 'out' / 'landmarks.csv'}",
    ]
    for line in (
        "broken.jpg: cannot be read: it is damaged",
        "fails.png: the detector fails with RuntimeError: no memory for this",
        "mirrored.png: the points are not those of a face",
        "none.png: no face",
        "out.png: none of the points is in the upright image",
        "tiny.png: the largest face has 16 pixels (--min-size)",
    ):
        assert any(printed.startswith(line) for printed in err.splitlines()), line
    assert faces_in(tmp_path / "out") == ["a/deep/several.png", "a/one.png", "border.png"]
    assert len(seen) == 8

    rows = listed(tmp_path / "out")
    assert list(rows) == sorted(rows) and len(rows) == 9
    assert {path: (row["status"], row["faces"], row["tiny"], row["border"]) for path, row in rows.items()} == {
        "a/one.png": ("aligned", "1", "0", "0"),
        "a/deep/several.png": ("aligned", "4", "1", "0"),
        "border.png": ("aligned", "1", "0", "1"),
        "none.png": ("no face", "0", "0", "0"),
        "tiny.png": ("tiny", "1", "1", "0"),
        "mirrored.png": ("failed", "1", "0", "0"),
        "out.png": ("failed", "1", "0", "1"),
        "fails.png": ("failed", "0", "0", "0"),
        "broken.jpg": ("unreadable", "0", "0", "0"),
    }
    points, box, score = user_detectors.face(50, 30, 1)
    one = rows["a/one.png"]
    assert [float(one[name]) for name in ("left", "top", "right", "bottom", "score")] == [*box, score]
    shown = [float(one[f"{axis}{number}"]) for number in range(1, 6) for axis in "xy"]
    np.testing.assert_allclose(shown, points.ravel(), rtol=0, atol=0.005 + 1e-9)
    assert rows["none.png"]["x1"] == "" and "no memory" in rows["fails.png"]["reason"]


def test_the_list_aligns_the_same_faces(photos, tmp_path, capsys):
    folder = photos(a__one=200, several=201, none=202, border=204)
    assert run(capsys, folder, tmp_path / "first", *OURS)[0] == 0
    code, out, err = run(capsys, folder, tmp_path / "first" / "landmarks.csv", tmp_path / "second")
    assert code == 0 and "3 aligned, 0 already existed, 1 failed" in out and "none.png: it has no landmarks" in err
    for name in faces_in(tmp_path / "first"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.parametrize(("rule", "left"), [("largest", 100), ("center", 90), ("score", 10)])
def test_one_of_several_faces_is_selected(photos, tmp_path, capsys, rule, left):
    folder = photos(several=201)
    assert run(capsys, folder, *OURS, "--select", rule)[0] == 0
    assert float(listed(tmp_path / "photos-aligned")["several.png"]["left"]) == left


def test_unusable_results_fail_single_photographs(photos, tmp_path, capsys):
    """None is no face, as OpenCV returns it. A box with swapped edges is not a tiny face."""
    code, out, err = run(capsys, photos(one=200, none=209, nan=210, swapped=211), *OURS)
    assert code == 0 and "1 aligned, 0 already existed, 3 failed" in out and "no face: 1, failed otherwise: 2" in out
    for name in ("nan", "swapped"):
        assert f"{name}.png: the detector returns a face that is not finite, or whose box has swapped edges" in err
    statuses = {path: row["status"] for path, row in listed(tmp_path / "photos-aligned").items()}
    assert statuses == {"one.png": "aligned", "none.png": "no face", "nan.png": "failed", "swapped.png": "failed"}


def test_size_of_the_smallest_face(photos, tmp_path, capsys):
    folder = photos(several=201, tiny=203)
    code, out, _ = run(capsys, folder, *OURS, "--min-size", 60, "--size", "112x96")
    assert code == 0 and "several faces" not in out and "tiny faces only: 1" in out  # one of the four is large
    with Image.open(tmp_path / "photos-aligned" / "several.png") as face:
        assert face.size == (96, 112)
    assert "2 aligned" in run(capsys, folder, tmp_path / "other", *OURS, "--min-size", 0)[1]


def test_detector_sees_the_upright_photograph(photos, tmp_path, capsys, seen):
    folder = photos(sideways=200)
    with Image.open(folder / "sideways.png") as image:
        upright = image.copy()
    exif = upright.getexif()
    exif[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "sideways.png", exif=exif)
    upright.convert("L").save(folder / "gray.png")
    upright.save(folder / "upright.png")
    assert run(capsys, folder, *OURS)[0] == 0
    assert seen == [(150, 200, 3)] * 3
    aligned = tmp_path / "photos-aligned"
    faces = {name: np.asarray(Image.open(aligned / f"{name}.png")) for name in ("sideways", "upright", "gray")}
    np.testing.assert_array_equal(faces["sideways"], faces["upright"])
    assert faces["gray"].ndim == 2


def test_interrupted_alignment_continues(photos, tmp_path, capsys, seen, monkeypatch):
    names = {f"p{number}": 200 + number % 3 for number in range(9)}
    folder, once, twice = photos(**names), tmp_path / "once", tmp_path / "twice"
    complete = run(capsys, folder, once, *OURS)
    with monkeypatch.context() as patch:
        patch.setitem(user_detectors.SCENES, 202, KeyboardInterrupt())
        code, out, _ = run(capsys, folder, twice, *OURS, "--workers", 1)
    assert code == 130 and "interrupted; the same command continues" in out
    done = faces_in(twice)
    assert done[:2] == ["p0.png", "p1.png"] and set(done) <= set(listed(twice))
    seen.clear()
    code, out, err = run(capsys, folder, twice, *OURS)
    assert code == 0 and f"{6 - len(done)} aligned, {len(done)} already existed, 3 failed" in out
    assert len(seen) == 9 - len(done)
    assert (once / "landmarks.csv").read_bytes() == (twice / "landmarks.csv").read_bytes()
    assert (out.splitlines()[1], err) == (complete[1].splitlines()[1], complete[2])


def test_list_of_a_killed_process_is_repaired(photos, tmp_path, capsys):
    folder, out = photos(a=200, b=201), tmp_path / "out"
    run(capsys, folder, out, *OURS)
    complete = (out / "landmarks.csv").read_bytes()
    heading, a, b = complete.splitlines(keepends=True)
    (out / "landmarks.csv").write_bytes(b"".join([heading, a.replace(b"aligned", b"failed"), a, b[:40]]))
    (out / "b.png").unlink()
    assert "1 aligned, 1 already existed" in run(capsys, folder, out, *OURS)[1]
    assert (out / "landmarks.csv").read_bytes() == complete


def test_faces_from_elsewhere_are_kept(photos, tmp_path, capsys, seen):
    folder, out = photos(a=200, b=200), tmp_path / "out"
    out.mkdir()
    (out / "a.png").write_bytes(b"made before")
    assert "1 aligned, 1 already existed, 0 failed" in run(capsys, folder, out, *OURS)[1]
    assert (out / "a.png").read_bytes() == b"made before" and len(seen) == 1
    assert {path: row["status"] for path, row in listed(out).items()} == {"a.png": "existed", "b.png": "aligned"}


def test_folder_links_do_not_repeat(photos, tmp_path, capsys, seen):
    folder = photos(a__one=200)
    (folder / "a" / "again").symlink_to(folder, target_is_directory=True)
    assert "1 aligned, 0 already existed, 0 failed" in run(capsys, folder, *OURS)[1] and len(seen) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mtcn", "expected mtcnn, yunet or package.module.factory, got 'mtcn'; did you mean 'mtcnn'?"),
        ("no_such_package.f", "no module 'no_such_package'"),
        ("user_detectors.absent", "user_detectors has no 'absent'"),
        ("user_detectors.not_a_detector", "to return a callable, got int"),
        ("user_detectors.Scenes rate=1", "user_detectors.Scenes(rate=1) failed: TypeError"),
        ("user_detectors.unknown_model name=x", "user_detectors.unknown_model(name='x') failed: KeyError: 'x'"),
        ("user_detectors.other_results result=pair", "to return faces (landmarks, box, score)"),
        ("user_detectors.other_results result='four points'", "landmarks (4, 2), box (4,)"),
    ],
)
def test_invalid_detectors(photos, tmp_path, capsys, name, message):
    name, *options = name.split(" ", 1)
    code, _, err = run(capsys, photos(one=200), "--detector", name, "--detector-options", *options)
    assert code == 1 and err.startswith("error: detector: ") and message in err
    assert not list((tmp_path / "photos-aligned").glob("*.png"))


def test_invalid_options(photos, tmp_path, capsys):
    folder = photos(one=200)
    for arguments, message in (
        ([folder], "name a file of them, or a --detector"),
        ([folder, "landmarks.csv", "out", *OURS], "leave out the file, or the detector"),
        ([folder, "landmarks.csv", "out", "--detector-options", "a=1"], "detector_options need a --detector"),
        ([folder, folder / "aligned", *OURS], "would be among the photographs"),
        ([folder, folder, *OURS], "would replace the photographs"),
        ([folder, *OURS, "--min-size", "-1"], "min_size must not be negative"),
        ([folder, "landmarks.csv", "--min-size", "5"], "min_size needs a --detector"),
        ([folder, "landmarks.csv", "--select", "score"], "select needs a --detector"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["align", *map(str, arguments)])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "landmarks.csv").write_text("path,x1\n")
    assert "is not a list of photographs that --detector wrote" in run(capsys, folder, tmp_path / "out", *OURS)[2]
    assert (tmp_path / "out" / "landmarks.csv").read_text() == "path,x1\n"
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    code, _, err = run(capsys, tmp_path / "empty", *OURS)
    assert code == 1 and "no photographs in" in err and "files ending in .txt (1)" in err
    assert "or a --detector that finds them" in run(capsys, folder, tmp_path / "aligned")[2]
    assert not (tmp_path / "empty-aligned").exists()


def test_mtcnn_is_given_the_options_and_the_image(monkeypatch):
    class MTCNN:
        def __init__(self, min_face_size=20, device=None):
            assert device != "cuda", "Torch not compiled with CUDA enabled"
            self.min_face_size, self.device = min_face_size, device

        def detect(self, image, landmarks):
            calls.append((self.device, image.shape, landmarks))
            if image.max() == 0:
                return None, [None], None
            boxes = np.array([[1, 2, 31, 42], [3, 4, 5, 6]], dtype=object)
            return boxes, np.array([0.75, 0.5], dtype=object), np.arange(20.0).reshape(2, 5, 2).astype(object)

    calls: list[tuple] = []
    module = ModuleType("facenet_pytorch")
    module.MTCNN = MTCNN
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    detect = detectors.make_detector("mtcnn", {"min_face_size": 40, "device": "cpu"})
    first, second = detectors.to_faces(detect(np.ones((40, 50, 3), np.uint8)), "mtcnn")
    assert (first.box.tolist(), first.score) == ([1, 2, 31, 42], 0.75)
    assert second.landmarks.tolist() == np.arange(10.0, 20).reshape(5, 2).tolist()
    assert detectors.to_faces(detect(np.zeros((40, 50, 3), np.uint8)), "mtcnn") == []
    assert list(detect(np.ones((39, 50, 3), np.uint8))) == []  # MTCNN refuses an image below its smallest face
    assert calls == [("cpu", (40, 50, 3), True)] * 2
    for options, message in (({"size": 3}, "'size'"), ({"device": "cuda"}, "not compiled with CUDA")):
        with pytest.raises(detectors.DetectorError, match=f"mtcnn refuses the options: .*{message}"):
            detectors.make_detector("mtcnn", options)


def test_yunet_is_given_bgr_and_the_size(monkeypatch, tmp_path):
    class Network:
        def setInputSize(self, size):
            calls.append(size)

        def detect(self, image):
            calls.append(image[0, 0].tolist())
            row = [10, 20, 30, 40, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0.5]
            return 1, np.array([row], np.float32) if image.any() else None

    def create(*arguments, **options):
        calls.append((arguments, options))
        if "size" in options:
            raise module.error("bad\nargument")
        return Network()

    calls: list = []
    module = ModuleType("cv2")
    module.error = type("error", (Exception,), {})
    module.FaceDetectorYN = SimpleNamespace(create=create)
    monkeypatch.setitem(sys.modules, "cv2", module)
    model = tmp_path / "yunet.onnx"
    model.touch()
    detect = detectors.make_detector("yunet", {"model": str(model), "score_threshold": 0.6})
    (face,) = detectors.to_faces(detect(np.full((48, 64, 3), (1, 2, 3), np.uint8)), "yunet")
    assert (face.box.tolist(), face.score) == ([10, 20, 40, 60], 0.5)
    assert face.landmarks.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    assert calls == [((str(model), "", (320, 320)), {"score_threshold": 0.6}), (64, 48), [3, 2, 1]]
    assert detectors.to_faces(detect(np.zeros((48, 64, 3), np.uint8)), "yunet") == []
    for options, message in (
        ({}, "yunet needs a model: --detector-options model="),
        ({"model": str(tmp_path / "absent.onnx")}, "yunet: no file"),
        ({"model": str(model), "size": 3}, "yunet cannot be made from .*bad"),
    ):
        with pytest.raises(detectors.DetectorError, match=message):
            detectors.make_detector("yunet", options)


def test_missing_packages_are_named_with_a_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(detectors.DetectorError, match="is not installed: pip install --no-deps facenet-pytorch, and"):
        detectors.make_detector("mtcnn", {})
    (tmp_path / "yunet.onnx").touch()
    with pytest.raises(
        detectors.DetectorError, match="cv2, which is not installed: pip install opencv-python-headless"
    ):
        detectors.make_detector("yunet", {"model": str(tmp_path / "yunet.onnx")})
    monkeypatch.delitem(sys.modules, "facenet_pytorch")
    (tmp_path / "facenet_pytorch.py").write_text("import torchvision_of_another_torch")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(detectors.DetectorError, match="cannot be imported: No module named 'torchvision_of_another"):
        detectors.make_detector("mtcnn", {})


def is_face(landmarks):
    template = TEMPLATES["112x112"].points
    return goodness_of_fit(landmarks, template, similarity_transform(landmarks, template))


@pytest.mark.slow
def test_mtcnn_on_a_photograph(tmp_path, capsys):
    """The portrait of an astronaut, whose eyes and mouth corners are where one sees them."""
    pytest.importorskip("facenet_pytorch", exc_type=ImportError)
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut())
    (tmp_path / "photos").mkdir()
    photo.save(tmp_path / "photos" / "astronaut.png")
    Image.fromarray(data.coffee()).save(tmp_path / "photos" / "coffee.png")
    photo.crop((200, 60, 512, 400)).save(tmp_path / "photos" / "cut-off.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / "eight.png")
    code, out, _ = run(capsys, tmp_path / "photos", "--detector", "mtcnn")
    assert code == 0 and "2 aligned" in out and "face at the border: 1, no face: 2" in out
    row = listed(tmp_path / "photos-aligned")["astronaut.png"]
    landmarks = np.array([[float(row[f"{axis}{number}"]) for axis in "xy"] for number in range(1, 6)])
    expected = [[205, 102], [247, 104], [225, 129], [202, 139], [245, 142]]
    np.testing.assert_allclose(landmarks, expected, rtol=0, atol=3)
    assert is_face(landmarks) > 0.95 and float(row["score"]) > 0.99


@pytest.mark.slow
def test_yunet_of_opencv(tmp_path):
    """A network with YuNet's twelve outputs, which are constant, in place of its weights."""
    pytest.importorskip("cv2")
    onnx = pytest.importorskip("onnx")
    cell, (width, height) = {"cls": [0.81], "obj": [1], "bbox": [0.5, 0.25, np.log(2), np.log(3)]}, (64, 32)
    cell["kps"] = [-1, -1, 1, -1, 0, 0, -0.5, 1, 0.5, 1]  # in cells of 8 pixels, from the corner of the cell
    make, nodes, tensors, outputs = onnx.helper, [], [], []
    nodes.append(make.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2, 3], keepdims=0))
    nodes.append(make.make_node("Mul", ["mean", "zero"], ["nothing"]))
    tensors.append(onnx.numpy_helper.from_array(np.zeros(1, np.float32), "zero"))
    for name, values in cell.items():
        for stride in (8, 16, 32):
            constant = np.zeros((1, height // stride * (width // stride), len(values)), np.float32)
            if stride == 8:
                constant[0, 2 * width // 8 + 3] = values  # row 2, column 3
            tensors.append(onnx.numpy_helper.from_array(constant, f"constant_{name}_{stride}"))
            nodes.append(make.make_node("Add", [f"constant_{name}_{stride}", "nothing"], [f"{name}_{stride}"]))
            outputs.append(make.make_tensor_value_info(f"{name}_{stride}", onnx.TensorProto.FLOAT, constant.shape))
    image = make.make_tensor_value_info("input", onnx.TensorProto.FLOAT, (1, 3, height, width))
    graph = make.make_graph(nodes, "yunet", [image], outputs, tensors)
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 11)])
    model.ir_version = 8
    onnx.save(model, tmp_path / "yunet.onnx")
    detect = detectors.make_detector("yunet", {"model": str(tmp_path / "yunet.onnx"), "score_threshold": 0.5})
    (face,) = detectors.to_faces(detect(np.zeros((height, width, 3), np.uint8)), "yunet")
    assert face.box.tolist() == [20, 6, 36, 30] and face.score == pytest.approx(0.9)  # the root of 0.81 times 1
    assert face.landmarks.tolist() == [[16, 8], [32, 8], [24, 16], [20, 24], [28, 24]]
    with pytest.raises(detectors.DetectorError, match="cannot be made from"):
        (tmp_path / "yunet.onnx").write_bytes(b"no network")
        detectors.make_detector("yunet", {"model": str(tmp_path / "yunet.onnx")})
