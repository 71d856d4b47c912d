"""Last scores of winner and yardsticks with fresh noise, because the noise that chose the winner favours it."""

from functools import cached_property

from meme.config.schema import Config
from meme_nas.record.tasks import FINALIST
from meme_nas.record.trial_log import TrialRecord
from meme_nas.rescoring.base import Rescoring
from meme_nas.rescoring.chosen import Chosen
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy

FRESH_SEEDS = (1_001, 1_002, 1_003)  # sampling noise that no trial was scored with


class Finalists(Rescoring):
    """Last scores of winner and yardsticks. It may only be used when search and audit are done.

    Each task is one configuration with one sampling seed, scored with the number of samples of a full training.
    """

    unit = "finalists"
    kind = FINALIST

    def __init__(self, settings: SearchSettings, search: Strategy, chosen: Chosen):
        super().__init__(settings, search, search.study.finalists())
        self._chosen = chosen

    @cached_property
    def chosen(self) -> list[TrialRecord]:
        """Complete yardsticks and the winner, in the order of their trials."""
        trials, best = self._search.study.trials, self._chosen.best
        found = [trial for trial in trials if trial.state == "complete" and trial.is_yardstick]
        return found if best is None or any(trial is best for trial in found) else [*found, best]

    def _ways(self, trial: TrialRecord) -> list[Config]:
        samples = self.settings.full_config().evaluation.samples
        return [trial.config.with_(evaluation={"samples": samples, "seed": seed}) for seed in FRESH_SEEDS]

    def _seeds(self, config: Config) -> tuple[int, ...]:
        return self.settings.seeds
