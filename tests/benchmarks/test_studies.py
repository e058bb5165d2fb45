"""Every study has a README with three parts, is listed in benchmarks/README.md, and links to files that exist."""

import re

import pytest

from benchmarks.common.files import ROOT

STUDIES = sorted(path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py"))


def check_links(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_list_of_studies():
    index = ROOT / "benchmarks" / "README.md"
    check_links(index)
    assert set(STUDIES) <= set(re.findall(r"\[(\w+)\]\(\1\)", index.read_text(encoding="utf-8")))


@pytest.mark.parametrize("study", [name for name in STUDIES if name != "common"])
def test_readme_of_a_study(study):
    path = ROOT / "benchmarks" / study / "README.md"
    check_links(path)
    parts = re.findall(r"^\*\*(\w+)\*\*", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert parts in (["Measures", "Command", "Result"], ["Writes", "Command", "Result"])
