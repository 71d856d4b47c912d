"""The winner as chosen by search, audit and choice of p."""

from functools import cached_property

from meme_nas.record.ranking import cost_limits, winner
from meme_nas.record.trial_log import TrialRecord
from meme_nas.rescoring.audit import Audit, audited_winner, judged, regret
from meme_nas.rescoring.findings import Judged, Regret, Rescored
from meme_nas.rescoring.probabilities import Probabilities
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy


class Chosen:
    """The winner of the search, or of the audit if there is one, with the p chosen for it.

    Results are cached, so each property must only be read after the stages it depends on are done.
    """

    def __init__(self, settings: SearchSettings, search: Strategy, audit: Audit | None):
        self._settings, self._search, self._audit = settings, search, audit
        self.probabilities = Probabilities(settings, search, lambda: self.found) if settings.chooses_p_last else None

    @cached_property
    def audited(self) -> list[Rescored]:
        """Results of the audit; empty without one."""
        return self._audit.results() if self._audit else []

    @cached_property
    def searched(self) -> TrialRecord | None:
        """The search's winner, without regard to the audit."""
        return winner(self._search.study.trials, self._settings.objectives)

    @cached_property
    def regret(self) -> Regret | None:
        """Regret of the search's winner against the best audited trial; None without an audit."""
        return regret(self.audited, self.searched, self._settings.objectives, self._limits)

    @cached_property
    def judged(self) -> Judged | None:
        """Comparison of the audit's winner with the hand-made pattern; None if the audit kept no seeds for it."""
        return judged(self.audited, self.found, self._audit.choosers) if self._audit and self.audited else None

    @cached_property
    def found(self) -> TrialRecord | None:
        """The audit's winner, or the search's without an audit."""
        choosers = self._audit.choosers if self._audit else None
        return audited_winner(self.audited, self._settings.objectives, self._limits, choosers) or self.searched

    @cached_property
    def best(self) -> TrialRecord | None:
        """The trial ``found`` with the best p of each expert."""
        return self.probabilities.applied() if self.probabilities else self.found

    @property
    def _limits(self) -> list[float]:
        return cost_limits(self._search.study.trials, self._settings.objectives)
