"""The dimensions that a space can vary, by name: the entries of ``known_dimensions``. docs/add-a-dimension.md shows how to add
another.

A dimension names its choices after what they set. Names of one expert's choices begin with the expert (``expert2.level1.low``
is C_l of expert 2 at the finest level, ``expert2.p`` its p_n). Names of shared choices do not (``experts`` is the number of
experts).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

from meme.config.architecture import ExpertConfig, HighPool, LowPool, NetworkConfig, TimeConditioning
from meme.config.schema import Config, even_intervals, relative_place
from meme.errors import UserError
from search_spaces.domain import Choice, Choices, Domain, Integer, Real

P_STEP = 0.1
POOL_STRIDES = (1, 2, 4)
MOST_EXPERTS = 8
CUTS = 20  # interval boundaries lie on a grid of about CUTS parts of T


@dataclass(frozen=True)
class Coarse:
    """A coarser grid for splits and probabilities, for a space small enough to be enumerated."""

    head_step: int = 1
    """Heads between two values of C_l; must divide every level's heads."""
    p_values: tuple[float, ...] = ()
    """The values of p_n; empty: 0.1 to 1 in steps of 0.1."""

    def low_channels(self, base: Config, level: int) -> Domain:
        width, head = base.network.widths[level - 1], base.network.head_channels
        if self.head_step < 1 or width // head % self.head_step:
            raise UserError(f"coarse.head_step: must divide the {width // head} heads of level {level}, not {self.head_step}")
        return Integer(0, width, self.head_step * head)

    def p(self, base: Config) -> Domain:
        return Choice(self.p_values) if self.p_values else Real(P_STEP, 1.0, P_STEP)


@dataclass(frozen=True)
class OfLevel:
    """One choice for every level of an expert, ``expertN.levelK.<suffix>``: a field of ``ExpertConfig`` that is a tuple."""

    suffix: str
    field: str
    mixing: str
    """Name of the field in ``meme.config.architecture.Mixing``."""
    domain: Callable[[Config, int], Domain]
    matters_alone = True

    def domains(self, base: Config) -> dict[str, Domain]:
        return {self._name(level): self.domain(base, level) for level in range(1, base.network.levels + 1)}

    def choices(self, expert: ExpertConfig, network: NetworkConfig) -> Choices:
        levels = range(1, network.levels + 1)
        return {self._name(level): getattr(expert.mixing(network, level), self.mixing) for level in levels}

    def fields(self, choices: Choices, network: NetworkConfig) -> dict[str, Any]:
        return {self.field: tuple(choices[self._name(level)] for level in range(1, network.levels + 1))}

    def _name(self, level: int) -> str:
        return f"level{level}.{self.suffix}"


@dataclass(frozen=True)
class OfExpert:
    """One choice for an expert, ``expertN.<suffix>``: a field of ``ExpertConfig``."""

    suffix: str
    field: str
    domain: Callable[[Config], Domain]
    matters_alone: bool = True
    """True if it can change an expert that is the only one."""

    def domains(self, base: Config) -> dict[str, Domain]:
        return {self.suffix: self.domain(base)}

    def choices(self, expert: ExpertConfig, network: NetworkConfig) -> Choices:
        return {self.suffix: getattr(expert, self.field)}

    def fields(self, choices: Choices, network: NetworkConfig) -> dict[str, Any]:
        return {self.field: choices[self.suffix]}


class NumberOfExperts:
    """``experts``: their number. They have even intervals, and each is like the base's expert in the same relative place.

    All experts together train as long as the base's do, whatever their number.
    """

    def domains(self, base: Config, most: int) -> dict[str, Domain]:
        return {"experts": Integer(1, most)}

    def choices(self, config: Config, base: Config, most: int) -> Choices:
        return {"experts": len(config.experts)}

    def apply(self, config: Config, choices: Choices, base: Config, most: int) -> Config:
        count, own = int(choices["experts"]), len(base.experts)
        if count == own:
            return config
        intervals = even_intervals(count, base.diffusion.timesteps)
        experts = [
            base.experts[relative_place(number, count, own)].model_copy(update={"interval": interval})
            for number, interval in enumerate(intervals, start=1)
        ]
        return config.with_(experts=experts, training={"steps": max(1, round(base.training.steps * own / count))})


class Boundaries:
    """``interval1.length``, ``interval2.length`` ...: relative lengths, so that any choice gives boundaries in order and no
    empty interval.

    Boundaries are rounded to a grid of ``parts`` of T.
    """

    def domains(self, base: Config, most: int) -> dict[str, Domain]:
        parts, timesteps = self.parts(base, most), base.diffusion.timesteps
        if parts > timesteps:
            raise UserError(f"dimensions: boundaries needs at least {parts} timesteps, not {timesteps}")
        self.choices(base, base, most)  # refuses a base that lies off the grid
        return {f"interval{number}.length": Integer(1, parts) for number in range(1, most + 1)} if most > 1 else {}

    def choices(self, config: Config, base: Config, most: int) -> Choices:
        parts, timesteps = self.parts(base, most), config.diffusion.timesteps
        edges = [0, *(expert.interval[1] for expert in config.experts)]
        places = [round(edge * parts / timesteps) for edge in edges]
        if [round(timesteps * place / parts) for place in places] != edges:
            raise UserError(
                f"dimensions: boundaries lie on a grid of 1/{parts} of {timesteps} timesteps, those of {edges} do not"
            )
        lengths = [end - first for first, end in itertools.pairwise(places)] + [1] * (most - len(config.experts))
        return {f"interval{number}.length": length for number, length in enumerate(lengths, start=1)} if most > 1 else {}

    def apply(self, config: Config, choices: Choices, base: Config, most: int) -> Config:
        if most == 1:
            return config
        parts, timesteps = self.parts(base, most), base.diffusion.timesteps
        lengths = [int(choices[f"interval{number}.length"]) for number in range(1, len(config.experts) + 1)]
        edges = [round(timesteps * place / parts) for place in places_of(lengths, parts)]
        experts = [
            expert.model_copy(update={"interval": interval})
            for expert, interval in zip(config.experts, itertools.pairwise(edges), strict=True)
        ]
        return config.with_(experts=experts)

    def parts(self, base: Config, most: int) -> int:
        """Return a number of parts near ``CUTS`` for which the base's even intervals lie on the grid."""
        return len(base.experts) * -(-max(CUTS, most) // len(base.experts))


def places_of(lengths: list[int], parts: int) -> list[int]:
    """Lay ``lengths`` out one after the other over 0 to ``parts``, rounded, each at least 1. Lengths that sum up to ``parts``
    give their cumulative sum."""
    places, total = [0], sum(lengths)
    for number, reached in enumerate(itertools.accumulate(lengths), start=1):
        wanted = round(parts * reached / total)
        places.append(min(max(wanted, places[-1] + 1), parts - (len(lengths) - number)))
    return places


def pool_strides(base: Config, level: int) -> Choice:
    """Return those of the known strides, and the network's own, that divide the level's pixels."""
    side, own = base.image.size // 2 ** (level - 1), base.network.pool_stride(level)
    return Choice(tuple(stride for stride in sorted({*POOL_STRIDES, own}) if side % stride == 0))


Dimension = OfLevel | OfExpert | NumberOfExperts | Boundaries
SHARED = (NumberOfExperts, Boundaries)


def known_dimensions(coarse: Coarse) -> dict[str, Dimension]:
    """Return every dimension by the name that selects it. Shared ones are applied in this order."""
    return {
        "split": OfLevel("low", "low_channels", "low_channels", coarse.low_channels),
        "p": OfExpert("p", "p", coarse.p, matters_alone=False),
        "pool_stride": OfLevel("pool_stride", "pool_strides", "pool_stride", pool_strides),
        "low_pool": OfLevel("low_pool", "low_pools", "low_pool", lambda base, level: Choice(get_args(LowPool))),
        "high_pool": OfLevel("high_pool", "high_pools", "high_pool", lambda base, level: Choice(get_args(HighPool))),
        "time": OfExpert("time", "time_conditioning", lambda base: Choice(get_args(TimeConditioning))),
        "experts": NumberOfExperts(),
        "boundaries": Boundaries(),
    }
