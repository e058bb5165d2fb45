"""Source distributions and wheels: what is in them, which version they have, and that one is built from the other."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOT_FILES = ["LICENSE", "MANIFEST.in", "README.md", "fused_margin_command.py", "pyproject.toml", "setup.py"]
GIT_FILES = [".gitattributes", ".gitignore"]
ARCHIVAL, TEMPLATE = ".git_archival.txt", "describe-name: $Format:%(describe:tags=true,match=*[0-9]*)$\n"
STRAY_FILES = [
    "fused_margin/_C.old.so",
    "csrc/__pycache__/x.pyc",
    "build/a.o",
    ".venv/b.py",
    "dist/c.whl",
    "runs/d.csv",
]
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def run(*command: str | Path, cwd: Path, **variables: str | None) -> str:
    """The output of a command that does not see this repository, its virtual environment or the user's settings of git."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GIT_", "PYTHONPATH"))}
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CEILING_DIRECTORIES": str(cwd.parent), **inherited, **variables}
    env = {name: value for name, value in settings.items() if value is not None}
    result = subprocess.run([*command], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def git(folder: Path, *arguments: str) -> str:
    return run("git", "-c", "user.name=x", "-c", "user.email=x@example.com", *arguments, cwd=folder)


def repository(folder: Path, *folders: str, tag: str | None = None) -> set[str]:
    """Make a repository of parts of this one, with one commit; the names of its files."""
    folder.mkdir()
    for name in folders:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in [*ROOT_FILES, *GIT_FILES]:
        shutil.copy(ROOT / name, folder / name)
    (folder / ARCHIVAL).write_text(TEMPLATE)  # these tests may run in an archive, where git has filled in this file
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    if tag:
        git(folder, "tag", tag)
    return names


def version_of(folder: Path) -> str:
    return run(sys.executable, "-m", "setuptools_scm", cwd=folder).strip()


def unpacked_archive(folder: Path, target: Path) -> None:
    """Unpack what `git archive` writes for a repository."""
    git(folder, "archive", "--output", str(target.with_suffix(".tar")), "HEAD")
    with tarfile.open(target.with_suffix(".tar")) as archive:
        archive.extractall(target, filter="data")


@needs_git
@pytest.mark.parametrize("archived", [False, True], ids=["repository", "archive"])
def test_sdist_has_every_source_and_the_version_of_the_tag(tmp_path, archived):
    source = tmp_path / "source"
    names = repository(source, "csrc", "fused_margin", tag="v1.2.3")
    assert {"csrc/cpu/loss.cpp", "csrc/math/margin.h", "fused_margin/py.typed", "fused_margin/_C.pyi"} <= names
    if archived:
        unpacked_archive(source, tmp_path / "archive")
        source = tmp_path / "archive"
    for stray in STRAY_FILES:
        (source / stray).parent.mkdir(exist_ok=True)
        (source / stray).touch()
    run(sys.executable, "setup.py", "-q", "egg_info", cwd=source)
    metadata = source / "fused_margin.egg-info"
    listed = set((metadata / "SOURCES.txt").read_text().split("\n"))
    assert {name for name in listed if name and not name.startswith(metadata.name)} == names
    information = (metadata / "PKG-INFO").read_text(encoding="utf-8")
    assert "\nVersion: 1.2.3\n" in information and "\nDescription-Content-Type: text/markdown\n" in information
    links = re.findall(r"\]\((.*?)\)", information)
    assert len(links) > 10 and all(link.startswith("https://") for link in links)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git has filled in the file of an archive")
def test_git_fills_in_the_version_of_an_archive():
    assert (ROOT / ARCHIVAL).read_text() == TEMPLATE


@needs_git
def test_version_of_an_archive_before_the_first_tag(tmp_path):
    repository(tmp_path / "source")
    unpacked_archive(tmp_path / "source", tmp_path / "archive")
    assert version_of(tmp_path / "archive") == "0.1.0.dev0"


@needs_git
def test_version_before_the_first_tag(tmp_path):
    repository(tmp_path / "source")
    assert re.fullmatch(r"0\.1(\.0)?\.dev1\+g[0-9a-f]+", version_of(tmp_path / "source"))


LOSS = """
import torch, fused_margin as fm
loss = fm.ArcFaceLoss(10, 4)(torch.randn(3, 4), torch.arange(3))
loss.backward()
info = fm.build_info()
print(fm.__file__, float(loss.detach()) > 0, info["version"], ",".join(info["cuda"]["architectures"]))
"""


@pytest.mark.slow  # compiles the extension
@needs_git
@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
def test_wheel_from_the_sdist_in_a_fresh_environment(tmp_path, cuda):
    if cuda and not shutil.which("nvcc"):
        pytest.skip("needs nvcc")
    source, fresh = tmp_path / "source", tmp_path / "fresh"
    repository(source, "csrc", "fused_margin", tag="v1.2.3")
    run(sys.executable, "-m", "venv", fresh, cwd=tmp_path)
    python = fresh / "bin/python"
    run(sys.executable, "-c", "from setuptools.build_meta import build_sdist; build_sdist('..')", cwd=source)
    shutil.rmtree(source)
    variables = {"CUDA_HOME": None if cuda else "", "TORCH_CUDA_ARCH_LIST": "8.0"}
    command = [
        python,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-cache-dir",
        "--no-deps",
        "-w",
        ".",
        "fused_margin-1.2.3.tar.gz",
    ]
    run(*command, cwd=tmp_path, **variables)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        packed = {name.split("/")[0] for name in file.namelist()}
    assert packed == {"fused_margin", "fused_margin_command.py", "fused_margin-1.2.3.dist-info"}

    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    # The environment of the tests lends its torch; the new package comes first on the path.
    site_packages = Path(sysconfig.get_path("platlib", vars={"base": str(fresh), "platbase": str(fresh)}))
    (site_packages / "torch.pth").write_text(sysconfig.get_path("platlib") + "\n")
    path, positive, *rest = run(python, "-c", LOSS, cwd=tmp_path).strip("\n").split(" ")
    assert Path(path).parent == site_packages / "fused_margin" and positive == "True"
    assert rest == ["1.2.3", "8.0" if cuda else ""]
