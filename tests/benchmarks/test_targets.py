"""Verdicts on a run: measured values against targets and predictions."""

import pytest

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("tyro")

from benchmarks.comparison import peers, tables, targets
from benchmarks.comparison.report import Entry, Report
from benchmarks.kernels import comparisons, names, predictions
from benchmarks.kernels import targets as kernel_targets
from fused_margin.benchmark.problems import Shape


def test_targets() -> None:
    """Verdicts follow the ratios of a run on the problem that has targets."""
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


def kernel_report(device: str) -> Report:
    """sm90 barely reaches every target it can; sm80 barely misses each, and one of its results is wrong."""
    report = Report("", device, 1)
    best, nothing_kept, normface = names.ours("sm90"), names.NOTHING_KEPT, names.NORMFACE
    problems = {
        (names.EXPONENT_SUM, names.STEP): {names.CUBLAS: 0.9, best: 1.0},
        (names.NEAREST, names.CLASSES): {names.CUBLAS: 1.7, best: 1.0},
        (names.LAUNCH_BOUND, names.SMALL): {
            best: 1.0, names.ours("sm90", names.GRAPH): 0.5, names.COMPILED: 1.0, names.TEXTBOOK: 1.0,
        },
        (names.HALF_STEP, names.STEP): {
            best: 1.0, names.FOUR: 0.8, names.TEXTBOOK: 5.0, names.COMPILED: 1.4, names.ours("sm90", nothing_kept): 1.2,
            names.ours("sm90", normface): 1.0, names.CUT: 3.0,
        },
        (names.HALF_STEP, names.LARGE[0]): {best: 1.0},
    }  # fmt: skip
    for (suite, shape), seconds in problems.items():
        section = report.section(suite, shape)
        for name, value in seconds.items():
            section.entries.append(Entry(name, "arcface", best, seconds=[value, 2 * value]))
            if "sm90" in name:
                slower = name.replace("sm90", "sm80")
                section.entries.append(Entry(slower, "arcface", best, seconds=[1.1 * value, 2.2 * value]))
    large, step = report.sections[-1], report.sections[-2]
    large.find(best).peak_bytes, large.find(names.ours("sm80")).peak_bytes = 300 << 20, 400 << 20
    step.find(best).errors, step.find(names.TEXTBOOK).errors = {"weight": 4e-4, "loss": 1.0}, {"weight": 9e-3}
    report.sections[0].entries.append(Entry("ours, sm80 split", "kernel", best, failure="wrong: relative error nan"))
    return report


def test_kernel_targets() -> None:
    verdicts = kernel_targets.judge(kernel_report("cuda"))
    sm90 = [each for each in verdicts if "sm90" in each.goal]
    assert [(each.measured, each.met) for each in sm90] == [
        ("0.90×", True), ("1.70×", True),  # exponent sum, nearest class
        ("0.80×", True), ("5.00×", True), ("1.17×", True), ("1.40×", True), ("3.00×", True),  # step
        ("4.0e-04", True), ("22×", True), ("300 MiB", True),
        ("1.00×", True), ("2.00×", True),  # launch-bound
    ]  # fmt: skip
    sm80 = [each for each in verdicts if "sm80" in each.goal]
    assert len(sm80) == len(sm90) - 1  # its gradient error is unknown, and it has a failure
    assert not any(each.met for each in sm80)
    assert sum(each.measured == "wrong: relative error nan" for each in sm80) == 1
    assert len(verdicts) == len(sm90) + len(sm80)


def test_kernel_targets_apply_only_to_their_problems() -> None:
    assert kernel_targets.judge(kernel_report("cpu")) == []
    report = kernel_report("cuda")
    for section in report.sections:
        section.shape = Shape(8, 64, 80_000)
    assert all("wrong" in verdict.measured for verdict in kernel_targets.judge(report))


def test_predictions_are_shown_only_for_their_device_and_problem() -> None:
    report = kernel_report("cuda")
    assert all(verdict.met is not None for verdict in kernel_targets.judge(report))
    for gpu, shown in (("NVIDIA H100 80GB HBM3", 3), ("NVIDIA H100 PCIe", 0), ("NVIDIA H200", 0)):
        report.gpu = gpu
        assert sum(verdict.met is None for verdict in kernel_targets.judge(report)) == shown
    report.gpu = "NVIDIA H100 80GB HBM3"
    report.sections[0].find(names.ours("sm90")).seconds = [140e-6, 144e-6]
    report.sections[0].find(names.CUBLAS).seconds = [70e-6, 72e-6]
    first, *_, last = (each for each in kernel_targets.judge(report) if each.met is None)
    assert (first.target, first.measured) == ("predicted 135 to 150 µs, 1×", "142 µs, 0.50×")
    assert (last.target, last.measured) == ("predicted 6.5 to 7.5 ms, 2×", "1,500 ms, 1.70×")
    assert list(tables.target_table([first]).columns[3].cells) == [tables.ABSENT]
    for section in report.sections:
        section.shape = Shape(8, 64, 80_000)
    assert all(verdict.met is not None for verdict in kernel_targets.judge(report))


def test_predictions_name_existing_contestants() -> None:
    compared = {(each.suite, each.shape): each for each in comparisons.comparisons(("sm90", "sm80"))}
    for each in predictions.PREDICTIONS:
        contestants = {contestant.name for contestant in compared[each.suite, each.shape].contestants}
        assert {each.contestant, each.reference or each.contestant} <= contestants
