"""Docstrings, comments, messages and docs avoid the phrases that a reader has to take apart, as far as a pattern finds them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest
from conftest import ROOT

CODE = sorted(
    [
        *chain.from_iterable((ROOT / name).rglob("*.py") for name in ("meme", "meme_nas", "search_spaces", "benchmarks")),
        ROOT / "run_search.py",
    ]
)
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])
"""``results/README.md`` is missing: a record of what was measured keeps its words."""

FRAGMENT = re.compile(r"(Of|By|With|What|Whether)\b")
"""A docstring that begins so needs the name above it to be a sentence."""

PHRASE = re.compile(
    r"\b(anew|so many|(?:comes?|came|coming) to|(?:goes?|going|went) on where|but for|a row an? \w+)\b", re.IGNORECASE
)
BETWEEN = re.compile(r"[\s#]+")
"""What stands between two words that are on two lines."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every module's, class's and function's docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield node.body[0].lineno, text


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every string, docstrings and the fixed parts of f-strings included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and text of every comment; comments on lines that follow each other are one."""
    first, last, text = 0, -1, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        if line != last + 1:
            if text:
                yield first, text
            first, text = line, ""
        last, text = line, f"{text} {token.string}"
    if text:
        yield first, text


def phrases(parts: Iterator[tuple[int, str]]) -> list[str]:
    return [f"line {line}: {found[0]}" for line, text in parts for found in PHRASE.finditer(BETWEEN.sub(" ", text))]


def faults(source: str) -> list[str]:
    """Return the faults of one Python file; names are no prose."""
    tree = ast.parse(source)
    found = [f"line {line}: docstring begins with {text.split()[0]}" for line, text in docstrings(tree) if FRAGMENT.match(text)]
    if PHRASE.search(re.sub(r"[\s#\"'\\]+", " ", source)):
        found += phrases(strings(tree)) + phrases(comments(source))
    return found


@pytest.mark.parametrize("path", CODE, ids=name_of)
def test_code_speaks_plainly(path):
    assert not faults(path.read_text())


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pages_speak_plainly(path):
    assert not phrases(iter([(1, path.read_text())]))


def test_faults_are_found():
    source = (
        '"""Of a module."""\n'
        "anew = 1  # as\n"
        "# so\n"
        "# many\n"
        "def what():\n"
        '    """Return what it\n    comes to."""\n'
        '    return f"{anew} goes on " "where it was", r"but for \\d"\n'
    )
    assert sorted(faults(source)) == [
        "line 1: docstring begins with Of",
        "line 2: so many",
        "line 6: comes to",
        "line 8: but for",
        "line 8: goes on where",
    ]
    assert faults('"""Return one."""\nanew = 1\nso_many = anew  # plain\n') == []
