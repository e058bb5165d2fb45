"""The scripts that complete commands and options in a shell."""

import importlib
import shlex
import subprocess
from pathlib import Path

from fused_margin import cli
from fused_margin.trainer.train.named_losses import LOSSES


def test_completion_in_bash(capsys):
    """bash completes commands, options and choices without running a program."""
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "python" not in script
    lines = {
        "fused-margin ": set(cli.COMMANDS),
        "fused-margin tr": {"train"},
        "fused-margin train --loss.na": {"--loss.name"},
        "fused-margin train --loss.name ": set(LOSSES),
        "fused-margin train --epochs 3 --loss.name arc": {"arcface"},
        "fused-margin benchmark --dty": {"--dtype"},
        "fused-margin benchmark --dtype b": {"bfloat16"},
        "fused-margin evaluate --protocol y": {"ytf"},
        "fused-margin identify people other.pt --temp": {"--template"},
        "fused-margin completion z": {"zsh"},
        "fused-margin export other": {"other.pt"},
        "fused-margin train --output ot": {"other.pt"},
    }
    Path("other.pt").touch()
    script += """
for line in "${lines[@]}"; do
    read -ra COMP_WORDS <<< "$line"
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    $(complete -p fused-margin | grep -o '_[^ ]*')
    echo "${COMPREPLY[*]}"
done
"""
    script = f"lines=({' '.join(map(shlex.quote, lines))})\n{script}"
    done = subprocess.run(["bash", "--norc"], input=script, capture_output=True, text=True, check=True)
    assert not done.stderr
    assert dict(zip(lines, [set(line.split()) for line in done.stdout.splitlines()], strict=True)) == lines


def test_completion_leaves_out_what_is_not_installed(capsys, monkeypatch):
    missing = ModuleNotFoundError("No module named 'lightning'", name="lightning")
    load = importlib.import_module

    def loaded(name, *package):
        if name == "fused_margin.commands.train":
            raise missing
        return load(name, *package)

    monkeypatch.setattr(importlib, "import_module", loaded)
    assert cli.main(["completion", "zsh"]) == 0
    streams = capsys.readouterr()
    assert "without the options of train, which needs lightning" in streams.err
    assert "--num-classes" in streams.out and '"--loss.name[' not in streams.out  # the help of evaluate names it
