"""`fused-margin benchmark` on tiny problems: the table, the files, interruptions and problems that do not fit."""

import json

import pytest
import torch

pytest.importorskip("pytorch_metric_learning")

from fused_margin import cli
from fused_margin.benchmark import heads, losses, memory, problems, run
from fused_margin.benchmark.heads import Comparison
from fused_margin.benchmark.losses import OBJECTIVES
from fused_margin.benchmark.measure import Measurement, needed_bytes
from fused_margin.benchmark.problems import Shape, make_inputs, truth
from fused_margin.benchmark.results import Problem

TINY = [
    "--batch-size",
    "8",
    "--num-classes",
    "50",
    "--embedding-size",
    "16",
    "--rounds",
    "3",
    "--warmup",
    "1",
    "--no-memory",
    "--device",
    "cpu",
]
SHAPE = Shape(8, 16, 50)


@pytest.fixture(autouse=True)
def shared_process(monkeypatch):
    """Limits of memory and pictures are tested in the study of heads."""
    monkeypatch.setattr(run, "limit_to_available", lambda device: None)


def benchmark(*options):
    return cli.main(["benchmark", *TINY, "--compile", "none", *options])


def test_result(tmp_path, capsys):
    path = tmp_path / "new" / "result.json"
    assert benchmark("--loss", "cosface", "--output", str(path)) == 0
    content = json.loads(path.read_text())
    assert content["complete"] and content["hardware"]["cpu"] and content["versions"]["torch"] == torch.__version__
    assert content["command"].startswith("fused-margin benchmark --batch-size 8 --num-classes 50")
    assert content["options"]["loss"] == "cosface" and content["options"]["rounds"] == 3
    (problem,) = content["problems"]
    rows = {row["name"]: row for row in problem["contestants"]}
    assert list(rows) == [
        "ours, step in backward",
        "ours, gradient stored",
        "eager lean CosFace + SGD(fused=True)",
        "pytorch-metric-learning CosFaceLoss + SGD(fused=True)",
    ]
    for row in rows.values():
        assert row["failure"] is None and len(row["rounds"]) == 3 and row["loss_error"] < 1e-5
    assert path.with_suffix(".png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "CosFace, float32, N=8, D=16, C=50" in printed and f"torch {torch.__version__}" in printed
    assert "1.00×" in printed and "wrote " in printed


def test_ours_only(capsys):
    assert benchmark("--ours-only", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr().out
    assert "ours, step in backward" in printed and "eager" not in printed and "pytorch-metric-learning" not in printed


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_all_forms_have_the_same_loss(loss, dtype):
    comparison = Comparison(loss, dtype, modes=())
    inputs = heads.unit_inputs(SHAPE, "cpu", dtype=comparison.torch_dtype)
    exact = truth(loss, inputs.embeddings[0], inputs.weight, inputs.labels[0]).loss
    built = [build(inputs) for each in heads.contestants(comparison) for build in each.variants.values()]
    assert len(built) == 4
    for head in built:
        torch.testing.assert_close(head.forward(0).double(), exact, rtol=1e-5, atol=0)
        head.close()
    for form in OBJECTIVES[loss].forms.values():
        value = form(inputs.embeddings[0], inputs.weight, inputs.labels[0])
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_objectives_differ():
    inputs = make_inputs(SHAPE, "cpu", batches=1)
    values = {float(truth(loss, inputs.embeddings[0], inputs.weight, inputs.labels[0]).loss) for loss in OBJECTIVES}
    assert len(values) == len(OBJECTIVES) == len(problems.MARGINS) + 1


def test_interruption_keeps_the_result(tmp_path, monkeypatch, capsys):
    def interrupt(self, problem):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "memory", interrupt)
    path = tmp_path / "result.json"
    assert benchmark("--memory", "--output", str(path)) == 130
    assert json.loads(path.read_text())["complete"] is False
    printed = capsys.readouterr().out
    assert "1.00×" in printed and printed.endswith("interrupted\n")


def test_interruption_before_a_result(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(heads, "contestants", interrupt)
    monkeypatch.setattr(run, "needed_bytes", lambda *arguments: 0)
    path = tmp_path / "result.json"
    assert benchmark("--output", str(path)) == 130
    assert not path.exists() and "×" not in capsys.readouterr().out


def test_problem_that_does_not_fit(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "available_bytes", lambda device: 10**6)
    path = tmp_path / "result.json"
    assert benchmark("--num-classes", "100000", "--output", str(path)) == 1
    shape, comparison = Shape(8, 16, 100_000), Comparison(modes=())
    needed, alone = needed_bytes(shape, comparison), needed_bytes(shape, Comparison(modes=(), peers=False))
    error = " ".join(capsys.readouterr().err.split())
    assert f"does not fit: it needs about {needed:,} bytes" in error and "1,000,000 bytes (0.0 GB)" in error
    assert f"or --ours-only, which needs about {alone:,} bytes" in error
    assert benchmark("--num-classes", "100000", "--ours-only") == 1
    assert "or --ours-only" not in capsys.readouterr().err
    assert not path.exists()


def test_needed_memory_counts_every_matrix():
    shape, matrix = Shape(64, 512, 1_000_000), 4 * 512 * 1_000_000
    ours = needed_bytes(shape, Comparison(peers=False))
    assert 7 * matrix <= ours < 7.5 * matrix  # inputs, two heads with momentum, one without, and a gradient
    everything = needed_bytes(shape, Comparison())
    assert everything > ours + 12 * matrix  # four compilations, eager, pytorch-metric-learning
    assert needed_bytes(shape, Comparison(dtype="bfloat16")) < 0.6 * everything


def test_failing_contestant_is_named(monkeypatch, capsys):
    def fail(*arguments):
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(losses.Objective, "make_peer", fail)
    assert benchmark() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "failed: RuntimeError: no compiler" in printed and "found" not in printed and "1.00×" in printed


def test_contestant_that_fails_later_is_dropped():
    problem, failing = Problem(SHAPE, comparison=Comparison(modes=())), []
    measurement = Measurement(problem.comparison, "cpu", 3, 0, lambda text: None)
    original = heads.Head.phases

    def phases(self, turn, device):
        if turn == 1 and isinstance(self.optimizer, torch.optim.SGD) and self.optimizer.defaults["fused"]:
            failing.append(self)
            raise RuntimeError("out of luck")
        return original(self, turn, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads.Head, "phases", phases)
        measurement.times(problem)
    ours, theirs = problem.rows[:2], problem.rows[2:]
    assert len(failing) == len(theirs) == 2
    assert all(row.failure is None and len(row.rounds) == 3 for row in [*ours, problem.alone])
    assert all(row.failure == "failed: RuntimeError: out of luck" and not row.rounds for row in theirs)


def test_other_systems_have_no_peaks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "PEAK_RESET", tmp_path / "absent")
    assert benchmark("--memory") == 0
    assert "this system does not measure the peak memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--batch-size 0", "batch-size must be at least 1, got 0"),
        ("--num-classes 1", "num-classes must be at least 2"),
        ("--threads 99999", "the processors of this machine, got 99999"),
        ("--output result.txt", "output: expected the name of a .json file, got 'result.txt'"),
        ("--device cuda", "use --device cpu"),
        ("--loss arcfac", "Expected one of ('arcface', 'cosface', 'normface')"),
    ],
)
def test_options_are_checked(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        benchmark(*options.split())
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.slow
def test_compiled_contestant_and_memory(tmp_path):
    """Also: the memory of every contestant is measured in a process of its own."""
    path = tmp_path / "result.json"
    assert cli.main(["benchmark", *TINY, "--memory", "--num-classes", "5000", "--output", str(path)]) == 0
    (problem,) = json.loads(path.read_text())["problems"]
    compiled = problem["contestants"][2]
    assert (
        compiled["name"] == "torch.compile lean ArcFace + SGD(fused=True)"
        and compiled["variant"] in compiled["variants"]
    )
    assert set(compiled["variants"]) == {"write, default", "select, default"}
    for row in problem["contestants"]:
        assert row["failure"] is None and row["peak_bytes"] >= 0 and row["rounds"]
