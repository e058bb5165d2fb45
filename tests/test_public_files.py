"""The repository's files for GitHub, Read the Docs, pre-commit, cibuildwheel and PyPI: valid, and in agreement."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from check_jsonschema import main as check_jsonschema
from pre_commit.main import main as pre_commit
from validate_pyproject.api import Validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSIONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize(
    "schema, pattern, count",
    [
        ("vendor.github-workflows", ".github/workflows/*.yml", 3),
        ("custom.github-workflows-require-timeout", ".github/workflows/*.yml", 3),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*_*.yml", 2),
        ("vendor.github-issue-config", ".github/ISSUE_TEMPLATE/config.yml", 1),
        ("vendor.readthedocs", ".readthedocs.yaml", 1),
        ("vendor.citation-file-format", "CITATION.cff", 1),
    ],
)
def test_schemas(schema, pattern, count, capsys):
    files = sorted(map(str, ROOT.glob(pattern)))
    assert len(files) == count
    with pytest.raises(SystemExit) as ended:
        check_jsonschema(["--builtin-schema", schema, "--force-filetype", "yaml", *files])
    assert not ended.value.code, capsys.readouterr().out


def test_pre_commit_has_the_versions_of_the_test_extra():
    path = ROOT / ".pre-commit-config.yaml"
    assert pre_commit(["validate-config", str(path)]) == 0
    pinned = dict(
        re.findall(r"^([\w-]+)==(\S+)$", "\n".join(PYPROJECT["project"]["optional-dependencies"]["test"]), re.MULTILINE)
    )
    revisions = {
        repository["repo"].rpartition("/")[2]: repository["rev"]
        for repository in yaml.safe_load(path.read_text(encoding="utf-8"))["repos"]
        if repository["repo"] != "local"
    }
    assert revisions["ruff-pre-commit"] == f"v{pinned['ruff']}"
    assert revisions["mirrors-clang-format"] == f"v{pinned['clang-format']}"


def test_project_metadata(monkeypatch):
    monkeypatch.setenv("VALIDATE_PYPROJECT_NO_NETWORK", "1")  # trove-classifiers lists them
    pytest.importorskip("cibuildwheel", reason="needs Python 3.11")  # its schema is part of the check
    Validator()(dict(PYPROJECT))
    classifiers = [c.rpartition(" :: ")[2] for c in PYPROJECT["project"]["classifiers"] if "Python :: 3." in c]
    assert classifiers == VERSIONS
    assert PYPROJECT["project"]["requires-python"] == f">={VERSIONS[0]}"


@pytest.mark.parametrize(
    "platform, architecture, tag",
    [
        ("linux", "x86_64", "manylinux_x86_64"),
        ("linux", "aarch64", "manylinux_aarch64"),
        ("macos", "arm64", "macosx_arm64"),
    ],
)
def test_wheels_of_every_supported_python(platform, architecture, tag, monkeypatch, capsys):
    command = pytest.importorskip("cibuildwheel.__main__", reason="needs Python 3.11")
    options = ["--print-build-identifiers", "--platform", platform, "--archs", architecture]
    monkeypatch.setattr(sys, "argv", ["cibuildwheel", *options])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [f"cp{version.replace('.', '')}-{tag}" for version in VERSIONS]


def test_every_workflow_step_pins_a_major_version():
    used = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        used.update(re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8")))
    assert used
    for action in used:
        assert re.fullmatch(r"[\w./-]+@(v\d+|release/v\d+)", action), action
