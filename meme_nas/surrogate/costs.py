"""What candidates cost, known before any training: each kind of cost is a sum over experts, so limits can be kept while choosing.

Shapes: ``K`` kinds of cost, ``M`` candidates.
"""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from meme.config.schema import Config
from meme.errors import UserError
from meme.pipeline import pick_device
from meme.scoring.cost import ensemble_cost, ensemble_latency_ms, step_shares
from meme_nas.settings import SearchSettings
from search_spaces.domain import Choices
from search_spaces.space import Space

Array = NDArray[np.float64]


class Costs:
    """The kinds of cost that ``settings`` minimise or limit, over ``space``."""

    def __init__(self, settings: SearchSettings, space: Space):
        self.settings, self.space = settings, space
        self.kinds = tuple(name for name in ("macs", "params", "latency_ms") if name in {*settings.objectives, *settings.limits})
        self.limits = np.array([settings.limits.get(kind, np.inf) for kind in self.kinds])

    @property
    def counted_kinds(self) -> tuple[str, ...]:
        """The kinds that are minimised and take no timing."""
        return tuple(kind for kind in self.kinds if kind in self.settings.objectives and kind != "latency_ms")

    @property
    def winner_limits(self) -> Array:
        """(K,) limits of a winner: no more than the hand-made pattern of what is minimised, and what the settings allow."""
        hand_made = self.total(self.space.base)
        minimised = np.array([kind in self.settings.objectives for kind in self.kinds], dtype=bool)
        return np.minimum(self.limits, np.where(minimised, hand_made, np.inf))

    def of(self, config: Config, number: int) -> Array:
        """(K,) what expert ``number`` adds to the costs of its ensemble."""
        return np.array([_share(kind, config, number, self.settings.device) for kind in self.kinds])

    def counted(self, config: Config, number: int) -> Array:
        """(K',) the same, of what is minimised and takes no timing: it can be asked for hundreds of candidates."""
        return np.array([_share(kind, config, number, self.settings.device) for kind in self.counted_kinds])

    def total(self, config: Config) -> Array:
        """(K,) of the whole ensemble."""
        return sum((self.of(config, number) for number in range(1, len(config.experts) + 1)), np.zeros(len(self.kinds)))

    def refusal(self, config: Config) -> str | None:
        """Why ``config`` is not worth training; None where nothing speaks against it."""
        if not self.settings.limits:
            return None
        for kind, cost, limit in zip(self.kinds, self.total(config), self.limits, strict=True):
            if cost > limit:
                return f"{cost:.4g} {_WORDS[kind]}, over max_{kind} {limit:.4g}"
        return None

    def may_fit(self, config: Config, number: int) -> bool:
        """Whether expert ``number`` of ``config`` is within the limits beside the cheapest other experts."""
        if not self.settings.limits:
            return True
        others = [cost for place, cost in enumerate(self._least, start=1) if place != number]
        return bool((self.of(config, number) + sum(others) <= self.limits).all())

    def check(self) -> None:
        """``UserError`` if a limit is below what the cheapest candidate costs."""
        if not self.settings.limits:
            return
        for kind, cost, limit in zip(self.kinds, np.sum(self._least, axis=0), self.limits, strict=True):
            fewer_experts = kind == "params" and "experts" in self.space.shared  # may have fewer than all of these
            if cost > limit and not fewer_experts:
                raise UserError(f"max_{kind}: no candidate has so few; the smallest of this space has {cost:.4g}")

    @cached_property
    def _least(self) -> list[Array]:
        """(K,) for every expert of the base: the least of each kind that descent finds, from the base and both ends of all
        choices."""
        count = len(self.space.base.experts)
        return [self._least_of(number) for number in range(1, count + 1)]

    def _least_of(self, number: int) -> Array:
        domains = self.space.experts_domains(number)
        starts = [self.space.expert_choices(self.space.base, number)]
        starts += [{name: domain.values[end] for name, domain in domains.items()} for end in (0, -1)]
        return np.array([min(self._descended(start, number, kind) for start in starts) for kind in range(len(self.kinds))])

    def _descended(self, choices: Choices, number: int, kind: int) -> float:
        """The cost of one kind when each choice of an expert is minimised in turn, the others held."""

        def cost(point: Choices) -> float:
            return float(self.of(self.space.with_expert(self.space.base, number, point), number)[kind])

        for name, domain in self.space.experts_domains(number).items():
            choices = min((choices | {name: value} for value in domain.values), key=cost)
        return cost(choices)


_WORDS = {"macs": "MACs", "params": "parameters", "latency_ms": "ms an image"}


def _share(kind: str, config: Config, number: int, device: str) -> float:
    if kind == "latency_ms":
        return ensemble_latency_ms(config, pick_device(device), only=number)
    cost = ensemble_cost(config)
    if kind == "params":
        return float(cost.experts[number - 1].params)
    return cost.experts[number - 1].macs * step_shares(config)[number - 1]
