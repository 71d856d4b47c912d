"""What passes between the search and its engines: a task to run, and what came of it. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from meme.config.schema import Config
from meme.errors import UserError
from meme.support.files import NO_ROOM

CONFIRMATION = "confirmation"  # the kind of a task that trains winner or hand-made pattern with a seed that chose neither
PROBABILITIES = "probabilities"  # the kind of a task that scores the winner with another p of one expert
FINALIST = "finalist"  # the kind of a task that scores an ensemble again, and leaves nothing but its score


class SearchFault(UserError):
    """What no trial of a search can run with, whatever its candidate: it ends the search, and no trial is recorded for it."""


@dataclass(frozen=True)
class Task:
    """One trial to run: train and score ``config``."""

    number: int
    config: Config
    kind: str
    """``candidate``, the yardstick it is (``hand-made``, ``multi-expert``, ``single-model``), ``expert``, ``audit``,
    ``confirmation`` or ``finalist``."""
    expert: int = 0
    """Train this expert alone, and score nothing; 0: train what is missing of all experts, and score the ensemble."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds; what is scored is their mean."""
    rung: int = 0
    """How many rungs below proxy length it trains; 0: at proxy length."""

    @property
    def name(self) -> str:
        """Legible in a dashboard, and no other task's: number, kind and architecture."""
        return f"{self.number:03d}-{self.kind}{self.expert or ''}-{self.config.architecture_id}"

    def failed(self, reason: str) -> "Outcome":
        """What to record where no outcome came back."""
        return Outcome(self.number, expert=self.expert, rung=self.rung, failure=reason)


@dataclass(frozen=True)
class Outcome:
    """What a task came to: scores, or the reason why there are none."""

    number: int
    expert: int = 0
    """As the task's."""
    rung: int = 0
    """As the task's."""
    failure: str | None = None
    fid: float | None = None
    """Mean over the training seeds."""
    fids: tuple[float, ...] = ()
    """What the search minimises first, FID or KID, one a training seed."""
    kid: float | None = None
    loss: float | None = None
    """Of one expert: mean squared error over its interval on held-out images, mean over the training seeds."""
    loss_error: float | None = None
    steps: int | None = None
    """Training steps an expert."""
    macs: float | None = None
    params: int | None = None
    latency_ms: float | None = None
    latency_device: str | None = None
    """Kind of device that ``latency_ms`` was measured on; None in records from before it was noted."""
    features: str | None = None
    begun_at: float | None = None
    """Unix time at which its work began, worker started and data opened."""
    training_seconds: float = 0.0
    sampling_seconds: float = 0.0
    scoring_seconds: float = 0.0
    training_passes: int | None = None
    """Forward passes of one image through one expert that its trainings were worth, a step's gradient being worth two; what the
    bank had costs none. None in studies that did not count."""
    scoring_passes: int | None = None
    """Forward passes that drawing its samples took; what earlier cascades had drawn of their way costs none."""

    @property
    def metric(self) -> str:
        """fid or kid, whichever the search minimises."""
        return "kid" if self.fid is None and self.kid is not None else "fid"

    @property
    def quality(self) -> float | None:
        """What the search minimises first."""
        return self.kid if self.metric == "kid" else self.fid

    @property
    def seconds(self) -> float:
        """Time spent in training, sampling and scoring."""
        return self.training_seconds + self.sampling_seconds + self.scoring_seconds

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Outcome":
        """The inverse of ``to_dict``; other keys are ignored."""
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**known | {"fids": tuple(known.get("fids", ()))})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def values(self, objectives: Sequence[str]) -> list[float]:
        return [getattr(self, objective) for objective in objectives]


def attempt(objective: Callable[[Task], Outcome], task: Task) -> Outcome:
    """What every engine runs in its workers: an exception becomes an outcome with its reason, and the search goes on.

    A full disk is no candidate's fault, and would fail all that follow: ``SearchFault``, which ends the search.
    """
    try:
        return replace(objective(task), expert=task.expert, rung=task.rung)
    except SearchFault:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            where = error.filename or "a disk"
            raise SearchFault(f"{where}: {error.strerror}; make room, and the same command goes on from here") from None
        return task.failed(_in_one_line(error))


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
