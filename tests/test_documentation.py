"""The documentation: every public name is in the API reference, links lead somewhere, the site builds."""

import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from pydoc import locate
from types import ModuleType

import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin

import fused_margin
from fused_margin.losses import ClassificationLoss

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COPIED = runpy.run_path(str(DOCS / "conf.py"))["COPIED"]  # texts of pages, elsewhere in the repository
API_PAGES = sorted((DOCS / "api").glob("*.md"))
PROGRAM = {
    "benchmark",
    "cli",
    "commands",
    "trainer",
}  # of the package: the command line, whose Python interface is not public
MARKDOWN = MarkdownIt().enable("table").use(dollarmath_plugin).use(myst_block_plugin).use(anchors_plugin, max_level=6)


def public_modules():
    """The package and its modules. A folder with an `__all__` is a module; its files are not public."""
    pending = [fused_margin]
    while pending:
        module = pending.pop()
        if module is fused_margin or (hasattr(module, "__path__") and not hasattr(module, "__all__")):
            names = [info.name for info in pkgutil.iter_modules(module.__path__)]
            public = [name for name in names if not name.startswith("_") and name not in PROGRAM]
            pending += [importlib.import_module(f"{module.__name__}.{name}") for name in public]
        if module.__name__ != "fused_margin.compat":  # has modules only
            yield module


def public_objects():
    """Every object in an `__all__`, by its name."""
    for module in public_modules():
        for name in module.__all__:
            value = getattr(module, name)
            if not isinstance(value, ModuleType):
                yield f"{module.__name__}.{name}", value


def directives(page, pattern):
    """Arguments of the directives in a page's eval-rst blocks, as full names of Python."""
    module = ""
    for token in MARKDOWN.parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info.strip() == "{eval-rst}":
            is_wanted = False
            for line in token.content.splitlines():
                if match := re.match(r"\.\. (\w+):: ?(.*)", line):
                    is_wanted = re.fullmatch(pattern, match[1])
                    module = match[2] if match[1] == "currentmodule" else module
                    name = match[2]
                else:
                    name = line if re.match(r"   ~?[\w.]+$", line) else ""  # an entry of a table
                name = name.strip().removeprefix("~").removesuffix("()")
                if is_wanted and name:
                    yield name if name.startswith("fused_margin.") else f"{module}.{name}"


def documented(page):
    return list(directives(page, "auto(class|function|data|exception)"))


def find_object(name):
    """The object with a full name; None if there is none. A function of a package may hide a module of its name."""
    module, _, last = name.rpartition(".")
    return getattr(sys.modules[module], last, None) if module in sys.modules else locate(name)


def assert_all_documented(names):
    found = {id(find_object(name)) for name in names}
    assert id(None) not in found, [name for name in names if find_object(name) is None]
    assert not [name for name, value in public_objects() if id(value) not in found]


def test_public_names_are_documented():
    assert len(list(public_objects())) > 100 and fused_margin.ArcFaceLoss in dict(public_objects()).values()
    assert_all_documented([name for page in API_PAGES for name in documented(page)])


@pytest.mark.parametrize("page", API_PAGES, ids=lambda page: page.stem)
def test_tables_list_what_their_page_documents(page):
    listed = list(directives(page, "autosummary"))
    assert len(listed) == len(set(listed))
    assert set(listed) == set(documented(page)) - {"fused_margin.__version__"}


def documented_objects():
    objects = {id(value): (name, value) for name, value in public_objects() if callable(value)}
    return sorted(objects.values(), key=lambda item: item[0])


def test_public_objects_have_examples():
    assert not [name for name, value in documented_objects() if ">>> " not in (value.__doc__ or "")]


@pytest.mark.slow  # `pytest fused_margin` runs them too, with the names of their modules
@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
def test_examples_import_what_they_use():
    runner = doctest.DocTestRunner()
    for name, value in documented_objects():
        runner.run(doctest.DocTestParser().get_doctest(value.__doc__, {}, name, None, 0))
    assert runner.summarize(verbose=False).failed == 0 and runner.tries > 300


def test_margin_loss_documents_defaults():
    described = inspect.getdoc(fused_margin.MarginLoss).split("Args:")[1].split("Arguments are attributes")[0]
    defaults = dict(re.findall(r"^    (\w+): (?:.|\n     )*?Default: ([^\n]+?)(?:, .*)?\.$", described, re.MULTILINE))
    signature = inspect.signature(ClassificationLoss).parameters.values()
    expected = {p.name: repr(p.default).replace("'", '"') for p in signature if p.default is not p.empty}
    assert defaults == expected


class LinksOfHTML(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.links = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("href", "src") and value]


def parse(text):
    """The links and images of a Markdown text, also those in notes and other directives, and its headings' anchors."""
    links, anchors, blocks = [], set(), MARKDOWN.parse(text)
    for token in [token for block in blocks for token in (block, *(block.children or []))]:
        if token.type == "heading_open":
            anchors.add(token.attrGet("id"))
        elif token.type == "myst_target":
            anchors.add(token.content)
        elif token.type in ("link_open", "image"):
            links.append(token.attrGet("href") or token.attrGet("src"))
        elif token.type in ("html_block", "html_inline"):
            links += LinksOfHTML(token.content).links
        elif token.type == "fence" and token.info.startswith("{"):
            directive, _, argument = token.info.partition("}")
            links += [argument.strip()] if directive in ("{figure", "{image") else []
            links += parse(token.content)[0] if directive != "{eval-rst" else []
    return links, anchors


TEXTS = [
    *(path for name in ("README", "CONTRIBUTING", "CHANGELOG") if (path := ROOT / f"{name}.md").exists()),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    *sorted((ROOT / "benchmarks").rglob("README.md")),
]


def anchors_of(path):
    page = path.resolve().with_suffix("")
    name = page.relative_to(DOCS).as_posix() if page.is_relative_to(DOCS) else ""
    path = ROOT / COPIED[name] if name in COPIED else path
    return parse(path.read_text(encoding="utf-8"))[1]


def broken_links(path):
    for link in parse(path.read_text(encoding="utf-8"))[0]:
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        file, _, anchor = link.partition("#")
        target = DOCS / file[1:] if file.startswith("/") else path.parent / file if file else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors_of(target)):
            yield link


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(path):
    assert list(broken_links(path)) == []


def test_links_are_found(tmp_path):
    text = "# A `b`, c\n\n[x](#a-b-c) ![](no.png) [y](#d)\n\n```{note}\n[z](no.md#e)\n```\n\n<img src='no.svg'>\n"
    (tmp_path / "page.md").write_text(text)
    assert sorted(broken_links(tmp_path / "page.md")) == ["#d", "no.md#e", "no.png", "no.svg"]


@pytest.mark.slow
def test_site_builds_without_warnings(tmp_path):
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", str(DOCS), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    inventory = InventoryFile.loads((tmp_path / "objects.inv").read_bytes(), uri="").data
    kinds = ("py:class", "py:function", "py:data", "py:exception")
    assert_all_documented([name for kind in kinds for name in inventory.get(kind, {})])
