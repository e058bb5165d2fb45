"""`python -m benchmarks.gpu` with stand-ins for the device, its tools and the CUDA tests."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import tyro
from forks import run_module
from gpu_stand_in import COMMIT, StandIn

from benchmarks.common.files import ROOT
from benchmarks.comparison.command import Options
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import builds, outcomes, profile, record, steps, testing
from fused_margin._ops.backends import select
from fused_margin.benchmark.problems import Shape


@pytest.fixture
def device(tmp_path, monkeypatch):
    return StandIn(tmp_path, monkeypatch)


def test_everything_passes(device, monkeypatch):
    code, result = device.run("check", "profile", "sanitize")
    assert code == 0
    assert {group: tests["passed"] for group, tests in result["tests"].items()} == {
        "sm90": 4, "sm80": 4, "portable": 1, "search": 1,
    }  # fmt: skip
    for tests in result["tests"].values():
        assert tests["failed"] == tests["unfinished"] == []
    assert result["tests"]["portable"]["skipped"] == [
        "tests/cuda/test_accuracy.py::test_second_device: Skipped: needs two devices"
    ]
    assert result["tests"]["sm90"]["notes"] == ["arithmetic: sm90"]
    assert result["commit"] == COMMIT and result["kernel_sources"] == record.kernel_sources(device.root)
    assert result["hardware"] == {"cpu": "any", "gpu": "Stand-in 1", "driver": "580.1"}
    assert set(result["sanitizers"]) == {"memcheck", "racecheck", "synccheck"}
    assert result["sanitizers"]["racecheck"]["search"]["passed"] == 1
    assert result["benchmark_command"] == "python -m benchmarks kernels --rounds 5"
    assert result["command"] == "python -m benchmarks.gpu check profile sanitize"
    assert str(device.root) not in json.dumps(result)
    (times,) = device.called("benchmarks")
    assert "--no-compiled --families sm90 sm80" in times
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    parsed = tyro.cli(Options, args=times.partition("-m benchmarks ")[2].split())  # as the benchmarks parse them
    assert parsed.families == ("sm90", "sm80") and not parsed.compiled and parsed.device == "cuda"
    assert len(device.called("profile")) == 1 and ["--import" in line for line in device.called("ncu")] == [False, True]
    tests = device.called("pytest")
    assert ["trap" in line.split()[1] for line in tests[:3]] == [True, True, False]  # bring-up, then the plain build
    assert "sm80" in tests[0] and "sm90" in tests[1]


@pytest.mark.parametrize(
    "fault",
    [
        "trap",
        pytest.param("late", marks=pytest.mark.slow),
        pytest.param("hang", marks=pytest.mark.slow),
        pytest.param("wrong", marks=pytest.mark.slow),
    ],
)
def test_faulty_family_is_excluded_and_the_others_continue(device, fault):
    code, result = device.run("check", "profile", fault=fault)
    assert code == 1
    sm90, sm80 = result["tests"]["sm90"], result["tests"]["sm80"]
    assert sm80["passed"] == 4 and not sm80["failed"] and not sm80["unfinished"]
    assert result["tests"]["portable"]["passed"] == 1 and result["tests"]["search"]["passed"] == 1
    faulty_test = "tests/cuda/test_accuracy.py::test_exponent_sum[sm90]"
    named = sm90["unfinished" if fault == "hang" else "failed"]
    assert named[0].startswith(faulty_test)
    assert "device lost" in named[0] or fault not in ("trap", "late")
    assert sm90["passed"] == 2  # the tests before and after it
    assert sm90["unfinished"][-1] == "not all tests have run"
    (times,) = device.called("benchmarks")
    assert "--families sm80 --output" in times
    (sanitized,) = device.called("sanitizer")  # the failed test, in the build with traps
    assert "--tool=memcheck" in sanitized and sanitized.count("::") == 1 and faulty_test in sanitized
    assert all("trap" in line.split()[1] for line in device.called("pytest") if faulty_test in line)
    assert any("process 2" in step["name"] for step in result["steps"]) == (fault != "wrong")


@pytest.mark.slow
def test_fault_after_bring_up(device):
    code, result = device.run("check", fault="wrong in all")
    assert code == 1 and result["tests"]["sm90"]["failed"] == ["tests/cuda/test_accuracy.py::test_options[sm90]"]


@pytest.mark.slow
def test_build_on_the_device(device):
    assert device.run("check", prebuilt=False)[0] == 0
    (build,) = device.called("prebuild")
    assert build.endswith("build/gpu --capability 9.0")
    device.calls.unlink()
    assert device.run("check", prebuilt=False, fault="build")[0] == 1 and not device.called("pytest")


def test_missing_package_is_an_error_before_anything_runs(device, monkeypatch, capsys):
    monkeypatch.setenv("MISSING", "tyro")
    code, result = device.run("check")
    assert code == 1 and result == {} and not device.calls.exists()
    assert "missing: tyro" in capsys.readouterr().out


@pytest.mark.slow
def test_second_call_times_families_that_passed_in_the_first(device):
    device.run("check")
    earlier = device.output / "stand-in-1.json"
    earlier_path = device.write("earlier.json", earlier.read_text())
    device.calls.unlink()
    code, result = device.run("time", "--earlier", str(earlier_path))
    assert code == 0 and result["tests"]["sm90"]["passed"] == 4
    (times,) = device.called("benchmarks")
    assert "--rounds 9 --families sm90 sm80" in times and not device.called("pytest")
    device.calls.unlink()
    device.write("csrc/kernel.cu", "// changed")
    code, result = device.run("time", "--earlier", str(earlier_path))
    assert code == 1 and result["tests"] == {} and not device.calls.exists()
    assert any("not passed with these sources: sm90 sm80" in step["detail"] for step in result["steps"])


@pytest.mark.slow
def test_second_call_checks_selected_groups_and_times_the_rest(device):
    """A family whose tests passed earlier is timed; groups that passed a sanitizer do not run under it again."""
    _, result = device.run("check", "sanitize")
    first = json.loads(json.dumps(result))
    first["tests"]["search"]["failed"] = ["test_exact_search"]
    first["sanitizers"]["racecheck"]["sm90"]["failed"] = ["test_small_integers_multiply_exactly[sm90]"]
    del first["sanitizers"]["synccheck"]["sm80"]
    earlier_path = device.write("earlier.json", json.dumps(first))
    device.calls.unlink()
    code, result = device.run("check", "sanitize", "time", "--groups", "search", "--earlier", str(earlier_path))
    assert code == 0 and result["tests"]["search"]["passed"] == 1 and not result["tests"]["search"]["failed"]
    assert result["tests"]["sm90"] == first["tests"]["sm90"]
    (times,) = (call for call in device.called("benchmarks") if "--rounds 9" in call)
    assert "--families sm90 sm80" in times
    sanitized = device.called("sanitizer")
    assert len(sanitized) == 2 and "racecheck" in sanitized[0] and "-k sm90" in sanitized[0]
    assert "synccheck" in sanitized[1] and "-k sm80" in sanitized[1]
    assert "not half_products" in sanitized[0] and "half_products" not in sanitized[1]
    assert result["sanitizers"]["racecheck"]["sm90"] == {
        "passed": 2, "failed": [], "skipped": [], "unfinished": [], "notes": ["arithmetic: sm90"],
    }  # fmt: skip


@pytest.mark.slow
def test_time_limit(device, monkeypatch, capsys):
    """Timing stops and keeps its results, which is no error in the first call; tests that did not run are an error."""
    monkeypatch.setattr(command, "FIRST_TIMES_SECONDS", 2)
    code, result = device.run("check", "profile", fault="slow times")
    assert code == 0 and result["suites"] == {}
    assert [step["state"] for step in result["steps"] if "first times" in step["name"]] == ["stopped"]
    monkeypatch.setattr(steps, "LEAST_SECONDS", 1e6)
    code, _ = device.run("check")
    assert code == 1 and "NOT RUN        0 s  machine: no time left" in capsys.readouterr().out


def section(rows: int, *seconds: float, failure: str | None = None) -> dict:
    return {
        "shape": {"rows": rows},
        "contestants": [{"name": "ours, sm90", "seconds": list(seconds), "failure": failure}],
    }


def test_earlier_times_remain_without_new_ones():
    earlier = {"command": "first", "suites": {"step": [section(1, 0.1), section(2, 0.2)], "nearest": [section(1, 0.3)]}}
    later = {"command": "second", "suites": {"step": [section(2, 0.5), section(1)]}}
    merged = record.merge_times(earlier, later)
    assert merged["command"] == "second" and merged["suites"]["nearest"] == [section(1, 0.3)]
    assert sorted(merged["suites"]["step"], key=str) == sorted([section(1, 0.1), section(2, 0.5)], key=str)
    assert record.merge_times(earlier, {}) == earlier and record.merge_times({}, later) == later


@pytest.mark.parametrize(
    ("failure", "expected"),
    [("wrong: relative error 1e-1", 1), pytest.param("does not fit: 9 GiB", 0, marks=pytest.mark.slow)],
)
def test_wrong_result_in_timing_is_an_error(device, monkeypatch, failure, expected):
    monkeypatch.setenv("SUITES", json.dumps({"step": [section(1, failure=failure)]}))
    code, result = device.run("check")
    assert code == expected and result["suites"]["step"][0]["contestants"][0]["failure"] == failure


@pytest.mark.slow
def test_profile_without_check(device):
    device.run("check")
    earlier_path = device.write("earlier.json", (device.output / "stand-in-1.json").read_text())
    device.calls.unlink()
    assert device.run("profile", "--earlier", str(earlier_path))[0] == 0
    assert "steps sm90 sm80 portable" in device.called("profile")[0]


@pytest.mark.slow
def test_import_errors_are_not_retried(device):
    code, result = device.run("check", fault="import")
    assert code == 1 and len(device.called("pytest")) == 4  # two families, portable kernels, search
    assert not device.called("benchmarks") and result["tests"]["sm90"]["passed"] == 0


def test_signal_ends_the_running_command_and_keeps_the_record(device):
    """The command runs in a separate process, whose tests hang until the signal arrives."""
    arguments = ["check", "--prebuilt", str(device.root / "prebuilt"), "--output", str(device.output)]
    code = f"""
import signal, sys
from pathlib import Path
from benchmarks.gpu import __main__ as command
signal.signal(signal.SIGTERM, command.interrupt)
sys.exit(command.main({[*arguments, "--python", str(device.python), "--commit", COMMIT]!r}, Path({str(device.root)!r})))
"""
    environment = {**os.environ, "FAULT": "slow test", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    seen = []
    for line in process.stdout:
        seen.append(line)
        if "sm90: all tests (at most" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1, "".join(seen)
    result = json.loads((device.output / "stand-in-1.json").read_text())
    assert result["tests"]["sm80"]["passed"] == 3 and result["steps"][-1]["name"] == "interrupted"
    assert not subprocess.run(
        ["pgrep", "-f", str(device.root / "bin/stand-in")], check=False, capture_output=True
    ).stdout


def test_every_cuda_test_belongs_to_one_group(forks):
    """-k matches parts of names: a renamed test must not drop out of its group or of bring-up unnoticed."""
    arguments = testing.SUITE, "--collect-only", "-q", "-p", "no:cacheprovider"
    collecting = forks.start(run_module, "pytest", *arguments, directory=str(ROOT))
    assert collecting.wait() == 0, collecting.output
    names = [line.partition("::")[2] for line in collecting.output.splitlines() if "::" in line]

    def selected(expression: str) -> list[str]:
        code = re.sub(r"\b(?!and\b|or\b|not\b)\w+", lambda word: f"({word[0]!r} in name)", expression)
        return [name for name in names if eval(code, {"name": name})]

    groups = {group: selected(expression) for group, expression in outcomes.SELECTION.items()}
    assert sorted(name for group in groups.values() for name in group) == sorted(names) and len(names) > 400
    assert set(outcomes.FAMILIES) == {family.name for family in select.FAMILIES}
    for word in testing.BRING_UP.split(" or "):
        assert set(selected(word)) & set(groups["sm90"]) and set(selected(word)) & set(groups["sm80"]), word


@pytest.mark.slow
def test_checks_of_the_machine(monkeypatch):
    """Without a device: the missing packages, and the reason why the benchmarks cannot run."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def python(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )

    assert python("-c", command.FIND, "torch", "no_such_package", "json").stdout.split() == ["no_such_package"]
    if not torch.cuda.is_available():
        described = python("-c", command.DESCRIBE)
        assert described.returncode == 1 and described.stderr.startswith("The kernels suite needs a GPU")


def test_command_without_parts_runs_all_parts(capsys):
    assert command.arguments_of([]).parts == list(command.PARTS)
    assert command.arguments_of(["check", "--limit", "20", "time"]).parts == ["check", "time"]
    with pytest.raises(SystemExit):
        command.arguments_of(["chekc"])
    assert "expected parts among check, profile, sanitize, time; got chekc" in capsys.readouterr().err


def test_source_tree_without_git_has_no_commit(tmp_path, monkeypatch):
    assert record.commit_of(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert record.commit_of(ROOT) is None


def test_arguments(device, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["time", "--earlier", str(tmp_path / "none.json")])
    assert "does not exist" in capsys.readouterr().err
    (device.root / "bin/nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    with pytest.raises(SystemExit, match="No GPU"):
        device.run("check")


def test_architectures_match_the_device(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    for capability, expected in {"9.0": "9.0a", "8.0": "8.0"}.items():
        plain, trap = (builds.variables(variant, capability) for variant in (builds.PLAIN, builds.TRAP))
        assert plain["TORCH_CUDA_ARCH_LIST"] == trap["TORCH_CUDA_ARCH_LIST"] == expected
        assert "FM_TRAP_AFTER" in trap["NVCC_APPEND_FLAGS"] and "FM_TRAP_AFTER" not in plain["NVCC_APPEND_FLAGS"]


@pytest.mark.slow
def test_command_that_ignores_sigterm_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "LEAST_SECONDS", 1)
    monkeypatch.setattr(steps, "GRACE_SECONDS", 1)
    run = steps.Steps(60, tmp_path / "log", tmp_path, {})
    pid = tmp_path / "pid"
    script = f"trap '' TERM; sleep 300 & echo $! >{pid}; echo started; wait; sleep 300"
    step = run.run("stubborn", 2, ["bash", "-c", script])
    assert step.state == "TIMED OUT" and step.failed
    assert "started" in (tmp_path / "log").read_text()
    state = subprocess.run(["ps", "-o", "stat=", "-p", pid.read_text()], capture_output=True, text=True, check=False)
    assert state.stdout.strip() in ("", "Z", "Zs")


def test_profile_runs_each_kernel_and_a_step():
    """The profiled program runs on the CPU with the portable kernels."""
    assert "fused_margin::forward_chunks" in profile.table_of_step("portable", "cpu", Shape(8, 32, 200))
