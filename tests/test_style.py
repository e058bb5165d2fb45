"""The tree is formatted and lint-free, and the package's types are consistent."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "csrc").rglob("*"), *(ROOT / "tests/emulation").rglob("*")]


def run(*command: str) -> None:
    result = subprocess.run([*command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff():
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent)) or "ruff"
    run(ruff, "check", ".")
    run(ruff, "format", "--check", ".")


def test_clang_format():
    clang_format = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or "clang-format"
    files = [str(path) for path in SOURCES if path.suffix in (".h", ".cpp", ".cu")]
    assert len(files) > 10
    run(clang_format, "--dry-run", "--Werror", *files)


@pytest.mark.slow  # type checkers read all of torch
def test_mypy(tmp_path):
    run(sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path))
