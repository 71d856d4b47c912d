"""How commands read their settings and how they fail: one sentence, exit status 2, no traceback."""

import dataclasses
import difflib
import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from meme.cli.console import Output
from meme.config.messages import explain
from meme.errors import TrainingDiverged, UserError
from meme.support.files import NO_ROOM, expanded, settle_paths
from meme.support.signals import terminated_by_sigterm, was_terminated

Settings = TypeVar("Settings", bound=BaseModel)
NOTHING_FOUND = 1
UNREAD, WRONG_USE, INTERRUPTED, TERMINATED = 1, 2, 130, 143  # the first as rich has it

# Error numbers of a place that cannot be written: whose fault that is, the user can see.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
_SAYS_NONE = re.compile(r"\s*\bNone: (.+?)\.(?=\s|$)")

PARSING = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
"""Grouped options are named without their group, and a switch has no --no-switch."""
POSITIONAL = tyro.conf.Positional
BY_CONFIG = "(default: as the config says)"


def hint(metavar: str, default: str | None = None) -> Any:
    """Return the annotation that names an option's value in the help and, where the default is no value, says what leaving the
    option out means."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default)


def read_settings(
    model: type[Settings],
    arguments: Sequence[str] | None,
    program: str,
    groups: Mapping[str, Sequence[str]] = MappingProxyType({}),
    example: str = "",
) -> tuple[Settings, Output]:
    """Parse a command line into validated settings and how much to print. Each field is a flag, and its documentation is the
    help.

    The parser fills plain records, so that the model itself refuses a value, in its own words. ``groups`` maps the titles of
    the help's sections to names of fields; fields in no group are listed last. ``example`` is a whole command, for the help.
    """
    arguments = with_homes(sys.argv[1:] if arguments is None else arguments)
    check_flags({name: field.annotation for name, field in model.model_fields.items()} | {"output": Output}, arguments)
    known = {name: [field for field in fields if field in model.model_fields] for name, fields in groups.items()}
    grouped = {field for fields in known.values() for field in fields}
    known["more"] = [name for name in model.model_fields if name not in grouped]
    records = {name: _record(name, model, fields) for name, fields in known.items() if fields} | {"output": Output}
    parts = [(name, record, dataclasses.field(default_factory=record)) for name, record in records.items()]
    whole = dataclasses.make_dataclass(model.__name__, parts)
    description = f"{model.__doc__}\n\nExample: {example}" if example else model.__doc__
    parsed: Any = tyro.cli(whole, args=arguments, prog=program, description=description, config=PARSING)
    given = [dataclasses.asdict(getattr(parsed, name)) for name in records if name != "output"]
    return model.model_validate({name: value for part in given for name, value in part.items()}), parsed.output


def _record(name: str, model: type[BaseModel], fields: Sequence[str]) -> type:
    flags = [(field, _documented(info), dataclasses.field(default=info.default)) for field, info in _infos(model, fields)]
    return dataclasses.make_dataclass(name, flags, namespace={"__doc__": ""})


def _infos(model: type[BaseModel], fields: Sequence[str]) -> list[tuple[str, FieldInfo]]:
    return [(field, model.model_fields[field]) for field in fields]


def _documented(field: FieldInfo) -> Any:
    """Return a field's type with its documentation as the help. What the documentation says about None becomes the help's
    default."""
    text = " ".join((field.description or "").split())
    if field.default is not None:
        return Annotated[field.annotation, tyro.conf.arg(help=text)]
    said = _SAYS_NONE.search(text)
    without = f"(default: {said[1]})" if said else "(default: none)"
    help_text = _SAYS_NONE.sub("", text).strip()
    return Annotated[field.annotation, tyro.conf.arg(help=help_text, metavar=_metavar(field), help_behavior_hint=without)]


def _metavar(field: FieldInfo) -> str:
    """Return the name of the value of an option that may be None: its choices, or its type."""
    kind = next(kind for kind in get_args(field.annotation) if kind is not type(None))
    if choices := _literals(kind):
        return f"{{{','.join(choices)}}}"
    return (get_args(kind)[0] if get_origin(kind) is Annotated else kind).__name__.upper()


def with_homes(words: Sequence[str]) -> list[str]:
    """Return ``words`` of a command line with ``~`` expanded at the beginning of values. Shells leave ``--study=~/x`` as it
    is."""
    return [_with_home(word) for word in words]


def _with_home(word: str) -> str:
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{expanded(value)}" if value.startswith("~") else word


def check_words(verbs: Mapping[str, Callable[..., None]], words: Sequence[str]) -> None:
    """Raise ``UserError`` for an unknown verb, flag or choice. The message names the nearest known one."""
    if not words or words[0].startswith("-"):
        return
    if words[0] not in verbs:
        raise UserError(f"there is no verb {words[0]!r}; {_nearest(words[0], list(verbs))}")
    check_flags(get_type_hints(verbs[words[0]], include_extras=True), words[1:])


def check_flags(options: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Raise ``UserError`` for a flag that is not in ``options`` (flag to type), or for a value that is none of its choices."""
    choices, flag = _choices(options), ""
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            flag, _, value = word.partition("=")
            flag = flag.replace("_", "-")
            if flag not in choices and flag != "--help" and not flag.startswith("--tyro-"):
                raise UserError(f"there is no option {flag}; {_nearest(flag, list(choices))}")
        else:
            value = word
        if value and (allowed := choices.get(flag)) and value not in allowed:
            raise UserError(f"{flag.strip('-')}: {value!r} is not allowed; {_nearest(value, allowed)}")
        flag = "" if value else flag  # what follows a first value may be an argument without a flag


def _choices(options: Mapping[str, Any]) -> dict[str, list[str]]:
    """Map every flag to its allowed values, or to an empty list where any value is allowed. Fields of nested records have flags
    of their own."""
    found: dict[str, list[str]] = {}
    for name, kind in options.items():
        if dataclasses.is_dataclass(kind):
            found |= _choices(get_type_hints(kind, include_extras=True))
        elif name != "return" and POSITIONAL not in getattr(kind, "__metadata__", ()):
            found[f"--{name.replace('_', '-')}"] = _literals(kind)
    return found


def _literals(kind: Any) -> list[str]:
    """Return the values of the first Literal in a type, and "None" where the type also allows None."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    inner = [_literals(part) for part in get_args(kind) if part is not Ellipsis]
    values = next((values for values in inner if values), [])
    return [*values, "None"] if values and type(None) in get_args(kind) else values


def _nearest(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {near[0]}?" if near else f"allowed are {', '.join(allowed)}"


@contextmanager
def exits_with_a_sentence(model: type[BaseModel], *, resumes: bool = True) -> Iterator[None]:
    """Turn errors into exit statuses: a user's mistake, or a disk that is full or cannot be written, into one sentence on
    standard error and 2; Ctrl-C into 130; SIGTERM into 143; a reader that left (``| head``) into 1.

    ``resumes`` says whether the same command resumes after an interruption or starts over.
    """
    how = "the same command goes on from here" if resumes else "the same command starts over"
    try:
        with terminated_by_sigterm(), _interruptions_unwrapped(), _all_printed():
            settle_paths()
            yield
    except ValidationError as error:
        _exit(explain(error, model))
    except (UserError, TrainingDiverged) as error:
        _exit(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            sys.exit(UNREAD)
        if error.errno in _NOT_WRITABLE:
            _exit(f"{error.filename or 'a file of the results'}: {error.strerror}")
        if error.errno not in NO_ROOM:
            raise
        _exit(f"{error.filename or 'a disk'}: {error.strerror}; make room, and {how}")
    except KeyboardInterrupt:
        terminated = was_terminated()
        print(f"\n{'terminated' if terminated else 'interrupted'}; {how}", file=sys.stderr)
        sys.exit(TERMINATED if terminated else INTERRUPTED)


@contextmanager
def _interruptions_unwrapped() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` in place of the exception that a library made of one.

    pydantic raises an error of its own when one of its callbacks is interrupted, and the release of a lock may fail when it was
    interrupted halfway.
    """
    try:
        yield
    except Exception as error:
        behind: list[BaseException] = [error]
        for each in behind:  # which grows
            if isinstance(each, KeyboardInterrupt):
                raise each from None
            behind += [other for other in (each.__cause__, each.__context__) if other and other not in behind]
        raise


@contextmanager
def _all_printed() -> Iterator[None]:
    """Flush standard output and error at the end of the context. Otherwise only the interpreter's exit would, where errors
    cannot be caught.

    A character that the output cannot show is printed as its escape. Closed standard streams are replaced by the null device
    before another file takes their number.
    """
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        sys.stdout.flush()


def _open_closed_streams() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest number that is free, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _reader_left() -> bool:
    """Return whether standard output is a pipe that nobody reads any longer. If so, the rest of the output is discarded, since
    the interpreter's exit would fail too."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    left = any(event & (select.POLLERR | select.POLLHUP) for _, event in output.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return left


def _exit(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(WRONG_USE)
