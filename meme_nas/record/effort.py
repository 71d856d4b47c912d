"""Effort of a search, computed from its record: trainings of experts, and passes of images through them.

A pass is one forward pass of one image through one expert. A training step counts as three passes for every image of its batch:
one forward, and two for the gradient. The budget counts trainings only, including those that the bank makes unnecessary.
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
    """Effort of the trials of one search, without its audit and later stages."""

    charged: float
    """Number of expert trainings that count against the budget, without yardsticks outside the space. The unit is a training of
    the search's longest length. A shorter one counts as a fraction, a resumed one as the steps that it added."""
    made: float
    """The same, but without trainings that the bank already had."""
    training: int
    """Passes in training, including trunks and yardsticks."""
    scoring: int
    """Passes in drawing samples."""

    @property
    def passes(self) -> int:
        """Sum of all passes."""
        return self.training + self.scoring


def effort_of(trials: Iterable[TrialRecord], seeds: int = 1) -> Effort:
    """Return the effort of the ``trials`` of a search, each trained with ``seeds`` training seeds.

    Passes are those that workers counted. Older studies have no counts. For these, every training counts once, without trunks,
    and every score counts as if it shared no sampler steps. Failed trials are charged, but their passes are unknown and count 0.
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
    """Return two numbers for every trial: the steps it added to shorter trainings, and those of them that the bank lacked."""
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
