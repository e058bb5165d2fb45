"""The benchmark harness on tiny problems: what it writes, and that it keeps what it has."""

import json
import resource
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("tyro")
sys.path.append(str(Path(__file__).parent.parent))  # benchmarks/ is not installed

from rich.console import Console
from rich.progress import Progress

from benchmarks import memory, peers, targets, timing
from benchmarks.__main__ import main
from benchmarks.peers import Contestant
from benchmarks.problems import Shape
from benchmarks.results import Entry, Report
from benchmarks.suites import Runner

ROUNDS = 3


@pytest.fixture(autouse=True)
def leave_the_process_alone() -> Iterator[None]:
    """The harness limits the memory and sets the threads of its process; other tests run in it."""
    limit, threads = resource.getrlimit(resource.RLIMIT_DATA), torch.get_num_threads()
    yield
    resource.setrlimit(resource.RLIMIT_DATA, limit)
    torch.set_num_threads(threads)


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
    names = {row["name"] for row in section["contestants"]}
    assert names == {each.name for each in peers.step_contestants(32, "cpu", compiled=False)}
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
    """The first size is measured; the next, which would not fit, is estimated and left alone."""
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
    """One contestant fails for memory in the second timed round; the others are timed to the end."""
    calls = 0

    class Hungry(peers.LossStep):
        def __call__(self, turn: int) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 3:
                raise RuntimeError("can't allocate memory: you tried to allocate 2147483648 bytes.")
            return super().__call__(turn)

    contestants = [
        Contestant(peers.OURS, "arcface", {"plain": lambda inputs: peers.LossStep(peers.lean_arcface, inputs)}),
        Contestant(peers.LEAN, "arcface", {"hungry": lambda inputs: Hungry(peers.lean_arcface, inputs)}),
    ]
    monkeypatch.setattr(peers, "step_contestants", lambda *_: contestants)
    monkeypatch.setattr(memory, "measure", lambda job: memory.Peak(bytes=0))
    ours, lean = runner().step(Shape(8, 16, 100)).entries
    assert len(ours.seconds) == ROUNDS
    assert lean.seconds == []
    assert lean.failure == "does not fit: asked for 2.0 GiB more"


def test_wrong_answers_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Contestant(peers.OURS, "normface", {"plain": lambda inputs: peers.LossStep(peers.lean_arcface, inputs)})
    monkeypatch.setattr(peers, "step_contestants", lambda *_: [wrong])
    (entry,) = runner().step(Shape(8, 16, 100)).entries
    assert entry.seconds == []
    assert entry.failure.startswith("wrong: relative error")


def test_interruption_keeps_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Runner, shape: Shape) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "accuracy", interrupted)
    monkeypatch.setattr(memory, "measure", lambda job: memory.Peak(bytes=0))
    results = run_quick(tmp_path, "exclusive", "accuracy")
    assert not results["complete"]
    check_times(results["suites"]["exclusive"][0])


def test_targets() -> None:
    """Verdicts follow the ratios of a run of the promised problem."""
    report = Report("", "cpu", 2)
    section = report.section("step", targets.STEP)
    for name, seconds in {peers.PRODUCTS: 1.0, peers.OURS: 1.1, peers.COMPILED: 1.6, peers.LEAN: 2.6}.items():
        section.entries.append(Entry(name, "arcface", peers.OURS, seconds=[seconds, 2 * seconds]))
    memory_section = report.section("memory", targets.MEMORY)
    memory_section.entries.append(Entry(peers.OURS, "arcface", peers.OURS, peak_bytes=2**30))
    assert [(verdict.measured, verdict.met) for verdict in targets.judge(report)] == [
        ("1.10×", True),
        ("1.45×", False),
        ("2.36×", False),
        ("1,024 MiB", False),
    ]


def test_ratio_is_taken_within_a_round() -> None:
    """A disturbance that hits a whole round leaves the ratio alone."""
    assert timing.ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]) == 2.0
    assert timing.quartiles([3.0]) == (3.0, 3.0, 3.0)
