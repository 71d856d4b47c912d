"""Optuna as the proposer: the next point as a function of (seed, trial number, finished trials before it).

The sampler works on a study in memory that holds exactly the trials that a proposal may use. So a resumed search makes the same
proposals as an unbroken one, and proposals do not depend on the order in which parallel trials finish.
"""

from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from search_spaces.domain import Choice, Choices, Domain, Integer

STARTUP_TRIALS = 10  # random trials before TPE fits a model

Point = tuple[Choices, Sequence[float] | None]
"""Choices and their objective values; None if the trial failed or was refused."""


def distribution(domain: Domain) -> BaseDistribution:
    """Return the Optuna distribution of one dimension."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if isinstance(domain, Integer):
        return IntDistribution(domain.low, domain.high, step=domain.step)
    return FloatDistribution(domain.low, domain.high, step=domain.step)


class Proposer:
    """Proposer of points in ``domains`` that minimise a number of objectives."""

    _points: Sequence[Point] | None
    _seen: int

    def __init__(self, domains: Mapping[str, Domain], sampler: str, objectives: int = 2):
        self.domains = domains
        self._sampler = sampler
        self._distributions = {name: distribution(domain) for name, domain in domains.items()}
        self._objectives = objectives
        self._forget()

    def propose(self, known: Sequence[FrozenTrial], seed: int) -> Choices:
        """Return a point, given the finished trials ``known`` of one study, in order.

        A call that extends the list of the call before is cheapest: only new trials are added.
        """
        if len(known) < self._seen:
            self._forget()
        for trial in known[self._seen :]:
            if trial.params:
                self._add(trial.params, trial.values if trial.state == TrialState.COMPLETE else None)
        self._seen = len(known)
        return self._next(seed)

    def propose_after(self, points: Sequence[Point], seed: int) -> Choices:
        """Return a point, given other ``points`` with their values, which may change from call to call."""
        if points is not self._points:
            self._forget()
            self._points = points
            for choices, values in points:
                self._add(choices, values)
        return self._next(seed)

    def _forget(self) -> None:
        self._points, self._seen = None, 0
        self._known, self._added = optuna.create_study(directions=["minimize"] * self._objectives), 0

    def _add(self, choices: Choices, values: Sequence[float] | None) -> None:
        """Add a point to the sampler's study. A point without values violates a constraint."""
        # NSGA-II reads a trial's generation from the attribute that it writes itself.
        generation = {_OrderedNSGAII._get_generation_key(): self._added // STARTUP_TRIALS}
        self._added += 1
        self._known.add_trial(
            optuna.trial.create_trial(
                params=choices,
                distributions={name: self._distributions[name] for name in choices},
                values=[0.0] * self._objectives if values is None else values,
                system_attrs=generation,
                constraints={"usable": 1.0} if values is None else None,
            )
        )

    def _next(self, seed: int) -> Choices:
        self._known.sampler = _sampler(self._sampler, seed)
        asked = self._known.ask(self._distributions)
        # Samplers ignore failed trials. The result is added later as a trial of its own.
        self._known.tell(asked, state=TrialState.FAIL)
        return {name: _on_grid(domain, asked.params[name]) for name, domain in self.domains.items()}


def _on_grid(domain: Domain, value):
    """Return the grid's number nearest to ``value``, which may have a rounding error."""
    return value if isinstance(domain, Choice) else min(domain.values, key=lambda other: abs(other - value))


def _sampler(kind: str, seed: int) -> BaseSampler:
    seed %= 2**32  # the range of numpy's seeds
    if kind == "random":
        return RandomSampler(seed=seed)
    if kind == "nsga2":
        return _OrderedNSGAII(seed=seed, population_size=STARTUP_TRIALS)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=False)


class _OrderedNSGAII(NSGAIISampler):
    """NSGA-II sampler whose proposals do not depend on earlier calls.

    Optuna's sampler draws parents from a list that is sorted by crowding when a generation begins, and by number later.
    """

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)
