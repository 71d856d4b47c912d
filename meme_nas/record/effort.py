"""What a search spent, counted from its record: trainings of experts, and passes of images through them.

A pass is one image once through one expert. A training step is worth three for every image of its batch: forward, and twice as
much backward. The budget counts trainings alone, and as if no expert had been trained before; those that the bank has are not
trained again.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meme.config.schema import ExpertConfig
from meme.scoring.cost import sampler_passes
from meme.training.trainer import PASSES_A_STEP
from meme_nas.record.folder import APART
from meme_nas.record.trial_log import TrialRecord


@dataclass(frozen=True)
class Effort:
    """Of the trials of one search, its audit and all that follows it left out."""

    charged: float
    """Trainings of one expert at the search's longest length that its candidates were charged with, yardsticks outside the space
    left out: a shorter one counts as its part of that, a continued one as what it added."""
    made: float
    """The same, each expert and length counted once: those that the bank did not have."""
    training: int
    """Passes in training, trunks and yardsticks included."""
    scoring: int
    """Passes in drawing samples."""

    @property
    def passes(self) -> int:
        """Return all passes."""
        return self.training + self.scoring


def effort_of(trials: Iterable[TrialRecord], seeds: int = 1) -> Effort:
    """Return what the ``trials`` of a search took, each trained with so many ``seeds``.

    Passes are what workers counted. In a study from before they did, they are those of every training once, trunks left out, and
    of every score as if none had shared a part of its way with another. Failed trials are charged, but what they took is unknown.
    """
    own = [trial for trial in trials if trial.kind not in APART and trial.state in ("complete", "failed")]
    paid = [trial for trial in own if trial.expert] or [trial for trial in own if trial.in_space]  # cascades train nothing
    paid.sort(key=lambda trial: trial.config.training.steps)
    added = _steps_added(paid)
    longest = max((trial.config.training.steps for trial in paid), default=1)
    charged, made = (sum(part) * seeds / longest for part in zip(*added, strict=True)) if added else (0.0, 0.0)
    training = scoring = 0
    new = dict(zip(map(id, paid), (made for _, made in added), strict=True))
    for trial in own:
        if trial.state != "complete":
            continue
        if (counted := trial.scored.training_passes) is not None:
            training, scoring = training + counted, scoring + (trial.scored.scoring_passes or 0)
            continue
        settings = trial.config.training
        steps = new.get(id(trial), 0) if trial.in_space else len(trial.config.experts) * settings.steps
        training += seeds * steps * PASSES_A_STEP * settings.batch_size
        scoring += 0 if trial.expert else seeds * sampler_passes(trial.config)
    return Effort(charged, made, training, scoring)


def _steps_added(trials: Sequence[TrialRecord]) -> list[tuple[int, int]]:
    """Return for every trial the steps that its trainings added to shorter ones, and how many of these no trial before had."""
    lengths: dict[tuple[int, ExpertConfig], set[int]] = defaultdict(set)
    found = []
    for trial in trials:
        steps, charged, made = trial.config.training.steps, 0, 0
        for number in (trial.expert,) if trial.expert else range(1, len(trial.config.experts) + 1):
            known = lengths[number, trial.config.canonical_expert(number)]
            added = steps - max((each for each in known if each < steps), default=0)
            charged += added
            made += 0 if steps in known else added
            known.add(steps)
        found.append((charged, made))
    return found
