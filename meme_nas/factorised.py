"""Search expert by expert: train candidates for every expert, then look for the best cascade of those that are trained.

The loss of a multi-expert model splits over the intervals, so M candidates of each of N experts give M^N cascades for the price
of M ensembles. FID does not split exactly, so cascades are scored together, those first of which a surrogate expects most.

It goes in rounds. The candidates of a round are proposed from what the surrogate credits earlier ones with, its cascades chosen
from all candidates so far. So that no worker waits, a round is proposed while the cascades of the one before are being scored:
it knows those of the round before that. Every answer follows from the study on disk and the settings alone.
"""

import random
from collections.abc import Sequence
from functools import cache

import numpy as np

from meme.config import Config
from meme.errors import UserError
from meme.seeding import derive_seed
from meme_nas.assembly import Assembly, Cascade
from meme_nas.proposals import Proposer
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.strategy import Strategy
from meme_nas.study import Study
from meme_nas.surrogate import Candidates, Surrogate
from meme_nas.trial_log import TrialRecord
from search_spaces.domain import Choices, draw, encoded, neighbours

ROUND = 2  # candidates of each expert, unless more trials run at a time than that keeps busy
ATTEMPTS = 60  # to propose a candidate that is new
CREDULOUS_ATTEMPTS = 10  # of them by the proposer, before chance takes over
POOL, PARENTS = 200, 4  # points drawn by chance, and candidates whose neighbours join them


class Factorised(Strategy):
    """Hands out trainings of single experts and scorings of cascades, and takes their outcomes."""

    unit = "experts"

    def __init__(self, settings: SearchSettings, study: Study, **replaced):
        super().__init__(settings, study, **replaced)
        if self.space.shared:
            shared = ", ".join(self.space.shared)
            raise UserError(f"strategy: factorised searches expert by expert, and {shared} belong to all of them; give joint")
        self.numbers = range(1, len(self.space.base.experts) + 1)
        self._own = {n: self.space.experts_domains(n) for n in self.numbers}
        self._proposers = {
            n: Proposer(self._own[n], "tpe" if settings.proposer == "model" else settings.proposer) for n in self.numbers
        }
        self._round = max(ROUND, -(-(settings.proposal_lag or LEAST_LAG) // len(self.numbers)))
        self._ends: list[int] = []
        self._ends_after = -1  # trials
        self._batches: dict[int, list[Cascade]] = {}
        self._models: dict[tuple[int, int], Surrogate | None] = {}
        self._interrupted += [trial for n in self.numbers for trial in self._log(n) if not trial.finished]

    def other_signals(self, trials: Sequence[TrialRecord]) -> dict[str, list[float]]:
        """What the surrogate says, and the sum of the experts' interval losses."""
        last, end = len(self.rounds) - 1, self.rounds[-1]
        model, cascades = self._model(last, end), [self._cascade(trial, end) for trial in trials]
        if model is None or None in cascades:
            return {}
        logs = [self._log(n) for n in self.numbers]
        losses = [sum(log[place].outcome.loss for log, place in zip(logs, c, strict=True)) for c in cascades]
        return {"surrogate": [float(value) for value in model.predict(cascades)], "sum of interval losses": losses}

    # --- How far it is ----------------------------------------------------------------------------

    @property
    def candidates(self) -> int:
        """Candidates of each expert that the budget pays for, beside the yardsticks; the hand-made pattern is the first."""
        return max(1, self.settings.budget // self.settings.training_seeds - (len(self.yardsticks) - 1))

    @property
    def rounds(self) -> list[int]:
        """How many candidates each expert has at the end of every round. Rounds of the study stay as they were when the budget
        is raised."""
        if self._ends_after != len(self.study.trials):
            self._ends_after = len(self.study.trials)
            past = sorted({trial.candidates for trial in self._cascades})
            self._ends = [end for end in past if end <= self.candidates]
            while not self._ends or self._ends[-1] < self.candidates:
                self._ends.append(min(self.candidates, (self._ends[-1] if self._ends else 0) + self._round))
        return self._ends

    @property
    def spent(self) -> tuple[int, int]:
        """Expert trainings that are done, and all that are to be."""
        finished = sum(trial.finished for n in self.numbers for trial in self._log(n))
        yardsticks = sum(trial.finished for trial in self.study.trials[1 : len(self.yardsticks)])
        each = len(self.numbers)
        return finished + each * yardsticks, each * (self.candidates + len(self.yardsticks) - 1)

    @property
    def done(self) -> bool:
        last = len(self.rounds) - 1
        return not self._interrupted and self._yardsticks_done and self._trained(last) and self._scored(last)

    def _log(self, number: int) -> list[TrialRecord]:
        return self.study.experts(number).records

    @property
    def _cascades(self) -> list[TrialRecord]:
        return self.study.trials[len(self.yardsticks) :]

    @property
    def _yardsticks_done(self) -> bool:
        trials = self.study.trials[: len(self.yardsticks)]
        return len(trials) == len(self.yardsticks) and all(trial.finished for trial in trials)

    def _trained(self, place: int) -> bool:
        """Whether the candidates of rounds 0 to ``place`` are finished."""
        end = self.rounds[place] if place >= 0 else 0
        return all(len(self._log(n)) >= end and all(trial.finished for trial in self._log(n)[:end]) for n in self.numbers)

    def _scored(self, place: int) -> bool:
        """Whether the cascades of rounds 0 to ``place`` are finished."""
        if place < 0:
            return True
        if not (self._yardsticks_done and self._trained(place) and self._scored(place - 1)):
            return False
        started = self._of_round(place)
        return len(started) >= len(self._batch(place)) and all(trial.finished for trial in started)

    def _of_round(self, place: int) -> list[TrialRecord]:
        return [trial for trial in self._cascades if trial.candidates == self.rounds[place]]

    # --- What comes next --------------------------------------------------------------------------

    def _next(self) -> TrialRecord | None:
        return self._next_yardstick() or self._next_cascade() or self._next_expert()

    def _next_expert(self) -> TrialRecord | None:
        """Start the next candidate, experts in turn, if what its proposal must know is known."""
        counts = {n: len(self._log(n)) for n in self.numbers}
        index = min(counts.values())
        place = next((place for place, end in enumerate(self.rounds) if end > index), None)
        if place is None or not self._trained(place - 1) or not self._scored(place - 2):
            return None
        number = min(self.numbers, key=lambda n: (counts[n], n))
        choices = self._candidate(number, index, place)
        config = self._with({number: choices}, f"expert-{number}-{index:03d}")
        return self.study.experts(number).start(config, "expert", choices, self.distributions)

    def _next_cascade(self) -> TrialRecord | None:
        """Start the next cascade of the first round that has one left."""
        for place, end in enumerate(self.rounds):
            if not (self._yardsticks_done and self._trained(place) and self._scored(place - 1)):
                return None
            started, batch = self._of_round(place), self._batch(place)
            if len(started) < len(batch):
                chosen = {n: self._log(n)[index].choices for n, index in zip(self.numbers, batch[len(started)], strict=True)}
                config = self._with(chosen, f"trial-{len(self.study.trials):03d}")
                choices = self.space.choices(config)
                return self.study.start(config, "candidate", choices, self.distributions, candidates=end)
        return None

    # --- Candidates of one expert -----------------------------------------------------------------

    def _candidate(self, number: int, index: int, place: int) -> Choices:
        """Choices of candidate ``index`` of expert ``number``: first the hand-made ones, then those of a warm start, then
        proposals; where nothing new is found, the last proposal, which costs nothing."""
        known = [trial.choices for trial in self._log(number)]
        given = [self._part(number, choices) for choices in (self.space.choices(self.space.base), *self.warm)]
        for choices in given if index else given[:1]:
            if choices not in known:
                return choices
        for attempt in range(ATTEMPTS):
            seed = derive_seed(self.settings.seed, "candidate", number, index, attempt)
            choices = self._proposal(number, place, seed, by_chance=attempt >= CREDULOUS_ATTEMPTS)
            if self._is_new(number, choices):
                break
            self.repeats += 1
        return choices

    def _proposal(self, number: int, place: int, seed: int, by_chance: bool) -> Choices:
        if by_chance:
            return draw(self._own[number], random.Random(seed))
        model = self._model(place - 2, self.rounds[place - 1]) if place >= 2 else None
        if self.settings.proposer != "model" or model is None:
            return self._proposers[number].propose_after(self._signals(number, place), seed)
        return self._imagined(number, model, self.rounds[place - 1], seed)

    def _imagined(self, number: int, model: Surrogate, end: int, seed: int) -> Choices:
        """The best under a draw from the model, out of points drawn by chance and the neighbours of the best candidates."""
        own, chance = self._own[number], random.Random(seed)
        credit, _ = model.contributions(number)
        best = [self._log(number)[index].choices for index in np.argsort(credit)[:PARENTS]]
        pool = [draw(own, chance) for _ in range(POOL)] + [near for choices in best for near in neighbours(own, choices)]
        places = np.array([encoded(own, choices) for choices in pool])
        drawn = model.draw_new(number, places, np.random.default_rng(seed))
        return pool[int(np.argmin(drawn))]

    def _is_new(self, number: int, choices: Choices) -> bool:
        """Whether no earlier candidate is the same expert, and a cascade with it can keep the limits."""
        config = self._with({number: choices}, "")
        earlier = [trial.config.canonical_expert(number) for trial in self._log(number)]
        return config.canonical_expert(number) not in earlier and self.costs.may_fit(config, number)

    @cache  # noqa: B019 (one strategy lives as long as its command)
    def _signals(self, number: int, place: int) -> list[tuple[Choices, tuple[float, float]]]:
        """Candidates of the rounds before with what a proposal learns from: the surrogate's credit, or before there is any the
        interval loss; and MACs."""
        end = self.rounds[place - 1] if place else 0
        trials, model = self._log(number)[:end], self._model(place - 2, end)
        credit = model.contributions(number)[0] if model else [trial.outcome and trial.outcome.loss for trial in trials]
        return [
            (trial.choices, (float(value), float(trial.outcome.macs)))
            for trial, value in zip(trials, credit, strict=True)
            if trial.state == "complete"
        ]

    # --- Cascades ---------------------------------------------------------------------------------

    def _batch(self, place: int) -> list[Cascade]:
        """The cascades of round ``place``, given those of the rounds before."""
        end = self.rounds[place]
        if end not in self._batches:
            earlier = [trial for trial in self.study.trials if trial.choices and trial.candidates < end]
            known = {cascade for trial in earlier if (cascade := self._cascade(trial, end))}
            new = end - (self.rounds[place - 1] if place else 0)
            source = np.random.default_rng(derive_seed(self.settings.seed, "cascades", end))
            assembly = self._assembly(end)
            count = self.settings.cascades_per_candidate * new if all(map(len, assembly.ready)) else 0
            self._batches[end] = assembly.choose(count, known, self._model(place - 1, end), source)
        return self._batches[end]

    def _assembly(self, end: int) -> Assembly:
        logs = [self._log(n)[:end] for n in self.numbers]
        ready = tuple(np.array([i for i, trial in enumerate(log) if self._usable(log, i)], dtype=int) for log in logs)
        costs = tuple(
            np.array([self.costs.of(trial.config, n) for trial in log]) for n, log in zip(self.numbers, logs, strict=True)
        )
        return Assembly(ready, costs, self.costs.winner_limits, self.costs.limits)

    def _usable(self, log: list[TrialRecord], index: int) -> bool:
        """Whether a candidate is trained, and the first of its choices."""
        first = next(place for place, trial in enumerate(log) if trial.choices == log[index].choices)
        return log[index].state == "complete" and first == index

    def _model(self, place: int, end: int) -> Surrogate | None:
        """Fitted to the cascades of rounds 0 to ``place``, over the first ``end`` candidates; None where none is scored."""
        if place < 0:
            return None
        if (place, end) not in self._models:
            kept = [t for t in self.study.trials if t.choices and t.candidates <= self.rounds[place] and t.state == "complete"]
            rows = [(cascade, t.outcome.values(self.settings.objectives)[0]) for t in kept if (cascade := self._cascade(t, end))]
            candidates = [self._known(n, end) for n in self.numbers]
            self._models[place, end] = Surrogate(candidates, *zip(*rows, strict=True)) if rows else None
        return self._models[place, end]

    def _known(self, number: int, end: int) -> Candidates:
        trials = self._log(number)[:end]
        losses = [trial.outcome.loss if trial.state == "complete" else np.nan for trial in trials]
        return Candidates(np.array([encoded(self._own[number], trial.choices) for trial in trials]), np.array(losses))

    def _cascade(self, trial: TrialRecord, end: int) -> Cascade | None:
        """Which candidates ``trial`` put together; None if some are not among the first ``end``."""
        places = []
        for n in self.numbers:
            own, log = self._part(n, trial.choices), self._log(n)[:end]
            places.append(next((index for index, candidate in enumerate(log) if candidate.choices == own), None))
        return None if None in places else tuple(places)

    def _part(self, number: int, choices: Choices) -> Choices:
        return {name: choices[name] for name in self._own[number]}

    def _with(self, candidates: dict[int, Choices], name: str) -> Config:
        """The hand-made pattern with some experts' choices replaced."""
        config = self.space.base
        for number, own in candidates.items():
            config = self.space.with_expert(config, number, own)
        return config.with_(name=name)
