"""What to run next and what came of it: budget, yardsticks, repeats, refusals, resume. It does not know who runs the trials."""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial

from meme.config import Config
from meme.cost import ensemble_cost
from meme.errors import UserError
from meme.presets import yardsticks
from meme.seeding import derive_seed
from meme_nas.proposals import Proposer, distribution
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.study import Study, TrialRecord, finished_before
from meme_nas.trial import Outcome, Task
from search_spaces.domain import Choices, draw, neighbours
from search_spaces.space import Space, build_space

REPEATS_BEFORE_WALK = 10  # proposals seen before in a row, after which an unseen neighbour is taken instead
REFUSALS_BEFORE_WALK = 20  # proposals over max_macs in a row, after which a cheaper point is sought directly


class Search:
    """Hands out tasks and takes outcomes; every answer follows from the study on disk and the settings alone.

    An engine calls ``next_task`` whenever it has room, ``record`` whenever a task has ended, until ``done``.
    """

    def __init__(self, settings: SearchSettings, study: Study):
        self.settings, self.study = settings, study
        self.space = build_space(settings.as_proxy(settings.full_config()), settings.dimensions)
        self._proposer = Proposer(self.space.domains, settings.sampler)
        self._distributions = {name: distribution(domain) for name, domain in self.space.domains.items()}
        self._yardsticks = [
            (kind, settings.as_proxy(settings.applied_to(config))) for kind, config in yardsticks(settings.preset_name).items()
        ]
        self._interrupted = [trial for trial in study.trials if not trial.finished]
        self.exhausted = False
        """Whether no point is left that is new and fits ``max_macs``."""
        self.repeats = 0
        """Proposals that had been tried before, and so cost nothing."""

    @property
    def counted(self) -> list[TrialRecord]:
        """The trials the budget pays for: all but those refused before training."""
        return [trial for trial in self.study.trials if trial.state != "refused"]

    @property
    def done(self) -> bool:
        """Whether the budget is spent (or the space exhausted) and every trial finished."""
        if not all(trial.finished for trial in self.study.trials):
            return False
        return self.exhausted or len(self.counted) >= self.settings.budget

    def next_task(self) -> Task | None:
        """A task to run now, or None: then wait for an outcome, or stop if ``done``."""
        if self._interrupted:
            return _task(self._interrupted.pop(0))
        while not self.exhausted and len(self.counted) < self.settings.budget:
            trial = self._start_next()
            if trial is None:
                return None
            if not trial.finished:
                return _task(trial)
        return None

    def record(self, outcome: Outcome) -> TrialRecord:
        """Take what a task came to; a score that is not a finite number is a failure."""
        if outcome.failure is None and not (_finite(outcome.fid) and _finite(outcome.macs)):
            outcome = replace(outcome, failure=f"score is not a finite number (fid {outcome.fid}, macs {outcome.macs})")
        return self.study.finish(outcome)

    def _start_next(self) -> TrialRecord | None:
        """Start (or refuse) the next trial; None where a proposal still lacks a result it must know."""
        number = len(self.study.trials)
        if number < len(self._yardsticks):
            kind, config = self._yardsticks[number]
            choices = self.space.choices(config) if config.network.splits_channels else {}
            return self.study.start(config, kind, choices, self._distributions)
        known = finished_before(self.study.frozen_trials(), number - (self.settings.proposal_lag or LEAST_LAG) + 1)
        if known is None:
            return None
        choices = self._unseen_choices(number, known)
        if choices is None:
            self.exhausted = True
            return None
        config = self.space.config(choices, f"trial-{number:03d}")
        return self.study.start(config, "candidate", choices, self._distributions, refused=self._refusal(config))

    def _refusal(self, config: Config) -> str | None:
        """Why ``config`` is not worth training, known before any training; None where nothing speaks against it."""
        macs, limit = ensemble_cost(config).macs, self.settings.max_macs
        return f"{macs:.4g} MACs, over max_macs {limit:.4g}" if limit and macs > limit else None

    def _unseen_choices(self, number: int, known: list) -> Choices | None:
        """The proposal for trial ``number``; where it repeats an architecture, another one, at no cost."""
        seen = {trial.config.architecture_id for trial in self.study.trials}
        source = random.Random(derive_seed(self.settings.seed, "walk", number))
        choices: Choices = {}
        for attempt in range(REPEATS_BEFORE_WALK):
            choices = self._proposer.propose(known, derive_seed(self.settings.seed, "proposal", number, attempt))
            if self._refused_in_a_row() >= REFUSALS_BEFORE_WALK:
                break
            if self._architecture(choices) not in seen:
                return choices
            self.repeats += 1
        return self._walk(choices, seen, source)

    def _walk(self, start: Choices, seen: set[str], source: random.Random) -> Choices | None:
        """The first unseen point that fits ``max_macs`` on a random walk from ``start``, with jumps; None if there is none."""
        domains, point = self.space.domains, start
        for step in range(2_000):
            config = self.space.config(point, "")
            if config.architecture_id not in seen and not self._refusal(config):
                return point
            point = draw(domains, source) if step % 50 == 49 else source.choice(list(neighbours(domains, point)))
        return None

    def _refused_in_a_row(self) -> int:
        count = 0
        for trial in reversed(self.study.trials):
            if trial.state != "refused":
                break
            count += 1
        return count

    def _architecture(self, choices: Choices) -> str:
        return self.space.config(choices, "").architecture_id


def check_macs_limit(max_macs: float | None, space: Space) -> None:
    """``UserError`` if no candidate seems to be under the limit: none of those found by descent from several starts."""
    if max_macs is None:
        return
    least = math.inf
    for start in _starts(space):
        for choices in (start, _descended(space, start)):
            least = min(least, _macs(space, choices))
            if least <= max_macs:
                return
    raise UserError(f"max_macs: no candidate has so few; the smallest of this space has {least:.4g}")


def _starts(space: Space) -> Iterator[Choices]:
    """The hand-made pattern, and its experts at either end of all their domains."""
    base = space.choices(space.base)
    own = [name for name in space.domains if name not in space.shared]
    for end in (None, 0, -1):
        yield base if end is None else base | {name: space.domains[name].values[end] for name in own}


def _descended(space: Space, choices: Choices) -> Choices:
    """``choices`` with each expert's minimised one at a time. Experts have equal domains; what they share only weighs them."""
    for number in range(1, len(space.base.experts) + 1):
        for name, domain in space.experts_domains(number).items():
            choices = min(({**choices, name: value} for value in domain.values), key=partial(_macs, space))
    return choices


def winner(trials: Iterable[TrialRecord]) -> TrialRecord | None:
    """Lowest FID of the searched space at no more MACs than the hand-made pattern (which wins if nothing beats it)."""
    scored = [trial for trial in trials if trial.state == "complete" and trial.choices]
    limit = next((trial.outcome.macs for trial in scored if trial.kind == "hand-made"), math.inf)
    return min((trial for trial in scored if trial.outcome.macs <= limit), key=lambda trial: trial.outcome.fid, default=None)


def _macs(space: Space, choices: Choices) -> float:
    return ensemble_cost(space.config(choices, "")).macs


def _task(trial: TrialRecord) -> Task:
    return Task(trial.number, trial.config, trial.kind)


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
