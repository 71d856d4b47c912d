"""Which trial is the winner, as far as the work after the search has chosen it."""

from functools import cached_property

from meme_nas.record.ranking import cost_limits, winner
from meme_nas.record.trial_log import TrialRecord
from meme_nas.rescoring.audit import Audit, audited_winner, judged, regret
from meme_nas.rescoring.findings import Judged, Regret, Rescored
from meme_nas.rescoring.probabilities import Probabilities
from meme_nas.settings import SearchSettings
from meme_nas.strategies.base import Strategy


class Chosen:
    """The winner: the search's, or the audit's where there is one, with the p that were chosen for it.

    Each part is to be asked when what it follows from is done.
    """

    def __init__(self, settings: SearchSettings, search: Strategy, audit: Audit | None):
        self._settings, self._search, self._audit = settings, search, audit
        self.probabilities = Probabilities(settings, search, lambda: self.found) if settings.chooses_p_last else None

    @cached_property
    def audited(self) -> list[Rescored]:
        """Return what came of the audit; empty without one."""
        return self._audit.results() if self._audit else []

    @cached_property
    def searched(self) -> TrialRecord | None:
        """Return the search's winner, whatever the audit says."""
        return winner(self._search.study.trials, self._settings.objectives)

    @cached_property
    def regret(self) -> Regret | None:
        """Return how much the search's winner costs against the best of the audited; None without an audit."""
        return regret(self.audited, self.searched, self._settings.objectives, self._limits)

    @cached_property
    def judged(self) -> Judged | None:
        """Return the audit's judgement of its winner, by seeds that did not choose it; None where it left none."""
        return judged(self.audited, self.found, self._audit.choosers) if self._audit and self.audited else None

    @cached_property
    def found(self) -> TrialRecord | None:
        """Return the audit's winner, else the search's."""
        choosers = self._audit.choosers if self._audit else None
        return audited_winner(self.audited, self._settings.objectives, self._limits, choosers) or self.searched

    @cached_property
    def best(self) -> TrialRecord | None:
        """Return the same with the best p of each expert."""
        return self.probabilities.applied() if self.probabilities else self.found

    @property
    def _limits(self) -> list[float]:
        return cost_limits(self._search.study.trials, self._settings.objectives)
