"""The command line: usage, errors without a traceback, interruption and resumption of a process."""

import ast
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from forks import run_command

import fused_margin as fm
import fused_margin_command
from fused_margin import cli
from fused_margin.trainer.train.checkpoint import FILE_NAME
from fused_margin.trainer.train.named_losses import options_by_loss

pytestmark = pytest.mark.usefixtures("blank_pictures")


def fails(capsys, code, *arguments):
    """Run a command that must exit with `code`; returns its output."""
    try:
        returned = cli.main(list(arguments))
    except SystemExit as exit_:
        returned = exit_.code
    streams = capsys.readouterr()
    assert returned == code, streams
    assert "Traceback" not in streams.out + streams.err
    return " ".join((streams.out + streams.err).split())


def test_names_are_printed_unchanged(face_folder, tmp_path, tiny_options, capsys):
    """Some names look like markup, one like an emoji code, one is not UTF-8."""
    data, output = tmp_path / "faces [old]", tmp_path / "run [red]"
    shutil.copytree(face_folder, data)
    (data / "x[").mkdir()
    broken = [data / "x[" / "b].jpg", data / "person_3" / ":cat:.jpg", data / "person_3" / "\udcff.jpg"]
    for path in broken:
        path.write_bytes(b"no picture")
    options = [*tiny_options, "--epochs", "1", "--evaluation.pairs", "20"]
    assert cli.main(["train", *options, "--data", str(data), "--output", str(output)]) == 0
    assert cli.main(["evaluate", "--checkpoint", str(output), "--data", str(data), "--num-pairs", "20"]) == 0
    printed = capsys.readouterr().out
    assert (
        f"images of {data}\n" in printed
        and f"files in {output}: " in printed
        and "skipped 3 unreadable images:\n" in printed
    )
    for name in ("x[/b].jpg", "person_3/:cat:.jpg", "person_3/\\udcff.jpg"):
        assert f"\n  {data}/{name}: it is damaged, no image" in printed
    assert f"{data}" in printed.partition("files in ")[2]  # the output of the evaluation


def test_usage(capsys):
    assert cli.main([]) == 0
    help_text = capsys.readouterr().out
    assert "usage: fused-margin" in help_text and "examples:\n  fused-margin " in help_text
    assert re.findall(r"^    ([a-z]+)\b", help_text, re.MULTILINE) == list(cli.COMMANDS)
    assert fails(capsys, 0, "--version") == f"fused-margin {fm.__version__}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trian", "no command 'trian'; did you mean 'train'? fused-margin --help lists the commands"),
        ("nothing-like-it", "no command 'nothing-like-it' fused-margin --help lists the commands"),
        ("--epochs 3", "expected a command before --epochs, as in `fused-margin train --epochs`"),
        ("info --verbose", "unrecognized arguments: --verbose fused-margin info --help describes the options"),
        ("consolidate folder", "required: file fused-margin consolidate --help describes the options"),
        ("completion zhs", "invalid choice: 'zhs' (choose from"),
        ("train --los.name arcface", "Perhaps you meant: --loss.name {softmax,"),
        ("train --loss.options esy=True", "sub_centers, workspace_mb; did you mean 'easy'?"),
        ("train --epochs 0", "error: epochs must be at least 1, got 0 fused-margin train --help describes the options"),
        ("compare --losses arcfac", "got 'arcfac'; did you mean 'arcface'? fused-margin compare --help"),
        ("compare --losses arcface+exclusiv", "got 'exclusiv'; did you mean 'exclusive'?"),
        ("evaluate --protocol LFW", "Expected one of ('pairs', 'lfw', 'ytf', 'megaface', 'identification')"),
        (
            "identify . nowhere",
            "error: probes: there is no 'nowhere' fused-margin identify --help describes the options",
        ),
        ("align . landmarks.csv .", "the aligned faces would replace the photographs; name another folder"),
    ],
)
def test_errors_name_the_next_step(words, message, capsys):
    assert message in fails(capsys, 2, *words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate", "no run to evaluate in runs/; name its folder with --checkpoint, or start one with fused-margin"),
        ("evaluate --checkpoint no", "no checkpoint at no; expected the folder of a run of fused-margin train, or its"),
        ("evaluate --features no.npz", "error: no.npz: No such file or directory"),
        ("evaluate --features text.npz", "text.npz is not a file of arrays (.npy, .npz): it has another format"),
        ("export", "name its folder with fused-margin export FOLDER, or start one with fused-margin train"),
        (
            "export other.pt",
            "other.pt is not a checkpoint of this version of the trainer; expected the folder of a run",
        ),
        ("consolidate . merged.pt", "expected a folder with a file .metadata"),
        ("consolidate saved no/merged.pt", "cannot write no/merged.pt: name a file in a folder that exists"),
    ],
)
def test_errors_of_files_name_the_next_step(words, message, capsys):
    torch.save({"weights": 1}, "other.pt")
    Path("text.npz").write_text("text")
    Path("saved").mkdir()
    Path("saved/.metadata").write_bytes(b"damaged")
    assert message in fails(capsys, 1, *words.split())


def test_module_is_the_program(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fused_margin", "--version"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("fused_margin", run_name="__main__")
    assert not exit_.value.code and capsys.readouterr().out == f"fused-margin {fm.__version__}\n"


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_program_shortens_openmp_spinning_before_importing_torch(chosen):
    """A wait policy set by the user is kept."""
    code = """
import json, os, sys, types
import fused_margin_command
assert "torch" not in sys.modules
def record():
    print(json.dumps({name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}))
    return 3
sys.modules["fused_margin.cli"] = types.SimpleNamespace(main=record)
sys.modules["fused_margin"] = types.SimpleNamespace(cli=sys.modules["fused_margin.cli"])
sys.exit(fused_margin_command.main())
"""
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")} | chosen
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 3, done.stderr
    variables = {name: value for name, value in json.loads(done.stdout).items() if value is not None}
    assert variables == (chosen or {"GOMP_SPINCOUNT": fused_margin_command.SPIN_COUNT})


def test_closed_pipe_gives_no_traceback():
    program = (
        "import sys, types; sys.modules['fused_margin'] = types.ModuleType('fused_margin')\n"
        "cli = sys.modules['fused_margin.cli'] = types.ModuleType('cli'); cli.main = lambda: print('help', flush=True)\n"
        "import fused_margin_command; sys.exit(fused_margin_command.main())"
    )
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_installed_program_is_that_module():
    project = (Path(cli.__file__).parents[1] / "pyproject.toml").read_text()
    assert 'fused-margin = "fused_margin_command:main"' in project
    assert 'py-modules = ["fused_margin_command"]' in project


def test_nothing_imports_the_commands():
    package = Path(cli.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent != package / "commands":
            imports = [
                node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
            ]
            assert not [line for line in map(ast.unparse, imports) if "commands" in line], path
    assert {path.stem for path in (package / "commands").glob("*.py")} == {*cli.COMMANDS, "common", "__init__"}


def test_info_needs_no_extra():
    code = "import sys; sys.modules.update(dict.fromkeys({!r})); from fused_margin.cli import main; main(['info'])"
    done = subprocess.run(
        [sys.executable, "-c", code.format(list(cli.EXTRAS))], capture_output=True, text=True, check=True
    )
    assert "version: " in done.stdout and "kernels:" in done.stdout


@pytest.mark.slow
def test_benchmark_needs_only_its_extra():
    """The trainer's packages and the folder benchmarks/ are absent."""
    absent = ["lightning", "pydantic", "yaml", "tensorboard", "onnx", "benchmarks"]
    options = "--num-classes 50 --embedding-size 8 --batch-size 4 --compile none --rounds 1 --output result.json"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}))
from fused_margin.cli import main
sys.exit(main(["benchmark", *{options.split()!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("result.json").exists() and Path("result.png").exists()


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("train", "lightning"),
        pytest.param("benchmark", "tyro", marks=pytest.mark.slow),
        pytest.param("train", "yaml", marks=pytest.mark.slow),
        pytest.param("train", "tensorboard", marks=pytest.mark.slow),
        pytest.param("evaluate", "sklearn", marks=pytest.mark.slow),
        pytest.param("export", "onnxscript", marks=pytest.mark.slow),
    ],
)
def test_missing_extra(command, module):
    code = (
        f"import sys; sys.modules[{module!r}] = None; from fused_margin.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    package, extra = cli.EXTRAS[module], cli.COMMANDS[command].extra
    assert done.returncode == 1
    assert done.stderr.strip() == f'fused-margin {command} needs {package}: pip install "fused_margin[{extra}]"'


def test_every_option_has_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--help"])
    assert exit_.value.code == 0
    help_text = capsys.readouterr().out
    for words in ("--resume", "--optimizer.class-lr", "an angle in radians", "FOLDER/identity"):
        assert words in help_text


def test_help_names_the_options_of_each_loss(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    help_text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for loss, options in options_by_loss().items():
        assert loss in help_text
        for name in options:
            assert f"{name}=" in help_text, (loss, name)
    assert "all but softmax, l2-softmax, l-softmax, curricularface:" in help_text
    assert "l-softmax, sphereface: annealing=True" in help_text  # l-softmax refuses sub_centers and label_smoothing
    assert "(default: none)" in help_text and "(default: )" not in help_text
    assert "magface: margins=0.45,0.8" in help_text and "0.35 for cosface" in help_text


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_has_an_example_and_the_defaults(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    help_text = capsys.readouterr().out
    assert f"xample: fused-margin {command}" in help_text or f"  fused-margin {command} " in help_text
    assert "default: None" not in help_text


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_texts_are_sentences(command, capsys, monkeypatch):
    """Each help text begins as a sentence or with a choice and a colon, and ends with a full stop."""
    monkeypatch.setenv("COLUMNS", "100000")
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    lines = [line.strip(" \u2502") for line in capsys.readouterr().out.splitlines()]
    for line in lines:
        if line.endswith(")") and "(default: " in line and not line.startswith("--"):
            text = line[: line.rindex("(default: ")].strip()
            assert text.endswith(".") or "=" in text, line
        for fragment in ("Of lfw", "Of pairs and", "What follows", "Which one", "None: the", "; 0: none", "but for"):
            assert fragment not in line, line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--epochs -1", "epochs must be at least 1, got -1"),
        ("--batch-size 0", "batch_size must be at least 1, got 0"),
        ("--data no/such/folder", "no folder 'no/such/folder'"),
        ("--test-fraction 1.5", "test_fraction must be in [0, 1)"),
        ("--loss.scale nan", "loss.scale must be positive"),
        ("--optimizer.lr 0", "optimizer.lr must be positive"),
        (f"--seed {2**64}", "seed must be at most"),
        ("--loss.name softmax --loss.options sub_centers=1", "softmax has no option 'sub_centers'"),
        ("--loss.options exclusive_refresh=True", "must be text or a number, got True"),
        ("--loss.options exclusive_refresh=0", "expected a positive integer, got 0"),
        ("--augmentation.noise -1", "noise must not be negative"),
        ("--model.channels 2", "channels must be 1 or 3"),
        ("--model.depth 11", "invalid choice"),
        ("--accumulate 0", "accumulate must be at least 1"),
        ("--backbone-options size=3", "backbone_options need a --backbone"),
        ("--backbone a.b --backbone-options size", "expected NAME=VALUE, got 'size'"),
        ("--optimizer.milestones 0.5 1.5", "optimizer.milestones must be between 0 and 1"),
        ("--optimizer.in-backward True --accumulate 2", "cannot step the class weights with accumulate 2"),
        ("--config", "expected one argument"),
        ("--config nothing.yaml", "cannot read the configuration nothing.yaml"),
        ("--evaluation.folds 1", "evaluation.folds must be at least 2"),
        ("--epochs ten", "invalid literal"),
        ("--no-such-option", "no-such-option"),
    ],
)
def test_invalid_options(capsys, options, message):
    assert message in fails(capsys, 2, "train", *options.split())
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backbone nowhere.Net", "no module 'nowhere'"),
        ("--network lenet --model.widths 4 4 4 4", "model.widths must be 3 numbers"),
        ("--precision 16-mixed --accelerator cpu --data digits", "needs a GPU"),
    ],
)
def test_training_errors(capsys, options, message):
    assert message in fails(capsys, 1, "train", *options.split())
    assert not Path("runs").exists()


def test_run_resume_and_evaluate(capsys, tiny_options):
    assert cli.main(["train", *tiny_options, "--output", "here"]) == 0
    printed = capsys.readouterr().out
    assert "accuracy, 10 folds, 200 pairs" in printed and "step 40/40" in printed
    assert "config.yaml, log.csv, tensorboard/" in printed
    report = Path("here/report.json").read_text()

    assert "--resume" in fails(capsys, 1, "train", *tiny_options, "--output", "here")
    assert Path("here/report.json").read_text() == report
    printed = fails(capsys, 1, "train", "--resume", "--output", "here", "--epochs", "3", "--workers", "0")
    assert "--epochs 3 (the run has 2)" in printed and "workers" not in printed
    assert "no checkpoint at nowhere" in fails(capsys, 1, "train", "--resume", "--output", "nowhere")
    assert "no run to resume in runs/" in fails(capsys, 1, "train", "--resume")

    assert cli.main(["train", "--resume", "--output", "here"]) == 0  # a finished run only verifies again
    again, before = json.loads(Path("here/report.json").read_text()), json.loads(report)
    assert again["verification"] == before["verification"] and again["training"] == before["training"]

    Path("here", FILE_NAME).write_bytes(b"damaged")
    assert "cannot read the checkpoint" in fails(capsys, 1, "train", "--resume", "--output", "here")


@pytest.mark.parametrize("refresh", ["5", "certified"])
def test_exclusive_refresh_option(tiny_options, refresh):
    options = "--loss.exclusive-weight", "1", "--loss.options", f"exclusive_refresh={refresh}"
    assert cli.main(["train", *tiny_options, *options, "--output", "here"]) == 0


def test_margin_in_degrees_warns_once(tiny_options):
    with pytest.warns(UserWarning, match="28 is larger than pi in magnitude") as caught:
        assert cli.main(["train", *tiny_options, "--loss.margin", "28", "--output", "here"]) == 0
    assert sum("larger than pi" in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["evaluate", "--checkpoint", "here"]) == 0


def test_warnings_are_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    monkeypatch.setattr(cli, "main", lambda: 0)
    assert fused_margin_command.main() == 0
    assert warnings.formatwarning("scale is too small", UserWarning, "loop.py", 7) == "warning: scale is too small\n"
    assert "loop.py:7: FutureWarning: moved" in warnings.formatwarning("moved", FutureWarning, "loop.py", 7, None)


def test_folder_without_identities(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no identities in" in fails(capsys, 1, "train", "--data", "empty")


def test_interrupted_process_can_be_resumed(forks, capsys, tiny_options):
    options = [*tiny_options, "--epochs", "8", "--checkpoint-every", "5"]
    forks.preload("fused_margin.trainer.train.run")
    process = forks.start(run_command, "train", *options)
    deadline = time.monotonic() + 60
    while not (checkpoints := list(Path("runs").glob(f"digits-*/{FILE_NAME}"))):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130 and "Traceback" not in process.output
    assert f"fused-margin train --resume --output {checkpoints[0].parent}" in process.output

    assert cli.main(["train", "--resume"]) == 0  # resumes the latest run with its options
    printed = capsys.readouterr().out
    assert "step 160/160" in printed and "continuing at step" in printed
    assert json.loads((checkpoints[0].parent / "report.json").read_text())["training"]["steps"] == 160
