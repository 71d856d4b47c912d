"""pydantic's complaint about a setting, as one sentence."""

import difflib
import reprlib
from typing import Any

from pydantic import BaseModel, ValidationError

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 78
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 8


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return a validation error's first complaint as one sentence: the field, what is wrong, what is allowed."""
    first = error.errors()[0]
    field = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(model, first["loc"][:-1]))
        near = difflib.get_close_matches(str(first["loc"][-1])[:80], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" or not field:
        return message
    message = message[0].lower() + message[1:]
    return f"{field}: {message}" if first["type"] == "missing" else f"{field}: {message}, not {_shown(first['input'])}"


def _shown(value: Any) -> str:
    """Return ``value`` as Python writes it, cut to 80 characters, in little time even where it is large."""
    try:
        return _REPR.repr(value)[:80]
    except ValueError:  # an integer of more digits than Python writes
        return "that"


def _dotted(location: tuple[str | int, ...]) -> str:
    """Write ``("experts", 0, "p")`` as ``experts[1].p``: experts and levels count from 1, as in the paper."""
    text = ""
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text if len(text) <= 160 else text[:157] + "..."


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> dict[str, Any]:
    """Return the field names of the settings nested at ``location``."""
    for part in location:
        if isinstance(part, int):
            continue
        nested = model.model_fields[part].annotation
        candidates = [nested, *getattr(nested, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model.model_fields
