"""The space that some dimensions span around a base config: choices to configs and back, as a whole or one expert at a time."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from meme.config.architecture import ExpertConfig
from meme.config.schema import Config, relative_place
from meme.errors import UserError
from search_spaces.dimensions import MOST_EXPERTS, SHARED, Coarse, known_dimensions
from search_spaces.domain import Choices, Domain

PAPER = ("split", "p")
"""The dimensions that the paper sets by hand: each expert's split of channels at every level, and its expertization
probability."""
FINE = Coarse()


def build_space(base: Config, dimensions: tuple[str, ...] = PAPER, coarse: Coarse = FINE) -> "Space":
    """Return the space of all configs that differ from ``base`` in ``dimensions`` only, in whatever order these are named.

    Raises ``UserError`` for a base without splits, and for a dimension that is unknown or leaves nothing to search.
    """
    return Space(base, dimensions, coarse)


class Space:
    """A space of configs, built by ``build_space``. ``domains`` holds every choice by its name: shared ones first, then expert
    by expert.

    Choices that cannot change what is trained give configs of equal ``architecture_id``: those of experts beyond the number of
    experts, and of pools that no channel meets.
    """

    def __init__(self, base: Config, dimensions: tuple[str, ...] = PAPER, coarse: Coarse = FINE):
        if not base.network.splits_channels:
            raise UserError(f"preset: {base.name} has no splits to search; take one of an iU-Net, such as digits-meme")
        known = known_dimensions(coarse)
        _check_names(dimensions, tuple(known))
        self.base = base
        self.most = len(base.experts)
        """Experts that a config of this space can have."""
        if "experts" in dimensions:
            self.most = min(max(self.most, MOST_EXPERTS), base.diffusion.timesteps)
        chosen = [known[name] for name in known if name in dimensions]
        self._common = [each for each in chosen if isinstance(each, SHARED)]
        self._own = [each for each in chosen if not isinstance(each, SHARED) and (self.most > 1 or each.matters_alone)]
        common = _merged(dimension.domains(base, self.most) for dimension in self._common)
        self.shared = tuple(common)
        """Names of the choices that do not belong to a single expert."""
        self.domains: dict[str, Domain] = common
        for number in range(1, self.most + 1):
            self.domains |= self.experts_domains(number)
        if not self.domains:
            raise UserError(f"dimensions: {' '.join(dimensions)} leave nothing to search in {base.name}")

    def experts_domains(self, number: int) -> dict[str, Domain]:
        """Return the entries of ``domains`` that belong to expert ``number`` alone."""
        return _named(number, _merged(dimension.domains(self.base) for dimension in self._own))

    def config(self, choices: Choices, name: str) -> Config:
        """Return the config that ``choices`` stand for."""
        config = self.base
        for dimension in self._common:
            config = dimension.apply(config, choices, self.base, self.most)
        experts = [self._expert(expert, number, choices) for number, expert in enumerate(config.experts, start=1)]
        return config.with_(name=name, experts=[expert.model_dump() for expert in experts])

    def choices(self, config: Config) -> Choices:
        """Return the choices that ``config``, which is of this space, stands for: the inverse of ``config``.

        Experts that it lacks get the choices of the base's expert in the same relative place; these have no effect.
        """
        choices = _merged(dimension.choices(config, self.base, self.most) for dimension in self._common)
        for number in range(1, self.most + 1):
            choices |= self.expert_choices(config, number)
        return choices

    def expert_choices(self, config: Config, number: int) -> Choices:
        """Return the choices that expert ``number`` of ``config`` stands for, named as in ``experts_domains``."""
        spare = self.base.experts[relative_place(number, self.most, len(self.base.experts))]
        expert = config.experts[number - 1] if number <= len(config.experts) else spare
        return _named(number, _merged(dimension.choices(expert, config.network) for dimension in self._own))

    def with_expert(self, config: Config, number: int, expert_choices: Choices) -> Config:
        """Return ``config`` with expert ``number`` changed as ``expert_choices`` say, on its own interval: one expert's
        candidate."""
        experts = [expert.model_dump() for expert in config.experts]
        experts[number - 1] = self._expert(config.expert(number), number, expert_choices).model_dump()
        return config.with_(experts=experts)

    def _expert(self, expert: ExpertConfig, number: int, choices: Choices) -> ExpertConfig:
        start = f"expert{number}."
        own = {name.removeprefix(start): value for name, value in choices.items() if name.startswith(start)}
        fields = _merged(dimension.fields(own, self.base.network) for dimension in self._own)
        return ExpertConfig.model_validate(expert.model_dump() | fields).canonical(self.base.network)


def _check_names(dimensions: tuple[str, ...], known: tuple[str, ...]) -> None:
    if not dimensions:
        raise UserError(f"dimensions: name at least one of {', '.join(known)}")
    for name in dimensions:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
            raise UserError(f"dimensions: there is no {name!r}; {hint}")


def _named(number: int, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the choices of expert ``number`` under their full names."""
    return {f"expert{number}.{suffix}": value for suffix, value in own.items()}


def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


class SplitSpace(Space):
    """The space of all configs that differ from ``base`` in splits and probabilities only; ``base`` itself is the hand-made
    pattern."""

    def __init__(self, base: Config):
        super().__init__(base)
