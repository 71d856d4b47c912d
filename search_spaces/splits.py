"""The paper's space: every expert's split of channels at every level, and its expertization probability."""

from meme.config.schema import Config
from search_spaces.space import Space


class SplitSpace(Space):
    """All configs that differ from ``base`` in splits and probabilities only; ``base`` itself is the hand-made pattern."""

    def __init__(self, base: Config):
        super().__init__(base)
