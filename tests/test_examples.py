"""Every example runs alone, and learns."""

import argparse
import ast
import base64
import gc
import json
import math
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
# (file, command) of each row of the README's table
COMMANDS = re.findall(r"^\| \[`([\w.]+)`\]\(\1\) \|.*\| (?:`(.+?)` )?\|$", README, flags=re.MULTILINE)
PACKAGES = {
    "plain_loop.py": ["sklearn"],
    "pytorch_metric_learning_swap.py": ["pytorch_metric_learning", "sklearn"],
    "lightning_module.py": ["lightning", "sklearn"],
    "accelerate_loop.py": ["accelerate", "sklearn"],
    "identification.py": ["numpy", "sklearn"],
}


def load(name):
    """The names that an example defines, after a check that its packages are here."""
    for package in PACKAGES.get(name, []):
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLES / name), run_name="example")


def test_each_example_is_in_the_readme():
    assert sorted(name for name, _ in COMMANDS) == sorted([*SCRIPTS, *(path.name for path in EXAMPLES.glob("*.ipynb"))])
    assert all(name in command.split() for name, command in COMMANDS if name.endswith(".py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_is_short_and_stands_alone(name):
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.startswith('"""') and len(text.splitlines()) < 80
    tree = ast.parse(text)
    imported = {
        module.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for module in ([node.module or "."] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert "fused_margin" in imported
    assert imported <= {*sys.stdlib_module_names, "torch", "fused_margin", *PACKAGES.get(name, [])}


def test_plain_loop(capsys):
    assert load("plain_loop.py")["main"](["--device", "cpu", "--epochs", "6"]) > 0.95
    assert "margin 0.40" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--precision", "float16"], ["--precision", "bfloat16", "--compile"]], ids=" ".join
)
def test_plain_loop_precision(options):
    assert load("plain_loop.py")["main"](["--device", "cpu", *options]) > 0.95


@pytest.mark.filterwarnings("ignore")
def test_pytorch_metric_learning_swap(tmp_path):
    """The losses are those of pytorch-metric-learning, whose imports the example has as comments."""
    after = load("pytorch_metric_learning_swap.py")["main"](["--epochs", "2"])
    text = (EXAMPLES / "pytorch_metric_learning_swap.py").read_text(encoding="utf-8")
    text, removed = re.subn(r"^from fused_margin.*\n", "", text, flags=re.MULTILINE)
    text, restored = re.subn(r"^# Before: ", "", text, flags=re.MULTILINE)
    assert (removed, restored) == (1, 2)
    (tmp_path / "before.py").write_text(text)
    before = runpy.run_path(str(tmp_path / "before.py"), run_name="example")
    assert before["ArcFaceLoss"].__module__.startswith("pytorch_metric_learning.")
    assert after == pytest.approx(before["main"](["--epochs", "2"]), rel=1e-3)
    assert after[1] < 0.5 * after[0]


def test_insightface_swap():
    assert load("insightface_swap.py")["main"](["--steps", "60", "--num-classes", "100"]) > 0.95


@pytest.fixture
def lightning_run(tmp_path):
    """Runs the Lightning example in a folder, and returns the accuracy and the last checkpoint."""
    main = load("lightning_module.py")["main"]

    def run(*options):
        accuracy = main(["--folder", str(tmp_path), *options])
        return accuracy, max(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)

    return run


@pytest.mark.filterwarnings("ignore")
def test_lightning_module(lightning_run):
    accuracy, checkpoint = lightning_run("--epochs", "2")
    assert accuracy > 0.8
    state = torch.load(checkpoint, weights_only=True)
    assert state["epoch"] == 1 and state["state_dict"]["loss_fn.weight"].shape == (10, 32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_module_resumes(lightning_run):
    _, checkpoint = lightning_run("--epochs", "2")
    resumed, checkpoint = lightning_run("--epochs", "4", "--resume", str(checkpoint))
    assert resumed > 0.9 and torch.load(checkpoint, weights_only=True)["global_step"] == 4 * 22
    assert lightning_run("--precision", "bf16-mixed")[0] > 0.95


@pytest.fixture
def accelerate_run():
    main = load("accelerate_loop.py")["main"]
    from accelerate.state import AcceleratorState

    yield lambda *options: main(["--cpu", *options])
    AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_loop(accelerate_run, tmp_path, capsys):
    trained = accelerate_run("--epochs", "3", "--save", str(tmp_path))
    assert trained > 0.9
    capsys.readouterr()
    assert accelerate_run("--epochs", "0", "--resume", str(tmp_path)) == trained


@pytest.mark.slow
def test_accelerate_loop_in_bfloat16(accelerate_run):
    assert accelerate_run("--mixed-precision", "bf16", "--accumulate", "2") > 0.95


def divided(group, steps, save=None, resume=None):
    """The losses of the torchrun example on the ranks of a group."""
    train = runpy.run_path(str(EXAMPLES / "torchrun_loop.py"), run_name="example")["train"]
    options = argparse.Namespace(num_classes=51, steps=steps, save=save, resume=resume)
    losses = train(group, torch.device("cpu"), options)
    gc.collect()  # DistributedDataParallel must not be the last to hold the group
    return losses


@pytest.mark.filterwarnings("ignore:Please use DTensor")
def test_torchrun_loop(ranks, tmp_path):
    first, second = ranks.run(divided, [(60, str(tmp_path))] * 2)
    assert first == second
    assert sum(first[-5:]) < 0.3 * sum(first[:5])
    (resumed,) = ranks.run(divided, [(5, None, str(tmp_path))])
    assert sum(resumed) < 2 * sum(first[-5:])


def test_torchrun_loop_says_how_it_is_started(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(SystemExit):
        load("torchrun_loop.py")["main"]([])
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


def test_ten_million_classes(capsys):
    options = ["--num-classes", "5000", "--embedding-size", "32", "--batch-size", "16", "--device", "cpu"]
    losses = load("ten_million_classes.py")["main"](options)
    assert losses[-1] < 0.1 * losses[0]
    assert re.search(r"peak memory: \d+\.\d+ GB", capsys.readouterr().out)


def test_ten_million_classes_do_not_fit(capsys, monkeypatch):
    example = load("ten_million_classes.py")
    monkeypatch.setitem(example["main"].__globals__, "available_bytes", lambda device: 5_000_000_000)
    with pytest.raises(SystemExit):
        example["main"](["--device", "cpu"])
    error = capsys.readouterr().err
    assert "--num-classes: 10,000,000 classes need 10.9 GB, and 5.0 GB are free" in error


def test_product_search():
    before, *_, after = load("product_search.py")["main"](["--steps", "30", "--products", "100"])
    assert after > before + 0.3


def test_identification(capsys):
    rates = load("identification.py")["main"](["--steps", "100", "--far", "0.1"])
    assert rates["rank-1"] > 0.6 and rates["DIR"] > 0.25
    assert rates["FPIR"] < 0.2 and rates["recognized after enrolment"] > 0.3
    assert re.search(
        r"200 people enrolled: person 250 is .*\n201 people enrolled: person 250 is", capsys.readouterr().out
    )


def test_notebook_has_its_output():
    """Its format is nbformat 4.5, every cell was run once and in order, and nothing shows where."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["metadata"] == {} and "".join(cell["source"]).strip() for cell in cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert {cell["cell_type"] for cell in cells} == {"code", "markdown"}
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["outputs"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    linked = re.findall(r"\]\(([\w.]+)\)", text)
    assert linked and all((EXAMPLES / name).exists() for name in linked)


@pytest.mark.slow
def test_notebook_runs(monkeypatch, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("sklearn")
    plt.switch_backend("agg")
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    names = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # noqa: S102 - our own notebook
    plt.close("all")
    assert len(shown) == 3
    mean, std = names["separability"](names["losses"]["ArcFace and exclusive term"].weight)
    assert (mean, std) == pytest.approx((math.cos(math.tau / 10), 0.0), abs=0.002)
    assert re.search(r"^ArcFace +0\.9\d\d +\d\.\d° ", capsys.readouterr().out, flags=re.MULTILINE)


PROGRAMS = {
    "python": [],
    "torchrun": ["-m", "torch.distributed.run"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
}
SMALLER = {  # options that make a command short
    "plain_loop.py": ["--epochs", "1"],
    "pytorch_metric_learning_swap.py": ["--epochs", "1"],
    "insightface_swap.py": ["--steps", "50"],
    "lightning_module.py": ["--epochs", "1"],
    "accelerate_loop.py": ["--epochs", "1"],
    "torchrun_loop.py": ["--steps", "50"],
    "ten_million_classes.py": ["--num-classes", "20000"],
    "product_search.py": ["--steps", "20", "--products", "100"],
    "identification.py": ["--steps", "50"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "command"), [row for row in COMMANDS if row[1]], ids=lambda value: value.split()[0])
def test_command_of_the_readme(name, command, tmp_path):
    """In a folder that has nothing but the example."""
    for package in PACKAGES.get(name, []):
        pytest.importorskip(package)
    shutil.copy(EXAMPLES / name, tmp_path)
    program, *options = shlex.split(command)
    command = [sys.executable, *PROGRAMS[program], *options, *SMALLER[name]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0 and result.stdout, result.stderr
