"""Configuration of the documentation: `sphinx-build -W docs build/docs`."""

import os
import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import get_type_hints

project = "fused_margin"
author = "The fused_margin authors"
copyright = f"2026, {author}"
version = release = version_of("fused_margin")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["**/README.md"]
nitpicky = True  # every reference in a docstring must have a target
# Other projects and the standard library, whose inventories are on the network.
nitpick_ignore_regex = [("py:class", r"(torch|numpy|np|collections|os|pathlib)\..*")]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "attrs_block"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
copybutton_prompt_text = r">>> |\.\.\. "  # what the button leaves out
copybutton_prompt_is_regexp = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

templates_path = ["_templates"]
html_theme = "pydata_sphinx_theme"
html_title = f"fused_margin {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_context = {"default_mode": "auto"}  # light or dark, as the system
html_sidebars = {page: [] for page in ("index", "faq", "changelog", "contributing")}  # pages without sections of pages
html_theme_options = {
    "github_url": "https://github.com/fused-margin/fused-margin",
    "header_links_before_dropdown": 7,
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
}
linkcheck_anchors = False  # GitHub renders the anchors of its pages by script

REPOSITORY = "https://github.com/fused-margin/fused-margin/blob/main"
ROOT = Path(__file__).parents[1]
COPIED = {  # pages that are files of the repository
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
    "results/head": "benchmarks/head/README.md",
    "start/examples": "examples/README.md",
}


def read_page(app, docname, source):
    """Reads a page that is copied, and turns links that leave the documentation into links to the repository."""
    folder = (ROOT / "docs" / docname).parent
    if docname in COPIED:
        path = ROOT / COPIED[docname]
        app.env.note_dependency(str(path))
        folder, source[0] = path.parent, path.read_text(encoding="utf-8")

    def replace(match):
        target = (folder / match[2]).resolve()
        if not target.exists():
            return match[0]
        if match[1].startswith("!"):  # Sphinx copies images from anywhere
            return f"{match[1]}({os.path.relpath(target, (ROOT / 'docs' / docname).parent)})"
        if target.is_relative_to(app.srcdir):
            return f"{match[1]}(/{target.relative_to(app.srcdir)})"
        return f"{match[1]}({REPOSITORY}/{target.relative_to(ROOT)})"

    source[0] = re.sub(r"(!?\[[^]]*\])\(((?!\w+:|#)[^)#\s]+)\)", replace, source[0])


def shorten_signature(app, what, name, obj, options, signature, return_annotation):
    """Shows **options without their TypedDict: the docstring says where they are described."""
    return signature and re.sub(r"(\*\*\w+): .*?Unpack\[[^]]*\]", r"\1", signature), return_annotation


def hide_option_texts(app, obj, bound_method):
    """Shows the types of a configuration without what they say to the command line."""
    if any("Annotated" in str(hint) for hint in getattr(obj, "__annotations__", {}).values()):
        obj.__annotations__ = get_type_hints(obj)


def correct_back_links(app, pagename, templatename, context, doctree):
    """Corrects links from sources to the reference: viewcode gives all names of a file the module of the first one."""
    objects = app.env.get_domain("py").objects

    def replace(match):
        parts = match[3].split(".")
        endings = [".".join(["", *parts[start:]]) for start in range(1, len(parts))]
        names = [
            name for end in endings for name in objects if name.endswith(end) and objects[name].docname == match[2]
        ]
        return match[1] + (match[3] if match[3] in objects or not names else names[0])

    if pagename.startswith("_modules/"):
        context["body"] = re.sub(r'("viewcode-back" href="[./]*([\w/-]+)\.html#)([\w.]+)', replace, context["body"])


def setup(app):
    app.connect("html-page-context", correct_back_links)
    app.connect("autodoc-before-process-signature", hide_option_texts)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("source-read", read_page)
