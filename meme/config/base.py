"""Base of all settings, and the numbers they take. No torch."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from meme.errors import UserError

LARGEST = 2**53  # integers that every program reads back as they were written
MOST_LEVELS, MOST_EXPERTS = 16, 1_000

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


def require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


class Settings(BaseModel):
    """Base of all settings: frozen, all numbers finite, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
