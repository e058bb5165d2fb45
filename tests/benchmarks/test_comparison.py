"""The comparison on tiny problems: the report, failures of contestants, and interruptions."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("tyro")

from rich.console import Console
from rich.progress import Progress

from benchmarks.common.steps import LossStep
from benchmarks.comparison import peak_memory, peers, tables
from benchmarks.comparison.command import interrupted_by_sigterm, main
from benchmarks.comparison.report import Report, Section
from benchmarks.comparison.runner import Runner
from benchmarks.kernels import comparisons, names, steps
from fused_margin.benchmark import memory, timing
from fused_margin.benchmark.contestants import Contestant
from fused_margin.benchmark.problems import Shape, make_inputs

ROUNDS = 3


def run_quick(path: Path, *suites: str) -> dict[str, Any]:
    output = path / "results.json"
    main([*suites, "--quick", "--no-compiled", "--threads", "1", "--output", str(output)])
    return json.loads(output.read_text())


def check_times(section: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in section["contestants"]}
    for row in rows.values():
        assert row["failure"] is None, row
        assert len(row["seconds"]) == ROUNDS
        assert row["median"] == statistics.median(row["seconds"])
        assert row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
        pairs = zip(row["seconds"], rows[row["reference"]]["seconds"], strict=True)
        assert row["ratio"] == statistics.median(mine / ours for mine, ours in pairs)
        if row["objective"] == "products":
            assert row["errors"] == {}
        else:
            assert row["errors"]["weight"] < 1e-5
            assert row["peak_bytes"] >= 0


def test_step(tmp_path: Path) -> None:
    results = run_quick(tmp_path, "step")
    assert results["format"] == 1
    assert results["complete"]
    assert results["hardware"]["cpu"]
    assert results["versions"]["fused_margin"]["version"]
    assert results["threads"] == 1
    assert "step --quick --no-compiled" in results["command"]
    assert set(results["suites"]) == {"step"}
    (section,) = results["suites"]["step"]
    assert section["shape"] == {"rows": 32, "dim": 64, "classes": 2000}
    contestants = {row["name"] for row in section["contestants"]}
    assert contestants == {each.name for each in peers.step_contestants(32, "cpu", compiled=False)}
    check_times(section)
    assert (tmp_path / "results.png").stat().st_size > 10_000


def test_exclusive(tmp_path: Path) -> None:
    (section,) = run_quick(tmp_path, "exclusive")["suites"]["exclusive"]
    assert len(section["contestants"]) == 4
    check_times(section)


def test_accuracy(tmp_path: Path) -> None:
    results = run_quick(tmp_path, "accuracy")
    (section,) = results["suites"]["accuracy"]
    for row in section["contestants"]:
        assert set(row["errors"]) == {"loss", "embeddings", "weight"}
        assert max(row["errors"].values()) < 1e-5
    assert all(check["passed"] for check in results["edge_checks"])
    assert all(target["met"] for target in results["targets"])


def runner() -> Runner:
    progress = Progress(console=Console(quiet=True))
    return Runner(Report("", "cpu", 1), progress, ROUNDS, warmup=1, compiled=False)


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller size is measured; the larger, which would not fit, is only estimated."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    few = [each for each in peers.step_contestants(32, "cpu") if each.name in (peers.OURS, peers.LEAN)]
    monkeypatch.setattr(peers, "step_contestants", lambda *_: few)
    small, large = runner().memory([Shape(32, 64, 20_000), Shape(32, 64, 10_000)])
    assert small.shape.classes == 10_000
    for entry in small.entries:
        assert entry.failure is None
        assert 2**20 < entry.peak_bytes < 2**24
    assert all(entry.failure.startswith("does not fit: would need") for entry in large.entries)


def test_out_of_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """One contestant runs out of memory in the second timed round; the others are timed in all rounds."""
    calls = 0

    class OutOfMemory(LossStep):
        def __call__(self, turn: int) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise RuntimeError("can't allocate memory: you tried to allocate 2147483648 bytes.")
            return super().__call__(turn)

    contestants = [
        Contestant(peers.OURS, "arcface", {"plain": lambda inputs: LossStep(peers.lean_arcface, inputs)}),
        Contestant(peers.LEAN, "arcface", {"hungry": lambda inputs: OutOfMemory(peers.lean_arcface, inputs)}),
    ]
    monkeypatch.setattr(peers, "step_contestants", lambda *_: contestants)
    monkeypatch.setattr(peak_memory, "measure", lambda job: peak_memory.Peak(bytes=0))
    ours, lean = runner().step(Shape(8, 16, 100)).entries
    assert len(ours.seconds) == ROUNDS
    assert lean.seconds == []
    assert lean.failure == "does not fit: asked for 2.0 GiB more"


def test_missing_answer_in_float64_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = [Contestant(peers.OURS, "arcface", {"plain": lambda inputs: LossStep(peers.lean_arcface, inputs)})]
    monkeypatch.setattr(peers, "step_contestants", lambda *_: contestants)
    monkeypatch.setattr(Runner, "_truths", lambda *_: {})
    (entry,) = runner().accuracy(Shape(8, 16, 100)).entries
    assert entry.errors == {} and entry.failure == "the float64 answer does not fit"


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contestant(peers.OURS, "normface", {"plain": lambda inputs: LossStep(peers.lean_arcface, inputs)})
    monkeypatch.setattr(peers, "step_contestants", lambda *_: [wrong])
    (entry,) = runner().step(Shape(8, 16, 100)).entries
    assert entry.seconds == []
    assert entry.failure.startswith("wrong: relative error")


def test_interruption_keeps_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Runner, shape: Shape) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "accuracy", interrupted)
    monkeypatch.setattr(peak_memory, "measure", lambda job: peak_memory.Peak(bytes=0))
    results = run_quick(tmp_path, "exclusive", "accuracy")
    assert not results["complete"]
    check_times(results["suites"]["exclusive"][0])


INTERRUPTED = """
import sys, time
from benchmarks.comparison.command import main
from benchmarks.comparison.report import Entry
from benchmarks.comparison.runner import Runner

def half_measured(self, shape):
    self.report.section("exclusive", shape).entries.append(Entry("half measured", "exclusive", "ours", seconds=[1.0]))
    print("half measured", flush=True)
    time.sleep(600)

Runner.exclusive = half_measured
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_sigterm_keeps_measurements(tmp_path: Path) -> None:
    """A complete section is kept, and the measured part of the next one."""
    output, root = tmp_path / "results.json", str(Path(__file__).parents[2])
    command = [sys.executable, "-c", INTERRUPTED, "step", "exclusive", "--quick", "--no-compiled", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--only", peers.LEAN, "--output", str(output)],
        cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        before = next(line for line in process.stdout if "half measured" in line)
        process.send_signal(signal.SIGTERM)
        after = process.stdout.read()
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert before and "Interrupted. The measurements so far are saved." in after
    results = json.loads(output.read_text())
    assert not results["complete"]
    (step,), (exclusive,) = results["suites"]["step"], results["suites"]["exclusive"]
    assert len(step["contestants"][0]["seconds"]) == ROUNDS
    assert exclusive["contestants"][0]["seconds"] == [1.0]


def test_second_sigterm_does_not_interrupt_writing() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            written = True
    assert written and signal.getsignal(signal.SIGTERM) is before


def test_each_kernel_section_is_written_when_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def three(families: object, quick: bool) -> Iterator[comparisons.Comparison]:
        for suite in (names.EXPONENT_SUM, names.PROBABILITIES, names.NEAREST):
            path = tmp_path / "results.json"
            seen.append(list(json.loads(path.read_text())["suites"]) if path.exists() else None)
            contestant = Contestant("one", "kernel", {"one": lambda _: Counted(0.0)}, "one")
            yield comparisons.Comparison(suite, Shape(4, 8, 16), [contestant])

    monkeypatch.setattr(timing, "time_queued", timing.time_once)
    monkeypatch.setattr(comparisons, "missing", lambda device: None)
    monkeypatch.setattr(comparisons, "available_families", list)
    monkeypatch.setattr(comparisons, "comparisons", three)
    results = run_quick(tmp_path, "kernels")
    assert seen == [None, [names.EXPONENT_SUM], [names.EXPONENT_SUM, names.PROBABILITIES]]
    assert results["complete"] and len(results["suites"]) == 3
    assert [path.name for path in tmp_path.glob("*.json*")] == ["results.json"]


def test_unknown_contestant_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No contestant is named 'absent'"):
        run_quick(tmp_path, "step", "exclusive", "--only", "absent")
    assert not list(tmp_path.iterdir())


def test_machine_is_measured_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_queued", timing.time_once)
    machine = next(comparisons.comparisons(("sm90",), quick=True))
    (section,) = runner().kernels([machine])
    assert section.suite == names.MACHINE
    assert {entry.name: entry.work for entry in section.entries} == {
        names.COPY: 2 * 2**20, names.SQUARE: 2 * 256**3
    }  # fmt: skip
    for entry in section.entries:
        assert entry.failure is None and entry.rate == entry.work / statistics.median(entry.seconds)
    entry.seconds = [2e-6, 1e-6, 4e-6]
    assert list(tables.table_of(section).columns[3].cells)[1] == "16.8"  # TFLOP/s
    assert Section.from_summary(section.suite, json.loads(json.dumps(section.summary()))) == section


def test_machine_copies_and_multiplies() -> None:
    inputs = make_inputs(Shape(32, 64, 48), "cpu", batches=2)
    copy = steps.Copy(4096, inputs)
    assert copy.source.nbytes == copy.target.nbytes == 4096
    copy.source.fill_(3.0)
    copy(0)
    assert (copy.target == 3.0).all()
    product = steps.SquareMatrices(inputs)
    product(1)
    assert product.out.dtype == torch.float16
    expected = inputs.embeddings[1].detach() @ inputs.weight.detach().t()
    torch.testing.assert_close(product.out.float(), expected, rtol=0, atol=2e-3)


def test_ratio_is_computed_within_a_round() -> None:
    """Noise that slows a complete round does not change the ratio."""
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)


def test_kernels_need_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="needs --device cuda"):
        main(["kernels"])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["kernels", "--device", "cuda"])
        assert "torch finds no GPU" in capsys.readouterr().err


class Counted:
    """A step with a given error that counts its calls."""

    def __init__(self, error: float | Exception):
        self.error, self.calls = error, 0

    def __call__(self, turn: int) -> None:
        self.calls += 1

    def errors(self) -> dict[str, float]:
        if isinstance(self.error, Exception):
            raise self.error
        return {"result": self.error}


def test_wrong_kernel_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "time_queued", timing.time_once)
    counted = {
        "right": Counted(9e-7),
        "wrong": Counted(2e-6),
        "nan": Counted(math.nan),
        "lost": Counted(OSError("gone")),
    }
    contestants = [
        Contestant(name, "kernel", {"one": lambda _, step=step: step}, "right", tolerance=1e-6)
        for name, step in counted.items()
    ]
    (section,) = runner().kernels([comparisons.Comparison(names.EXPONENT_SUM, Shape(4, 8, 16), contestants)])
    failures = {entry.name: entry.failure for entry in section.entries}
    assert failures["right"] is None and failures["lost"] == "failed: OSError: gone"
    assert all(failures[name].startswith("wrong: relative error") for name in ("wrong", "nan"))
    assert {name: step.calls for name, step in counted.items()} == {
        "right": ROUNDS + 1,
        "wrong": 0,
        "nan": 0,
        "lost": 0,
    }
    assert {entry.name: len(entry.seconds) for entry in section.entries if entry.seconds} == {"right": ROUNDS}


def test_queued_launches_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is busy before the first event, so that the host is ahead when timing starts."""
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
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("hold"), raising=False)
    (times,) = timing.interleaved({"a": lambda turn: log.append("step")}, 1, "cuda", timer=timing.time_queued)
    assert times == {"a": 1.5}
    assert log == ["synchronize", "hold", "record", "step", "record", "wait"]


def test_scaled_loss_gives_the_same_result() -> None:
    inputs = make_inputs(Shape(4, 8, 16), "cpu", batches=1)
    plain, scaled = (LossStep(peers.lean_arcface, inputs, loss_scale=scale) for scale in (1.0, 256.0))
    answers = [step.answer(0) for step in (plain, scaled)]
    assert torch.equal(answers[0].weight, answers[1].weight) and torch.equal(
        answers[0].embeddings, answers[1].embeddings
    )
    scaled(0)
    torch.testing.assert_close(inputs.weight.grad, 256 * answers[0].weight)
