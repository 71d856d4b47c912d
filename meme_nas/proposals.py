"""Optuna as the proposer: the next point as a function of (seed, trial number, finished trials before it).

The sampler works on a study in memory that holds exactly the trials a proposal may know. So a resumed search proposes what the
unbroken one would have, and the proposals do not depend on the order in which parallel trials finish.
"""

from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
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
    """Proposes points of ``domains`` for some objectives to minimise."""

    _points: Sequence[tuple[Choices, Sequence[float]]] | None

    def __init__(self, domains: Mapping[str, Domain], sampler: str, objectives: int = 2):
        self.domains = domains
        self._sampler = sampler
        self._distributions = {name: distribution(domain) for name, domain in domains.items()}
        self._objectives = objectives
        self._forget()
        self._seen = 0

    def propose(self, known: Sequence[FrozenTrial], seed: int) -> Choices:
        """A point, given the finished trials ``known`` (in order; a later call has the same ones and more)."""
        for trial in known[self._seen :]:
            if trial.state == TrialState.COMPLETE and trial.params:
                self._add(trial.params, trial.values)
        self._seen = max(self._seen, len(known))
        return self._next(seed)

    def propose_after(self, points: Sequence[tuple[Choices, Sequence[float]]], seed: int) -> Choices:
        """A point, given others with their values, which may be others at every call."""
        if points is not self._points:
            self._forget()
            self._points = points
            for choices, values in points:
                self._add(choices, values)
        return self._next(seed)

    def _forget(self) -> None:
        self._points = None
        self._known, self._complete = optuna.create_study(directions=["minimize"] * self._objectives), 0

    def _add(self, choices: Choices, values: Sequence[float]) -> None:
        # NSGA-II looks for a trial's generation where it would have put it itself.
        generation = {NSGAIISampler._get_generation_key(): self._complete // STARTUP_TRIALS}
        distributions = {name: self._distributions[name] for name in choices}
        self._complete += 1
        self._known.add_trial(
            optuna.trial.create_trial(params=choices, distributions=distributions, values=values, system_attrs=generation)
        )

    def _next(self, seed: int) -> Choices:
        self._known.sampler = _sampler(self._sampler, seed)
        asked = self._known.ask(self._distributions)
        # A sampler ignores a failure: the result arrives as a trial of its own.
        self._known.tell(asked, state=TrialState.FAIL)
        return {name: _on_grid(domain, asked.params[name]) for name, domain in self.domains.items()}


def _on_grid(domain: Domain, value):
    """The grid's own number for a value that arithmetic may have moved by a rounding error."""
    return value if isinstance(domain, Choice) else min(domain.values, key=lambda other: abs(other - value))


def _sampler(kind: str, seed: int) -> BaseSampler:
    seed %= 2**32  # what numpy's generators take
    if kind == "random":
        return RandomSampler(seed=seed)
    if kind == "nsga2":
        return NSGAIISampler(seed=seed, population_size=STARTUP_TRIALS)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=False)
