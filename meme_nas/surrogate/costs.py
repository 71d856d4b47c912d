"""Costs of candidates, computed before any training. Each kind of cost is a sum over experts, so proposals can keep limits.

MACs and parameters are counted here. Latency is returned by a function from the caller, which measures where trials run.

Shapes: ``K`` kinds of cost, ``M`` candidates, ``N`` experts.
"""

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from meme.config.schema import Config
from meme.errors import UserError
from meme.scoring.cost import ensemble_cost, step_shares
from meme_nas.settings import SearchSettings
from search_spaces.domain import Choices
from search_spaces.space import Space

Array = NDArray[np.float64]
Expert = tuple[Config, int]
"""A config, and the number of one of its experts."""
Latency = Callable[[Sequence[Expert]], Sequence[float]]
"""Function that returns the milliseconds an image takes through all sampler steps of each expert. It takes many experts at a
time, because a call may go to another process."""


class Costs:
    """Costs that ``settings`` minimise or limit, over ``space``."""

    def __init__(self, settings: SearchSettings, space: Space, latency: Latency | None = None):
        """Raise ``UserError`` if ``settings`` minimise or limit latency and ``latency`` is None."""
        self.settings, self.space, self._latency = settings, space, latency
        self.kinds = tuple(name for name in ("macs", "params", "latency_ms") if name in {*settings.objectives, *settings.limits})
        self.limits = np.array([settings.limits.get(kind, np.inf) for kind in self.kinds])
        if latency is None and "latency_ms" in self.kinds:
            raise UserError("latency_ms: is minimised or limited here, and no function was given that measures it in a worker")

    @property
    def counted_kinds(self) -> tuple[str, ...]:
        """Kinds of cost that are minimised and need no timing."""
        return tuple(kind for kind in self.kinds if kind in self.settings.objectives and kind != "latency_ms")

    @property
    def winner_limits(self) -> Array:
        """Limits (K,) on the costs of a winner: those of the settings, and the hand-made pattern's for minimised costs."""
        hand_made = self.total(self.space.base)
        minimised = np.array([kind in self.settings.objectives for kind in self.kinds], dtype=bool)
        return np.minimum(self.limits, np.where(minimised, hand_made, np.inf))

    def of(self, config: Config, number: int) -> Array:
        """Return the costs (K,) that expert ``number`` of ``config`` adds to its ensemble."""
        return self.rows([(config, number)])[0]

    def rows(self, experts: Sequence[Expert]) -> Array:
        """Return the costs (len(experts), K) that each expert adds to its ensemble."""
        columns = [self._of_kind(kind, experts) for kind in self.kinds]
        return np.column_stack(columns) if columns else np.zeros((len(experts), 0))

    def counted(self, config: Config, number: int) -> Array:
        """Return the costs of ``counted_kinds`` that expert ``number`` adds: cheap enough for hundreds of candidates."""
        return np.array([self._of_kind(kind, [(config, number)])[0] for kind in self.counted_kinds])

    def total(self, config: Config) -> Array:
        """Return the costs (K,) of the whole ensemble."""
        return np.array([self._total(kind, config) for kind in self.kinds])

    def refusal(self, config: Config) -> str | None:
        """Return the reason why ``config`` exceeds a limit; None if it keeps all.

        Latency is checked last, so that a config over another limit is not measured.
        """
        for kind, limit in self._limited:
            if (cost := self._total(kind, config)) > limit:
                return f"{cost:.4g} {_WORDS[kind]}, over max_{kind} {limit:.4g}"
        return None

    def may_fit(self, config: Config, number: int) -> bool:
        """Return True if expert ``number`` of ``config`` keeps the limits together with the cheapest other experts."""
        for kind, limit in self._limited:
            own, others = self._of_kind(kind, [(config, number)])[0], np.delete(self._least(kind), number - 1)
            if own + _sum(others) > limit:
                return False
        return True

    def check(self) -> None:
        """Raise ``UserError`` if a limit is below the cost of the cheapest candidate.

        The cheapest candidate is not searched for if the hand-made pattern keeps the limit.
        """
        for kind, limit in self._limited:
            if self._total(kind, self.space.base) <= limit:
                continue
            cost = _sum(self._least(kind))
            fewer_experts = kind == "params" and "experts" in self.space.shared  # may have fewer than all of these
            if cost > limit and not fewer_experts:
                raise UserError(f"max_{kind}: no candidate has so few; the smallest of this space has {cost:.4g}")

    @property
    def _limited(self) -> list[tuple[str, float]]:
        """Pairs of each limited kind of cost and its limit."""
        return [(kind, float(limit)) for kind, limit in zip(self.kinds, self.limits, strict=True) if limit < np.inf]

    def _of_kind(self, kind: str, experts: Sequence[Expert]) -> Array:
        """Return one kind of cost (len(experts),) that each expert adds."""
        if kind == "latency_ms":
            assert self._latency is not None
            return np.array(self._latency(experts), dtype=np.float64)
        return np.array([_counted(kind, config, number) for config, number in experts], dtype=np.float64)

    def _total(self, kind: str, config: Config) -> float:
        return _sum(self._of_kind(kind, [(config, number) for number in range(1, len(config.experts) + 1)]))

    @cache  # noqa: B019 (one of them lives as long as its command)
    def _least(self, kind: str) -> Array:
        """Return the lowest cost (N,) of one kind that coordinate descent finds for every expert of the base.

        Descents start from the base and from both ends of all choices, and minimise one choice at a time. All of them take the
        same step at the same time, so that one call covers the costs of a step. An expert whose dimensions have V values in all
        needs the costs of at most 3 V networks.
        """
        numbers = range(1, len(self.space.base.experts) + 1)
        owners = [number for number in numbers for _ in range(3)]
        points = [start for number in numbers for start in self._starts(number)]
        for dimension in zip(*(self.space.experts_domains(number).items() for number in owners), strict=True):
            options = [
                [point | {name: value} for value in domain.values]
                for point, (name, domain) in zip(points, dimension, strict=True)
            ]
            points = [own[int(np.argmin(costs))] for own, costs in zip(options, self._costs(kind, owners, options), strict=True)]
        ends = self._costs(kind, owners, [[point] for point in points])
        return np.array(ends).reshape(len(numbers), 3).min(axis=1)

    def _starts(self, number: int) -> list[Choices]:
        domains = self.space.experts_domains(number)
        ends = [{name: domain.values[end] for name, domain in domains.items()} for end in (0, -1)]
        return [self.space.expert_choices(self.space.base, number), *ends]

    def _costs(self, kind: str, owners: Sequence[int], options: Sequence[Sequence[Choices]]) -> list[Array]:
        """Return one kind of cost of all options of each expert in ``owners``, computed in one call."""
        base, paired = self.space.base, zip(owners, options, strict=True)
        experts = [(self.space.with_expert(base, number, point), number) for number, own in paired for point in own]
        edges = np.cumsum([len(own) for own in options])[:-1]
        return np.split(self._of_kind(kind, experts), edges)


_WORDS = {"macs": "MACs", "params": "parameters", "latency_ms": "ms an image"}


def _sum(values: Array) -> float:
    """Return the sum of ``values``, added in their order, so that the last bit does not depend on their number."""
    return float(np.cumsum([0.0, *values])[-1])


def _counted(kind: str, config: Config, number: int) -> float:
    cost = ensemble_cost(config)
    if kind == "params":
        return float(cost.experts[number - 1].params)
    return cost.experts[number - 1].macs * step_shares(config)[number - 1]
