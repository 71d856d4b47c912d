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

Point = tuple[Choices, Sequence[float] | None]
"""Choices and their values; None where they have none, because the trial failed or was refused."""


def distribution(domain: Domain) -> BaseDistribution:
    """Optuna's form of one dimension."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.options)
    if isinstance(domain, Integer):
        return IntDistribution(domain.low, domain.high, step=domain.step)
    return FloatDistribution(domain.low, domain.high, step=domain.step)


class Proposer:
    """Proposes points of ``domains`` for some objectives to minimise."""

    _points: Sequence[Point] | None
    _seen: int

    def __init__(self, domains: Mapping[str, Domain], sampler: str, objectives: int = 2):
        self.domains = domains
        self._sampler = sampler
        self._distributions = {name: distribution(domain) for name, domain in domains.items()}
        self._objectives = objectives
        self._forget()

    def propose(self, known: Sequence[FrozenTrial], seed: int) -> Choices:
        """Return a point, given the finished trials ``known`` of one study, in order. A call with more of them costs least."""
        if len(known) < self._seen:
            self._forget()
        for trial in known[self._seen :]:
            if trial.params:
                self._add(trial.params, trial.values if trial.state == TrialState.COMPLETE else None)
        self._seen = len(known)
        return self._next(seed)

    def propose_after(self, points: Sequence[Point], seed: int) -> Choices:
        """Return a point, given others with their values, which may be others at every call."""
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
        """Add a point to what the sampler learns from; one without values violates a constraint."""
        # NSGA-II looks for a trial's generation where it would have put it itself.
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
        # A sampler ignores what is told to have failed: the result arrives as a trial of its own.
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
        return _OrderedNSGAII(seed=seed, population_size=STARTUP_TRIALS)
    return TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=False)


class _OrderedNSGAII(NSGAIISampler):
    """NSGA-II whose proposals do not depend on what was proposed before.

    Optuna's own draws parents from a list that is sorted by crowding when a generation begins, and by number later on.
    """

    def get_parent_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        return sorted(super().get_parent_population(study, generation), key=lambda trial: trial.number)
