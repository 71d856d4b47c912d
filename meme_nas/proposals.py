"""Optuna as the proposer: the next point as a function of (seed, trial number, finished trials before it).

The sampler works on a study in memory that holds exactly the trials a proposal may know. So a resumed search proposes what the
unbroken one would have, and the proposals do not depend on the order in which parallel trials finish.
"""

from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search_spaces.domain import Choice, Choices, Domain, Integer

STARTUP_TRIALS = 10  # drawn at random before TPE has a model


def distribution(domain: Domain) -> BaseDistribution:
    """Optuna's form of one dimension."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if isinstance(domain, Integer):
        return IntDistribution(domain.low, domain.high, step=domain.step)
    return FloatDistribution(domain.low, domain.high, step=domain.step)


class Proposer:
    """Proposes points of ``domains`` for two objectives to minimise."""

    def __init__(self, domains: Mapping[str, Domain], sampler: str):
        self.domains = domains
        self._sampler = sampler
        self._distributions = {name: distribution(domain) for name, domain in domains.items()}
        self._known = optuna.create_study(directions=["minimize", "minimize"])
        self._seen = 0

    def propose(self, known: Sequence[FrozenTrial], seed: int) -> Choices:
        """A point, given the finished trials ``known`` (in order; a later call has the same ones and more)."""
        for trial in known[self._seen :]:
            if trial.state == TrialState.COMPLETE and trial.params:
                self._known.add_trial(trial)
        self._seen = max(self._seen, len(known))
        self._known.sampler = _sampler(self._sampler, seed)
        asked = self._known.ask(self._distributions)
        self._known.tell(asked, state=TrialState.FAIL)  # a sampler ignores it: the result arrives as a trial of its own
        return {name: _on_grid(domain, asked.params[name]) for name, domain in self.domains.items()}


def _on_grid(domain: Domain, value):
    """The grid's own number for a value that arithmetic may have moved by a rounding error."""
    return value if isinstance(domain, Choice) else min(domain.values, key=lambda other: abs(other - value))


def _sampler(kind: str, seed: int) -> BaseSampler:
    seed %= 2**32  # what numpy's generators take
    if kind == "random":
        return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=False)
