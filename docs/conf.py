"""How Sphinx builds the site out of README.md and this folder: ``make docs``."""

import re
from importlib.metadata import version as installed_version

project = "meme-nas"
author = "the authors of meme-nas"
version = release = installed_version("meme-nas")
copyright = "the authors of meme-nas, Apache License 2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "meme-nas"
html_copy_source = False
html_static_path: list[str] = []

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page that another one is included in begins where that leaves off

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 90

# Files at the root, as pages are called here: links in every file are those that work where the file lies.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LICENSE": "licence.md",
    "results/README.md": "results.md",
}


def to_pages(text: str) -> str:
    """Links to files of the repository as links to the site's pages."""
    for file, page in PAGES.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(file)}(#[^)]*)?\)", rf"]({page}\2)", text)
    return re.sub(r"\]\(docs/([^)]*)\)", r"](\1)", text)


def _on_source(app, name, source: list[str]) -> None:
    source[0] = to_pages(source[0])


def _on_include(app, path, parent, source: list[str]) -> None:
    source[0] = to_pages(source[0])


def setup(app) -> None:
    app.connect("source-read", _on_source)
    app.connect("include-read", _on_include)
