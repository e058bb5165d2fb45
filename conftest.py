"""Runs the Python examples of the README, of the documentation and of docstrings as tests."""

from sybil import Sybil
from sybil.document import PythonDocStringDocument
from sybil.parsers.doctest import DocTestParser
from sybil.parsers.myst import PythonCodeBlockParser, SkipParser
from sybil.sybil import SybilCollection

PAGE_PARSERS = [PythonCodeBlockParser(), SkipParser()]

pytest_collect_file = SybilCollection(
    [
        Sybil(PAGE_PARSERS, patterns=["README.md"], excludes=["*/README.md"]),
        Sybil(PAGE_PARSERS, patterns=["*.md"], path="docs"),
        Sybil(
            [DocTestParser()], patterns=["*.py"], path="fused_margin", document_types={".py": PythonDocStringDocument}
        ),
    ]
).pytest()
