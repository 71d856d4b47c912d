"""Search expert by expert: train candidates for every expert, then look for the best cascade of those that are trained.

The loss of a multi-expert model is a sum over the intervals, so M candidates of each of N experts give M^N cascades for the price
of M ensembles. FID is not exactly a sum. Cascades are therefore scored as a whole, in the order that a surrogate predicts.

The search runs in rounds. Each round proposes candidates from the surrogate's credit for earlier ones, trains them, and scores
cascades of all candidates so far. The second half of a round's cascades is chosen when the first half is scored. Round r is
proposed while round r - 1 is trained and scored, so that no worker waits: its proposals use the results of rounds 0 to r - 2.
Every answer is a function of the study on disk and the settings.
"""

import random
from collections.abc import Iterator, Sequence
from functools import cache

import moocore
import numpy as np

from meme.config.schema import Config
from meme.errors import UserError
from meme.support.seeding import derive_seed
from meme_nas.record.study import Study
from meme_nas.record.trial_log import TrialRecord
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.strategies.base import Strategy
from meme_nas.strategies.candidates import Roster
from meme_nas.strategies.optuna_proposer import Point, Proposer
from meme_nas.strategies.prospects import Prospects
from meme_nas.surrogate.choose_cascades import Assembly, Cascade
from meme_nas.surrogate.model import Surrogate
from search_spaces.domain import Choices, draw

KEPT = 2  # half of a rung's candidates are promoted to the next rung, where they train for twice the steps
ROUND = 2  # trainings in a round for each that can run at a time; with fewer, workers wait
ROUND_GROWTH = 16  # a round adds at least one candidate for every 16 of an expert: later ones change the surrogate less
WAVES = 2  # the cascades of a round are chosen in two halves
ATTEMPTS = 60  # seeds tried to propose a new candidate
CREDULOUS_ATTEMPTS = 10  # of these seeds, the first are the proposer's; the others draw at random
MOST_CASCADES = 800  # cascades that the surrogate is fitted to
EVERY_ROUND, MILESTONES = 16, 1.25  # hyperparameters are refitted after rounds 0 to 16, then at growing intervals
RECENT = 4  # rounds whose surrogates are kept in memory
LEAST_KNOWN = 2  # candidates of an expert; with fewer, a surrogate cannot distinguish choices


class Factorised(Strategy):
    """Strategy that trains single experts and scores cascades of them."""

    unit = "experts"

    def __init__(self, settings: SearchSettings, study: Study, rung: int = 0, **replaced):
        """Train candidates at ``rung``, the number of rungs below proxy length."""
        super().__init__(settings, study.rung(rung), **replaced)
        self.rung, self.steps = rung, steps_at(rung, self.space.base.training.steps)
        if self.space.shared:
            shared = ", ".join(self.space.shared)
            raise UserError(f"strategy: factorised searches expert by expert, and {shared} belong to all of them; give joint")
        self.numbers = range(1, len(self.space.base.experts) + 1)
        self._own = {n: self.space.experts_domains(n) for n in self.numbers}
        self._proposers = {
            n: Proposer(self._own[n], "tpe" if settings.proposer == "model" else settings.proposer, len(settings.objectives))
            for n in self.numbers
        }
        self._minimised = [column for column, kind in enumerate(self.costs.kinds) if kind in settings.objectives]
        """Indices of the minimised kinds of cost, among the kinds that are minimised or limited."""
        self._round = -(-ROUND * (settings.proposal_lag or LEAST_LAG) // len(self.numbers))
        self._rosters = {n: Roster(self.study.experts(n), n, self._own[n], self.costs) for n in self.numbers}
        self._ends: list[int] = []
        self._places: list[Cascade | None] = []  # the cascade of every trial
        self._by_round: dict[int, list[int]] = {}  # numbers of cascades, by the number of candidates they were chosen from
        self._rounds_over = 0
        self._waves: dict[tuple[int, int], list[Cascade]] = {}
        self._models: dict[tuple[int, int], Surrogate | None] = {}
        self._interrupted += [trial for n in self.numbers for trial in self._log(n) if not trial.finished]

    def other_signals(self, trials: Sequence[TrialRecord]) -> dict[str, list[float]]:
        """Return the surrogate's predictions for ``trials`` and their sums of interval losses; empty if one has no prediction."""
        last, end = len(self.rounds) - 1, self.rounds[-1]
        model = self._model(last, end)
        cascades = [cascade for trial in trials if (cascade := self._cascade(trial, end))]
        if model is None or len(cascades) < len(trials):
            return {}
        known = [self._rosters[n].known(end).losses for n in self.numbers]
        losses = [float(sum(own[place] for own, place in zip(known, cascade, strict=True))) for cascade in cascades]
        return {"surrogate": [float(value) for value in model.predict(cascades)], "sum of interval losses": losses}

    # --- How far it is ----------------------------------------------------------------------------

    @property
    def candidates(self) -> int:
        """Number of candidates of each expert: as many as the budget pays for beside the yardsticks, or all that there are. The
        first candidate is the hand-made pattern's expert."""
        return min(self.affordable, self.most)

    @property
    def every_trial(self) -> list[TrialRecord]:
        return [*super().every_trial, *(trial for number in self.numbers for trial in self._log(number))]

    @property
    def exhausted(self) -> bool:
        """True if the budget pays for more candidates than there are."""
        return self.most < self.affordable

    @property
    def affordable(self) -> int:
        """Number of candidates of each expert that the budget pays for."""
        return candidates_in_full(self.settings, len(self.yardsticks))

    @property
    def most(self) -> int:
        """Number of possible candidates of the expert that has most."""
        return max(roster.limit for roster in self._rosters.values())

    @property
    def rounds(self) -> list[int]:
        """Number of candidates of each expert at the end of every round.

        Rounds that the study has recorded stay as they were when the budget is raised. A round without a cascade to choose, such
        as that of the first candidates, has recorded no trial.
        """
        if not self._ends:
            recorded, last = sorted(self._cascades), 0
            while last < self.candidates:
                planned = min(self.candidates, last + max(self._round, last // ROUND_GROWTH))
                last = min([planned, *(end for end in recorded if end > last)])
                self._ends.append(last)
        return self._ends

    @property
    def spent(self) -> tuple[int, int]:
        """Number of finished expert trainings, and the number planned."""
        (trained, planned), (extra, all_extra) = self._candidates_spent, self._yardsticks_spent
        return trained + extra, planned + all_extra

    @property
    def _candidates_spent(self) -> tuple[int, int]:
        finished = sum(trial.finished for n in self.numbers for trial in self._log(n)[: self.candidates])
        return finished, len(self.numbers) * self.candidates

    @property
    def _yardsticks_spent(self) -> tuple[int, int]:
        """The same for yardsticks, except the hand-made pattern, whose experts are candidates."""
        each, others = len(self.numbers), len(self.yardsticks) - 1
        return each * sum(trial.finished for trial in self.study.trials[1 : len(self.yardsticks)]), each * others

    @property
    def done(self) -> bool:
        return not self._interrupted and self._scored(len(self.rounds) - 1)

    def _log(self, number: int) -> list[TrialRecord]:
        return self._rosters[number].trials

    @property
    def _cascades(self) -> dict[int, list[int]]:
        """Numbers of the trials that are cascades, by the number of candidates they were chosen from."""
        seen = len(self.yardsticks) + sum(map(len, self._by_round.values()))
        for trial in self.study.trials[seen:]:
            self._by_round.setdefault(trial.candidates, []).append(trial.number)
        return self._by_round

    @property
    def _yardsticks_done(self) -> bool:
        trials = self.study.trials[: len(self.yardsticks)]
        return len(trials) == len(self.yardsticks) and all(trial.finished for trial in trials)

    def _trained(self, place: int) -> bool:
        """Return True if the candidates of rounds 0 to ``place`` are finished."""
        return place < 0 or min(roster.finished for roster in self._rosters.values()) >= self.rounds[place]

    def _scored(self, place: int) -> bool:
        """Return True if the cascades of rounds 0 to ``place`` are finished."""
        while self._rounds_over < len(self.rounds) and self._is_over(self._rounds_over):
            self._rounds_over += 1
        return place < self._rounds_over

    def _is_over(self, place: int) -> bool:
        """Return True if round ``place``, the first that is not known to be over, is over.

        A later round that has begun proves it, without choosing the round's cascades again.
        """
        if max(self._cascades, default=0) > self.rounds[place]:
            return True
        if not (self._yardsticks_done and self._trained(place)):
            return False
        batch, is_whole = self._batch(place)
        return is_whole and self._ended(place, len(batch))

    def _ended(self, place: int, count: int) -> bool:
        """Return True if the first ``count`` cascades of round ``place`` are finished."""
        started = self._of_round(place)[:count]
        return len(started) == count and all(trial.finished for trial in started)

    def _of_round(self, place: int) -> list[TrialRecord]:
        return [self.study.trials[number] for number in self._cascades.get(self.rounds[place], ())]

    # --- What comes next --------------------------------------------------------------------------

    def _next(self) -> TrialRecord | None:
        return self._next_yardstick() or self._next_cascade() or self._next_expert()

    def _next_expert(self) -> TrialRecord | None:
        """Start the next candidate, experts in turn, if the results that its proposal uses are complete."""
        counts = {n: len(self._log(n)) for n in self.numbers}
        index = min(counts.values())
        place = next((place for place, end in enumerate(self.rounds) if end > index), None)
        if place is None or not self._informed(place):
            return None
        number = min(self.numbers, key=lambda n: (counts[n], n))
        choices = self._candidate(number, index, place)
        config = self._with({number: choices}, f"expert-{number}-{index:03d}")
        return self.study.experts(number).start(config, "expert", choices, self.distributions)

    def _informed(self, place: int) -> bool:
        """Return True if the results that the candidates of round ``place`` are proposed from are complete."""
        return self._trained(0) if place == 1 else self._scored(place - 2)

    def _next_cascade(self) -> TrialRecord | None:
        """Start the next cascade of the first round that has one left."""
        place = next((place for place in range(self._rounds_over, len(self.rounds)) if not self._scored(place)), None)
        if place is None or not (self._yardsticks_done and self._trained(place)):
            return None
        started, (batch, _) = self._of_round(place), self._batch(place)
        if len(started) >= len(batch):
            return None
        chosen = {n: self._log(n)[index].choices for n, index in zip(self.numbers, batch[len(started)], strict=True)}
        config = self._with(chosen, f"trial-{len(self.study.trials):03d}")
        choices = self.space.choices(config)
        return self.study.start(config, "candidate", choices, self.distributions, candidates=self.rounds[place])

    # --- Candidates of one expert -----------------------------------------------------------------

    def _candidate(self, number: int, index: int, place: int) -> Choices:
        """Return the choices of candidate ``index`` of expert ``number``.

        The first candidate is the hand-made one. The choices of a warm start follow, then proposals. If no proposal is new, the
        last one is returned, which costs no training.
        """
        given = [self._part(number, choices) for choices in (self.space.choices(self.space.base), *self.warm)]
        for choices in given if index else given[:1]:
            if self._rosters[number].place(choices) is None:
                return choices
        for choices in self._proposals(number, index, place):
            if self._rosters[number].is_complete or self._is_new(number, choices):
                break
            self.repeats += 1
        return choices

    def _proposals(self, number: int, index: int, place: int) -> Iterator[Choices]:
        """Yield choices for candidate ``index`` of expert ``number``: the proposer's, then random ones, then all untried ones."""
        seeds = [derive_seed(self.settings.seed, "candidate", number, index, attempt) for attempt in range(ATTEMPTS)]
        if self.settings.proposer == "model":
            yield from self._prospects(number, place).ranked(random.Random(seeds[0]))
        else:
            for seed in seeds[:CREDULOUS_ATTEMPTS]:
                yield self._proposers[number].propose_after(self._signals(number, place), seed)
        for seed in seeds[CREDULOUS_ATTEMPTS:]:
            yield draw(self._own[number], random.Random(seed))
        yield from self._rosters[number].untried()

    def _prospects(self, number: int, place: int) -> Prospects:
        """Return the results that candidates of expert ``number`` are proposed from in round ``place``."""
        end = self._known_end(place)
        model = self._model(place - 2, end) if place >= 2 and end >= LEAST_KNOWN else None
        kinds = [column for column, kind in enumerate(self.costs.kinds) if kind in self.costs.counted_kinds]
        return Prospects(
            self._rosters[number],
            end,
            model,
            kinds,
            lambda choices: self.costs.counted(self._with({number: choices}, ""), number),
        )

    def _known_end(self, place: int) -> int:
        """Return the number of candidates of an expert whose outcomes the proposals for round ``place`` may use."""
        return self.rounds[max(0, place - 2)] if place else 0

    def _is_new(self, number: int, choices: Choices) -> bool:
        """Return True if no earlier candidate is the same expert and a cascade with it can keep the limits."""
        config = self._with({number: choices}, "")
        return not self._rosters[number].has(config) and self.costs.may_fit(config, number)

    @cache  # noqa: B019 (one strategy lives as long as its command)
    def _signals(self, number: int, place: int) -> list[Point]:
        """Return the candidates whose outcomes round ``place`` may use, each with its objectives, or None if it failed.

        The objectives are the surrogate's credit and the minimised costs. Before there is a surrogate, the interval loss replaces
        the credit.
        """
        end = self._known_end(place)
        trials, model = self._log(number)[:end], self._model(place - 2, end)
        credit = model.credit(number) if model else self._rosters[number].known(end).losses
        costs = self._rosters[number].costs(end)[:, self._minimised]
        return [
            (trial.choices, (float(value), *map(float, row)) if trial.state == "complete" else None)
            for trial, value, row in zip(trials, credit, costs, strict=True)
        ]

    def ranked(self, number: int, place: int) -> list[Choices]:
        """Return the trained candidates of expert ``number`` after the cascades of round ``place``, best first.

        They are sorted by non-dominated rank over the surrogate's credit and the minimised costs, and by credit within a rank.
        """
        end, roster = self.rounds[place], self._rosters[number]
        usable, model = roster.usable(end), self._model(place, end)
        if not len(usable):
            return []
        credit = (model.credit(number) if model else roster.known(end).losses)[usable]
        values = np.column_stack([credit, roster.costs(end)[usable][:, self._minimised]])
        order = np.lexsort((credit, moocore.pareto_rank(values)))
        return [self._log(number)[index].choices for index in usable[order]]

    # --- Cascades ---------------------------------------------------------------------------------

    def _batch(self, place: int) -> tuple[list[Cascade], bool]:
        """Return the cascades of round ``place`` that can be chosen by now, and True if these are all.

        They are chosen in waves. The choice of a wave uses the scores of the wave before it, among them the first scores of the
        round's own candidates.
        """
        chosen: list[Cascade] = []
        for wave in range(WAVES):
            if not self._ended(place, len(chosen)):
                return chosen, False
            chosen = chosen + self._wave(place, wave, chosen)
        return chosen, True

    def _wave(self, place: int, wave: int, before: list[Cascade]) -> list[Cascade]:
        """Return the cascades of one wave of round ``place``. ``before`` holds the cascades of the round's earlier waves."""
        end = self.rounds[place]
        if (end, wave) not in self._waves:
            earlier = [trial for trial in self.study.trials if trial.choices and trial.candidates < end]
            known = {cascade for trial in earlier if (cascade := self._cascade(trial, end))} | {*before}
            scores = self._scores(earlier + self._of_round(place)[: len(before)], end)
            new = end - (self.rounds[place - 1] if place else 0)
            source = np.random.default_rng(derive_seed(self.settings.seed, "cascades", end, wave))
            assembly = self._assembly(end)
            count = self.settings.cascades_per_candidate * new if all(map(len, assembly.ready)) else 0
            count = count * (wave + 1) // WAVES - count * wave // WAVES
            model = self._model(place - 1, end)
            if before:
                model = self._fitted(place, end, model, len(before))
            started = [self._cascade(trial, end) for trial in self._of_round(place)[len(before) :][:count]]
            chosen = [cascade for cascade in assembly.choose(count, known, model, source, scores) if cascade not in started]
            # Started cascades are kept, even if this version of the program would choose others.
            self._waves[end, wave] = [cascade for cascade in started if cascade] + chosen[: count - len(started)]
        return self._waves[end, wave]

    def _assembly(self, end: int) -> Assembly:
        rosters = self._rosters.values()
        ready = tuple(roster.usable(end) for roster in rosters)
        minimised = tuple(column for column, kind in enumerate(self.costs.kinds) if kind in self.settings.objectives)
        costs = tuple(roster.costs(end) for roster in rosters)
        return Assembly(ready, costs, self.costs.winner_limits, self.costs.limits, minimised)

    def _scores(self, trials: Sequence[TrialRecord], end: int) -> dict[Cascade, float]:
        """Return the first objective of the scored cascades among ``trials``."""
        scored = [trial for trial in trials if trial.state == "complete"]
        found = [(self._cascade(trial, end), trial.scored.values(self.settings.objectives)[0]) for trial in scored]
        return {cascade: score for cascade, score in found if cascade}

    def _model(self, place: int, end: int) -> Surrogate | None:
        """Return the surrogate of the first ``end`` candidates, fitted to the cascades of rounds 0 to ``place``.

        None if no cascade is scored.
        """
        if place < 0:
            return None
        if (place, end) not in self._models:
            chosen_anew = self._milestones(place)
            last = chosen_anew[-1]
            self._models = {k: model for k, model in self._models.items() if k[0] >= place - RECENT or k[0] == last}
            like = self._model(last, self.rounds[last]) if last < place else None
            self._models[place, end] = self._fitted(place, end, like)
        return self._models[place, end]

    def _fitted(self, place: int, end: int, like: Surrogate | None, newest: int | None = None) -> Surrogate | None:
        """Return a surrogate fitted to the cascades of rounds 0 to ``place``, only the first ``newest`` of round ``place``."""
        earlier = [trial for trial in self.study.trials if trial.choices and trial.candidates < self.rounds[place]]
        rows = [*self._scores(earlier + self._of_round(place)[:newest], end).items()]
        if not rows:
            return None
        cascades, scores = zip(*_informative(rows), strict=True)
        return Surrogate([self._rosters[n].known(end) for n in self.numbers], cascades, scores, like)

    def _milestones(self, place: int) -> list[int]:
        """Return the rounds up to ``place`` after which the surrogate's hyperparameters are refitted.

        These are rounds 0 to EVERY_ROUND, and later ones at intervals that grow by MILESTONES: the more cascades are scored, the
        less a round changes the fit.
        """
        found = list(range(min(place, EVERY_ROUND) + 1))
        while (later := int(found[-1] * MILESTONES)) <= place and found[-1] >= EVERY_ROUND:
            found.append(later)
        return found

    def _cascade(self, trial: TrialRecord, end: int) -> Cascade | None:
        """Return the candidates that ``trial`` of the study combines, as indices; None if one is not among the first ``end``."""
        self._places += [None] * (len(self.study.trials) - len(self._places))
        if self._places[trial.number] is None:
            places = [self._rosters[n].place(trial.choices) for n in self.numbers]
            found = tuple(place for place in places if place is not None)
            self._places[trial.number] = found if len(found) == len(places) else None
        cascade = self._places[trial.number]
        return None if cascade is None or max(cascade) >= end else cascade

    def _part(self, number: int, choices: Choices) -> Choices:
        return {name: choices[name] for name in self._own[number]}

    def _with(self, candidates: dict[int, Choices], name: str) -> Config:
        """Return the hand-made pattern with the choices of some experts replaced."""
        config = self.space.base
        for number, own in candidates.items():
            config = self.space.with_expert(config, number, own)
        return config.with_(name=name, training={"steps": self.steps})


def _informative(rows: list[tuple[Cascade, float]]) -> list[tuple[Cascade, float]]:
    """Return at most ``MOST_CASCADES`` of the scored cascades ``rows``, in order: the latest half, and the best of the others."""
    if len(rows) <= MOST_CASCADES:
        return rows
    latest = len(rows) - MOST_CASCADES // 2
    best = sorted(range(latest), key=lambda index: (rows[index][1], index))[: MOST_CASCADES - MOST_CASCADES // 2]
    return [rows[index] for index in sorted(best)] + rows[latest:]


def steps_at(rung: int, proxy_steps: int) -> int:
    """Return the training steps of an expert at ``rung``, the number of rungs below proxy length."""
    return proxy_steps // KEPT**rung


def candidates_in_full(settings: SearchSettings, yardsticks: int) -> int:
    """Return the number of candidates of each expert that the budget pays for at proxy length, beside the yardsticks.

    The hand-made pattern counts as a candidate and not as a yardstick.
    """
    return max(1, settings.budget // settings.training_seeds - (yardsticks - 1))
