"""Where commands print: results, remarks with progress, and for scripts one JSON object instead."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console

# Names of files and settings may hold square brackets: nothing that is printed is markup.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""Results a person reads."""
remarks = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
"""What was noticed on the way, and progress."""


@dataclass(frozen=True)
class Output:
    """How much a command prints."""

    quiet: bool = False
    """Print results and errors only: no progress, no remarks."""
    json: bool = False
    """Print one JSON object with the results on standard output and nothing else; progress and remarks go to standard error."""


_as_json = False


@contextmanager
def printing(output: Output) -> Iterator[None]:
    """Print as ``output`` says until the context ends."""
    global _as_json
    before = _as_json, console.quiet, remarks.quiet, remarks.stderr
    _as_json, console.quiet, remarks.quiet, remarks.stderr = output.json, output.json, output.quiet, output.json
    try:
        yield
    finally:
        _as_json, console.quiet, remarks.quiet, remarks.stderr = before


@contextmanager
def as_a_step() -> Iterator[None]:
    """Keep ``emit`` from printing within the context: a command that is a step of another one has no result of its own."""
    global _as_json
    before, _as_json = _as_json, False
    try:
        yield
    finally:
        _as_json = before


def emit(result: dict[str, Any] | list[Any]) -> None:
    """Print the result of a command as JSON on standard output, if ``--json`` was given. Paths and the like become text."""
    if _as_json:
        print(json.dumps(result, default=str, allow_nan=False))
