"""How commands read their settings and how they fail: one sentence, exit status 2, no traceback."""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from meme.config import explain
from meme.errors import UserError
from meme.files import NO_ROOM
from meme.termination import Terminated, terminated_by_sigterm

Settings = TypeVar("Settings", bound=BaseModel)
WRONG_USE, INTERRUPTED, TERMINATED = 2, 130, 143


def read_settings(model: type[Settings], arguments: Sequence[str] | None, program: str) -> Settings:
    """The command line as validated settings: a flag for every field, its documentation as the help.

    The parser fills a plain record, so that it is the model that refuses a value, in its own words.
    """
    flags = [(name, _documented(field), dataclasses.field(default=field.default)) for name, field in model.model_fields.items()]
    record = dataclasses.make_dataclass(model.__name__, flags)
    return model.model_validate(dataclasses.asdict(tyro.cli(record, args=arguments, prog=program, description=model.__doc__)))


def _documented(field: FieldInfo) -> Any:
    return Annotated[field.annotation, tyro.conf.arg(help=field.description)]


@contextmanager
def exits_with_a_sentence(model: type[BaseModel]) -> Iterator[None]:
    """Turn what a user did wrong, or a full disk, into one sentence on standard error and exit status 2; Ctrl-C into status 130
    and SIGTERM into 143."""
    try:
        with terminated_by_sigterm():
            yield
    except ValidationError as error:
        _exit(explain(error, model))
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        _exit(f"{error.filename or 'a disk'}: {error.strerror}; make room, and the same command goes on from here")
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, Terminated)
        print(f"\n{'terminated' if terminated else 'interrupted'}; the same command goes on from here", file=sys.stderr)
        sys.exit(TERMINATED if terminated else INTERRUPTED)


def _exit(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(WRONG_USE)
