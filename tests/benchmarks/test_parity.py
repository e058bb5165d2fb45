"""The comparison with other libraries' own code, on synthetic checkouts: it reports all differences and no others."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from forks import run_module
from torch import distributed

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("tyro")

from benchmarks.parity import insightface, pytorch_metric_learning, upstream
from benchmarks.parity.__main__ import main
from benchmarks.parity.pytorch_metric_learning import DTYPES_AS_THEIRS

TESTS = """
import unittest
import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from . import TEST_DTYPES

DTYPE = TEST_DTYPES[0]

class Test(unittest.TestCase):
    def setUp(self):
        self.loss_fn = ArcFaceLoss(num_classes=5, embedding_size=3)
        self.loss = self.loss_fn(torch.randn(4, 3, dtype=DTYPE), torch.arange(4))

    def test_both(self):
        self.assertGreater(self.loss.item(), 0)

    def test_neither(self):
        self.assertLess(self.loss.item(), 0)

    def test_dtype(self):
        self.assertEqual(self.loss_fn.W.dtype, DTYPE)
"""
ONCE = """
import unittest
from pytorch_metric_learning.regularizers import RegularFaceRegularizer

class Once(unittest.TestCase):
    def test(self):
        RegularFaceRegularizer()
"""
ONLY_THEIRS = """
    def test_only_theirs(self):
        self.assertTrue(type(self.loss_fn).__module__.startswith("pytorch_metric_learning"))
"""
PACKAGE = 'import os\nimport torch\nTEST_DTYPES = [getattr(torch, os.environ.get("TEST_DTYPES", "float64"))]\n'


def run(*arguments) -> tuple[dict, str]:
    """The report it wrote and its exit message."""
    output = Path(arguments[1]) / "result.json"
    try:
        main([*map(str, arguments), "--output", str(output)])
    except SystemExit as error:
        return json.loads(output.read_text()), str(error)
    return json.loads(output.read_text()), ""


@pytest.fixture
def forked(forks, monkeypatch):
    """Fork the processes of the comparison."""
    forks.preload("benchmarks.parity.pytorch_metric_learning", "benchmarks.parity.insightface")

    def run(command, *, cwd, env, **_):
        module, task = command[command.index("-m") + 1 :]
        process = forks.start(run_module, module, task, environment=env, directory=str(cwd))
        assert process.wait() == 0, process.output

    def spawn(work, arguments, nprocs):
        forks.run(work, [(rank, *arguments) for rank in range(nprocs)])

    monkeypatch.setattr(pytorch_metric_learning, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(insightface, "mp", SimpleNamespace(spawn=spawn))


@pytest.mark.parametrize("differs", [False, True])
def test_unit_tests_of_another_library(forked, tmp_path, differs):
    """Tests that pass with both, with neither, with theirs only, and with theirs only by an intended difference."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").write_text(PACKAGE)
    (tmp_path / "tests/test_margin.py").write_text(TESTS + (ONLY_THEIRS if differs else ""))
    (tmp_path / "tests/test_once.py").write_text(ONCE)
    (tmp_path / "tests/test_other.py").write_text("raise AssertionError('names none of the classes')\n")
    arguments = ["--seeds", 2, "--dtypes", "default", "float32"]
    report, complaint = run("pytorch-metric-learning", tmp_path, *arguments)
    assert {Path(file).stem for file in report["checkout"]["files"]} == {"__init__", "test_margin", "test_once"}
    passed, failed = ["passed"] * 2, ["failed"] * 2
    expected = {
        "both": {"theirs": passed, "ours": passed},
        "neither": {"theirs": failed, "ours": failed},
        "dtype": {"theirs": passed, "ours": failed, DTYPES_AS_THEIRS: passed},
    }
    if differs:
        expected["only_theirs"] = {"theirs": passed, "ours": failed, DTYPES_AS_THEIRS: failed}
    for dtypes in ("default", "float32"):
        if dtypes == "float32":
            expected["dtype"] = {"theirs": passed, "ours": passed}
        rows = report["settings"][dtypes]
        once = rows.pop("tests.test_once.Once.test", None)  # it does not use TEST_DTYPES
        assert (once is not None) == (dtypes == "default")
        names = {name: f"tests.test_margin.Test.test_{name}" for name in expected}
        assert set(rows) == set(names.values())
        for name, outcomes in expected.items():
            row = rows[names[name]]
            assert {whose: row[whose]["outcomes"] for whose in row} == outcomes
            assert row["ours"]["ours_took_part"] == ["ArcFaceLoss"] and row["theirs"]["ours_took_part"] == []
    (on_purpose,) = report["passed_with_theirs_and_not_with_ours_but_for_dtypes"]
    assert "test_dtype: AssertionError: torch.float32 != torch.float64 (tests/test_margin.py:" in on_purpose
    different = report["passed_with_theirs_and_not_with_ours"]
    assert [line.split(": ")[1] for line in different] == ["tests.test_margin.Test.test_only_theirs"] * (2 * differs)
    assert bool(complaint) == differs and all(line in complaint for line in different)


@pytest.mark.parametrize("processes", ["forked", pytest.param("started", marks=pytest.mark.slow)])
def test_file_that_only_the_other_library_can_import(request, tmp_path, processes):
    if processes == "forked":
        request.getfixturevalue("forked")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/__init__.py").write_text(PACKAGE)
    check = "\nassert ArcFaceLoss.__module__.startswith('pytorch_metric_learning')\n"
    (tmp_path / "tests/test_margin.py").write_text(TESTS + check)
    report, complaint = run("pytorch-metric-learning", tmp_path, "--seeds", 1, "--dtypes", "float32")
    assert len(report["passed_with_theirs_and_not_with_ours"]) == 2 and "cannot be imported" in complaint


def test_no_tests(tmp_path):
    with pytest.raises(ValueError, match="no test that names one of our classes"):
        main(["pytorch-metric-learning", str(tmp_path)])


PARTIAL_FC = """
import torch
from fused_margin.compat import insightface

class PartialFC_V2(insightface.PartialFC_V2):
    def forward(self, embeddings, labels):
        return super().forward(embeddings.cuda(), labels){0}
"""


@pytest.mark.skipif(not distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("change, values", [("", set()), (" + 1e-3", {"loss"}), (" * (1 + 1e-4)", None)])
def test_partial_fc_of_another_library(forked, tmp_path, change, values):
    """Our classes take the place of theirs: correct, with a wrong loss, and with a wrong loss and gradient."""
    folder = tmp_path / "recognition/arcface_torch"
    folder.mkdir(parents=True)
    (folder / "losses.py").write_text(
        "from fused_margin.compat.insightface import ArcFace, CombinedMarginLoss, CosFace\n"
    )
    (folder / "partial_fc_v2.py").write_text(PARTIAL_FC.format(change))
    sizes = ["--classes", 101, "--samples", 6, "--batches", 2, "--ranks", 2, "--sample-rates", 0.3]
    report, complaint = run("insightface", tmp_path, *sizes)
    cases = report["cases"]
    assert {case["losses"] for case in cases} == {"below the cap", "beyond the cap"} and len(cases) == 8
    assert all(case["same_classes_drawn"] and case["ranks"] == 2 for case in cases)
    differences = {line.split(": ")[1].split(" by")[0] for line in report["different"]}
    assert differences == ({"loss", "embedding_gradient", "weight_gradient"} if values is None else values)
    assert bool(complaint) == bool(differences)
    if change == " + 1e-3":  # losses beyond their cap are not compared
        assert not any("beyond the cap" in line for line in report["different"])


def test_files_of_a_checkout(tmp_path):
    def git(*arguments):
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *name, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder/file.py"
    file.write_text("x = 1\n")
    commits = {"folder/file.py": "abc"}
    assert upstream.provenance(tmp_path, [file], commits)["files"]["folder/file.py"]["commit"] == "abc"
    with pytest.raises(ValueError, match="other.py is not one of the files used: folder/file.py"):
        upstream.provenance(tmp_path, [file], {"other.py": "abc"})
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("no git")
    git("add", ".")
    git("commit", "-qm", "one")
    report = upstream.provenance(tmp_path, [file], {})
    assert report["commit"] == git("rev-parse", "HEAD") and report["modified"] == []
    assert report["files"]["folder/file.py"]["blob"] == git("hash-object", "folder/file.py")
    assert upstream.provenance(tmp_path / "folder", [file], {})["commit"] is None  # the repository contains the folder
    file.write_text("x = 2\n")
    assert upstream.provenance(tmp_path, [file], {})["modified"] == ["M folder/file.py"]
