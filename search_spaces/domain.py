"""Named dimensions, each a finite grid, and the space they span. No torch, no Optuna, no Ray."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

Value = int | float | str
Choices = dict[str, Value]
"""One point of a space: the value chosen in every dimension."""


@dataclass(frozen=True)
class Choice:
    """One of some unordered options."""

    options: tuple[Value, ...]

    @property
    def values(self) -> tuple[Value, ...]:
        return self.options

    def neighbours(self, value: Value) -> tuple[Value, ...]:
        """Return all other options: none is nearer than another."""
        return tuple(option for option in self.options if option != value)


@dataclass(frozen=True)
class Integer:
    """Integers ``low``, ``low + step`` ... up to ``high``."""

    low: int
    high: int
    step: int = 1

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(range(self.low, self.high + 1, self.step))

    def neighbours(self, value: Value) -> tuple[int, ...]:
        """Return one step down and one up, where they exist."""
        return tuple(other for other in (int(value) - self.step, int(value) + self.step) if self.low <= other <= self.high)


@dataclass(frozen=True)
class Real:
    """Reals on a grid: ``low``, ``low + step`` ... up to ``high``, each rounded so that equal choices are equal numbers."""

    low: float
    high: float
    step: float

    @cached_property
    def values(self) -> tuple[float, ...]:
        steps = round((self.high - self.low) / self.step)
        return tuple(round(self.low + index * self.step, 9) for index in range(steps + 1))

    def neighbours(self, value: Value) -> tuple[float, ...]:
        """Return one step down and one up, where they exist."""
        place = self.values.index(round(float(value), 9))
        return tuple(self.values[other] for other in (place - 1, place + 1) if 0 <= other < len(self.values))


Domain = Choice | Integer | Real


def size(domains: Mapping[str, Domain]) -> int:
    """Return the number of points of the space."""
    return math.prod(len(domain.values) for domain in domains.values())


def points(domains: Mapping[str, Domain]) -> Iterator[Choices]:
    """Yield all points. Those that differ only in the last dimension follow each other."""
    return (dict(zip(domains, values, strict=True)) for values in itertools.product(*(d.values for d in domains.values())))


def draw(domains: Mapping[str, Domain], source: random.Random) -> Choices:
    """Draw one point uniformly."""
    return {name: source.choice(domain.values) for name, domain in domains.items()}


def neighbours(domains: Mapping[str, Domain], choices: Choices) -> Iterator[Choices]:
    """Yield the points that differ from ``choices`` by one step in one dimension."""
    for name, domain in domains.items():
        for value in domain.neighbours(choices[name]):
            yield choices | {name: value}


def encoded(domains: Mapping[str, Domain], choices: Choices) -> list[float]:
    """Encode a point as numbers in [0, 1] that are near where choices are: its place on each grid. Each option of a ``Choice``
    is a coordinate of its own."""
    numbers: list[float] = []
    for name, domain in domains.items():
        values, value = domain.values, choices[name]
        if isinstance(domain, Choice):
            numbers += [float(value == option) for option in values]
        else:
            numbers.append(values.index(value) / max(1, len(values) - 1))
    return numbers
