"""Runs the Python examples of the README, of the documentation and of docstrings as tests."""

from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser

PAGES = Sybil([PythonCodeBlockParser(), SkipParser()], patterns=["README.md", "docs/**/*.md"])
DOCSTRINGS = Sybil(
    [DocTestParser()], patterns=["fused_margin/**/*.py"], document_types={".py": PythonDocStringDocument}
)

pytest_collect_file = (PAGES + DOCSTRINGS).pytest()
