"""The study of whole steps on tiny problems: times, memory, targets, the picture and the published block."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("tyro")

from benchmarks.comparison import tables, targets
from benchmarks.head import command, documents, results
from benchmarks.head.command import main
from benchmarks.head.results import Study
from benchmarks.publish import __main__ as publish
from fused_margin.benchmark import heads, measure, peak_memory, timing
from fused_margin.benchmark.heads import Phases
from fused_margin.benchmark.losses import lean_arcface
from fused_margin.benchmark.peak_memory import Peak
from fused_margin.benchmark.problems import Shape
from fused_margin.benchmark.results import Problem, Row, held_per_class, partialfc_bytes

TINY = ["--classes", "200", "--size", "16", "--rounds", "3", "--warmup", "1", "--threads", "1"]
UNCOMPILED = heads.Comparison(modes=())
EAGER = [each.name for each in heads.contestants(UNCOMPILED)]


def run(path: Path, *arguments: str) -> dict[str, Any]:
    main([*TINY, *arguments, "--output", str(path)])
    return json.loads(path.read_text())


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "measure_apart", lambda _, job: Peak(1 << 20, held=200 * 16 * 8))


@pytest.mark.usefixtures("no_processes")
def test_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path / "a-head.json", "--samples", "8", "16", "--no-compiled")
    assert content["complete"] and content["study"] == documents.COMPARISON
    assert content["hardware"]["cpu"] and content["versions"]["torch"] and content["threads"] == 1
    assert content["command"].startswith("python -m benchmarks head --classes 200 --size 16")
    assert content["step_in_backward_difference"] <= results.EXACT
    assert [problem["shape"]["rows"] for problem in content["problems"]] == [8, 16]
    for problem in content["problems"]:
        assert [row["name"] for row in problem["contestants"]] == EAGER
        for row in [*problem["contestants"], problem["forward + backward alone"]]:
            assert row["failure"] is None and len(row["rounds"]) == 3
            for times in [*row["rounds"], row["median"]]:
                assert min(times.values()) >= 0
                assert times["forward"] + times["backward"] + times["optimizer"] == pytest.approx(times["whole"])
            assert row["median"]["whole"] == sorted(times["whole"] for times in row["rounds"])[1]
        assert all(row["loss_error"] < 1e-5 and row["peak_bytes"] for row in problem["contestants"])
    assert {name: len(each["seconds"]) for name, each in content["optimizers"].items()} == dict.fromkeys(
        (results.PROJECTED, results.FUSED, results.THEN_PROJECTED), 3
    )
    assert content["counted_bytes_per_class"] == {"float32": 8 * 16, "bfloat16": 4 * 16}
    goals = [target["goal"] for target in content["targets"]]
    assert len(goals) == 6 and not any("torch.compile" in goal for goal in goals)  # not measured here
    assert (tmp_path / "a-head.png").stat().st_size > 10_000
    output = capsys.readouterr().out
    assert all(name in output for name in (*EAGER, heads.ALONE, "bytes per class", "ProjectedSGD.step", "targets"))


@pytest.mark.slow
def test_many_classes(tmp_path: Path) -> None:
    content = run(tmp_path / "b-head.json", "--samples", "8", "--dtype", "bfloat16", "--ours-only")
    assert content["study"] == documents.MANY and content["dtype"] == "bfloat16"
    assert [step["warmup"] for step in content["steps"]] == [True, False, False, False]
    for step in content["steps"]:
        assert step["forward"] + step["backward"] + step["optimizer"] == pytest.approx(step["seconds"])
    assert content["steps"][-1]["loss"] < content["steps"][0]["loss"]
    assert content["weight_bytes"] == content["momentum_bytes"] == 2 * 200 * 16
    assert content["counted_bytes_per_class"] == 4 * 16
    assert all(target["met"] for target in content["targets"])


@pytest.mark.slow
@pytest.mark.usefixtures("no_processes")
def test_results_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "draw", lambda problems, path, machine: path.touch())
    assert documents.block() == documents.NO_RESULT
    run(tmp_path / "a-head.json", "--samples", "8", "--no-compiled")
    run(tmp_path / "a-head-many.json", "--samples", "8", "--dtype", "bfloat16", "--ours-only")
    unfinished = json.loads((tmp_path / "a-head.json").read_text()) | {"complete": False, "date": "2999"}
    (tmp_path / "z-head.json").write_text(json.dumps(unfinished))
    text = publish.documents(None)[documents.README]
    assert "[a-head.json](../results/a-head.json): C = 200" in text
    assert "![Time and memory of one step](../results/a-head.png)" in text
    assert text.count("| 8 | ") == len(EAGER) and "| 8 | ours, step in backward | " in text
    assert "[a-head-many.json](../results/a-head-many.json): 200 classes" in text and "z-head" not in text


@pytest.mark.slow
def test_memory_of_steps() -> None:
    """A stored gradient is part of the peak; class weights and momentum are what stays."""
    shape = Shape(8, 64, 40_000)
    matrix = 4 * shape.classes * shape.dim
    peaks = {}
    for name, variant in ((heads.IN_BACKWARD, "workspace_mb=256"), (heads.EAGER.format("ArcFace"), "write")):
        peaks[name] = peak_memory.measure_apart(
            measure.peak_of_steps, measure.HeadJob(name, variant, shape, "cpu", 1, UNCOMPILED)
        )
        assert peaks[name].failure is None
        assert peaks[name].held == pytest.approx(2 * matrix, rel=0.1)
    assert peaks[heads.EAGER.format("ArcFace")].bytes > 2 * matrix  # the gradient and the normalized weights
    assert peaks[heads.IN_BACKWARD].bytes < targets.memory_bound(shape)


def test_wrong_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = heads.contestants(UNCOMPILED)
    wrong = heads._peer(lambda embeddings, weight, labels: 1.001 * lean_arcface(embeddings, weight, labels))
    listed[-1] = heads.Contestant("wrong", "arcface", {"one": wrong})
    monkeypatch.setattr(heads, "contestants", lambda comparison: listed)
    problem = Problem(Shape(8, 16, 200))
    measure.Measurement(UNCOMPILED, "cpu", 2, 0, lambda text: None).times(problem)
    *others, last = problem.rows
    assert last.failure.startswith("wrong: relative error 1.0e-03") and not last.rounds
    assert all(len(row.rounds) == 2 for row in [*others, problem.alone])


def test_targets() -> None:
    problem = Problem(Shape(256, 512, 100_000))
    problem.rows = [
        Row(heads.IN_BACKWARD, rounds=[Phases(1.0, 2.0, 0.0), Phases(2.0, 4.0, 0.0)], peak_bytes=2 << 30),
        Row(results.COMPILED, rounds=[Phases(2.0, 3.0, 1.0), Phases(4.0, 6.0, 2.0)], peak_bytes=1 << 30),
    ]
    problem.alone.rounds = [Phases(1.0, 1.5, 0.0), Phases(2.0, 3.0, 0.0)]
    study = Study([problem], {results.PROJECTED: [1.5], results.FUSED: [1.0]}, difference=1e-16)
    verdicts = results.judge(study)
    assert [(each.target, each.measured, each.met) for each in verdicts] == [
        ("≤ 1.0e-12", "1.0e-16", True),
        ("≥ 1.80×", "2.00×", True),
        ("≤ 1.10×", "1.20×, missed by 9.1%", False),
        ("≤ 263 MiB", "2,048 MiB, missed by 678.6%", False),
        ("≤ 2.00×", "1.50×", True),
    ]
    assert problem.row(results.COMPILED).median == Phases(2.0, 3.0, 1.0)
    assert tables.target_table(verdicts).row_count == 5


def test_counted_memory() -> None:
    assert partialfc_bytes(Shape(256, 512, 100_000)) == 3 * 204_800_000 + 2 * 102_400_000
    assert held_per_class(512, results.FP32) == 4096
    assert targets.memory_bound(Shape(256, 512, 100_000)) == (256 << 20) + 32 * (256 * 512 + 100_000)


def test_moments_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events on the device delimit the phases, and only the last is waited for."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: "Event") -> float:
            assert end is not self
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("synchronize"))
    note, seconds = timing.moments("cuda")
    for _ in range(3):
        note()
    assert seconds() == [0.25, 0.25]
    assert log == ["synchronize", *["record"] * 3, "wait"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "bfloat16"], "bfloat16 needs --ours-only"),
        (["--ours-only"], "--ours-only needs one number"),
        (["--samples", "0"], "positive numbers"),
        (["--rounds", "0"], "rounds must be at least 1"),
    ],
)
def test_options_are_checked(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_command_is_part_of_the_comparison(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "head", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("benchmarks", run_name="__main__")
    assert not stopped.value.code and "python -m benchmarks head" in capsys.readouterr().out
