"""Base of all settings, and how a wrong value is told: in one sentence that names the field and what is allowed. No torch."""

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meme.errors import UserError

Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


class Settings(BaseModel):
    """Base of all settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """A validation error's first complaint as one sentence: the field, what is wrong, what is allowed."""
    first = error.errors()[0]
    field = _dotted(first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_fields_at(model, first["loc"][:-1]))
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
        return f"{field}: unknown key; {hint}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" or not field:
        return message
    message = message[0].lower() + message[1:]
    return f"{field}: {message}" if first["type"] == "missing" else f"{field}: {message}, not {first['input']!r:.80}"


def _dotted(location: tuple[str | int, ...]) -> str:
    """``("experts", 0, "p")`` as ``experts[1].p``: experts and levels count from 1, as in the paper."""
    text = ""
    for part in location:
        text += f"[{part + 1}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _fields_at(model: type[BaseModel], location: tuple[str | int, ...]) -> dict[str, Any]:
    """The field names of the settings nested at ``location``."""
    for part in location:
        if isinstance(part, int):
            continue
        nested = model.model_fields[part].annotation
        candidates = [nested, *getattr(nested, "__args__", ())]
        model = next(kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel))
    return model.model_fields
