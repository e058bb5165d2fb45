"""The checkout of another library: files used, and their commits."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def provenance(checkout: Path, files: Iterable[Path], commits: Mapping[str, str]) -> dict[str, Any]:
    """Commit of a checkout and git's blob ids of its files, as `git hash-object FILE` prints them.

    Args:
        commits: commits of single files, for a checkout that is not a git repository.
    """
    names = [file.relative_to(checkout).as_posix() for file in files]
    report: dict[str, Any] = {"commit": None}
    if git(checkout, "rev-parse", "--show-toplevel") == str(checkout.resolve()):  # not a repository that contains it
        report["commit"] = git(checkout, "rev-parse", "HEAD")
        report["modified"] = (git(checkout, "status", "--porcelain", "--", *names) or "").splitlines()
    report["files"] = {name: {"blob": blob((checkout / name).read_bytes())} for name in names}
    for name, commit in commits.items():
        if name not in report["files"]:
            raise ValueError(f"commits: {name} is not one of the files used: {', '.join(names)}")
        report["files"][name]["commit"] = commit
    return report


def git(folder: Path, *arguments: str) -> str | None:
    """Output of git; None if git fails or is not installed."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
