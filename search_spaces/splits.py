"""The paper's space: every expert's split of channels at every level, and its expertization probability.

A dimension is named after what it sets: ``expert2.level1.low`` is C_l of expert 2 at the finest level, ``expert2.p`` its p_n.
"""

from dataclasses import dataclass

from meme.config import Config
from meme.errors import UserError
from search_spaces.domain import Choices, Domain, Integer, Real

P_STEP = 0.1


@dataclass(frozen=True)
class SplitSpace:
    """All configs that differ from ``base`` in splits and probabilities only; ``base`` itself is the hand-made pattern."""

    base: Config

    def __post_init__(self):
        if not self.base.network.splits_channels:
            raise UserError(f"preset: {self.base.name} has no splits to search; take one of an iU-Net, such as digits-meme")

    @property
    def domains(self) -> dict[str, Domain]:
        network = self.base.network
        domains: dict[str, Domain] = {}
        for number in range(1, len(self.base.experts) + 1):
            for level, width in enumerate(network.widths, start=1):
                domains[f"expert{number}.level{level}.low"] = Integer(0, width, network.head_channels)
            if len(self.base.experts) > 1:  # alone, an expert's interval is all of T, and p changes nothing
                domains[f"expert{number}.p"] = Real(P_STEP, 1.0, P_STEP)
        return domains

    def config(self, choices: Choices, name: str) -> Config:
        """The config that ``choices`` stand for."""
        experts = []
        for number, expert in enumerate(self.base.experts, start=1):
            low = [choices[f"expert{number}.level{level}.low"] for level in range(1, self.base.network.levels + 1)]
            p = choices.get(f"expert{number}.p", expert.p)
            experts.append(expert.model_dump() | {"low_channels": low, "p": p})
        return self.base.with_(name=name, experts=experts)

    def choices(self, config: Config) -> Choices:
        """The choices that ``config`` stands for: the inverse of ``config``."""
        choices: Choices = {}
        for number, expert in enumerate(config.experts, start=1):
            for level, low in enumerate(expert.low_channels, start=1):
                choices[f"expert{number}.level{level}.low"] = low
            if len(config.experts) > 1:
                choices[f"expert{number}.p"] = expert.p
        return choices
