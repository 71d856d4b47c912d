"""How commands read their settings and how they fail: one sentence, exit status 2, no traceback."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import tyro
from pydantic import BaseModel, ValidationError

from meme.config import explain
from meme.errors import UserError

Settings = TypeVar("Settings", bound=BaseModel)
WRONG_USE, INTERRUPTED = 2, 130


def read_settings(model: type[Settings], arguments: Sequence[str] | None, program: str) -> Settings:
    """The command line as validated settings: a flag for every field, its documentation as the help."""
    return tyro.cli(model, args=arguments, prog=program)


@contextmanager
def exits_with_a_sentence(model: type[BaseModel]) -> Iterator[None]:
    """Turn what a user did wrong into one sentence on standard error and exit status 2; Ctrl-C into status 130."""
    try:
        yield
    except ValidationError as error:
        _exit(explain(error, model))
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _exit(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(WRONG_USE)
