"""Reads the HTML pages of reports, and checks what holds for all of them."""

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

VOID = {"br", "img", "meta", "wbr"}


class Page(HTMLParser):
    """Elements, texts, numbers and mistakes of a page. Elements must be closed in the order of nesting."""

    def __init__(self, path):
        super().__init__()
        self.source = Path(path).read_bytes().decode("utf-8")
        self.open, self.elements, self.texts = [], [], []
        self.numbers = []  # values of all numbers
        self.mistakes = {}  # cards by kind; a card has captions and numbers
        self.card = None
        self.feed(self.source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.elements.append((tag, attrs))
        if tag not in VOID:
            self.open.append(tag)
        classes = (attrs.get("class") or "").split()
        if tag == "ol" and "mistakes" in classes:
            self.cards = self.mistakes.setdefault(classes[1], [])
        elif tag == "li" and self.open[-2] == "ol":
            self.card = {"captions": [], "numbers": []}
            self.cards.append(self.card)
        elif tag == "figcaption" and self.card is not None:
            self.card["captions"].append("")
        elif tag == "data":
            self.numbers.append(float(attrs["value"]))
            if self.card is not None:
                self.card["numbers"].append(self.numbers[-1])

    def handle_startendtag(self, tag, attrs):
        assert tag in ("circle", "path"), tag  # of SVG; HTML has no other elements without content
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag
        if tag == "ol":
            self.card = None

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)
        if self.card is not None and "figcaption" in self.open:
            self.card["captions"][-1] += data.strip()

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def read_page(path):
    """A page that is one self-contained, accessible file."""
    page = Page(path)
    assert page.source.startswith("<!DOCTYPE html>") and page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta") and any(m.get("name") == "viewport" for m in page.all("meta"))
    assert not page.all("script", "link", "iframe", "object")
    assert not any(words in page.source for words in ("@import", "url(", "http:", "https:", "file:"))
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.all("img"))
    assert all(drawing["role"] == "img" and drawing["aria-label"] for drawing in page.all("svg"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        target = link["href"]
        assert target[1:] in ids if target.startswith("#") else (Path(path).parent / unquote(target)).is_file(), target
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))
    assert "NaN" not in page.source and "nan" not in page.source.split("</style>")[1].split()
    return page
