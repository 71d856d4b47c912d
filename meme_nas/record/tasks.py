"""Task and outcome, the messages between a search and its engines. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from meme.config.schema import Config
from meme.errors import UserError
from meme.support.files import NO_ROOM

CONFIRMATION = "confirmation"  # kind of a task that trains winner or hand-made pattern with a seed that chose neither
PROBABILITIES = "probabilities"  # kind of a task that scores the winner with another p of one expert
FINALIST = "finalist"  # kind of a task that scores an ensemble again and keeps neither weights nor samples


class SearchFault(UserError):
    """Fault that every trial of a search would meet, whatever its candidate. It ends the search without recording a trial."""


@dataclass(frozen=True)
class Task:
    """One trial to run: training and score of ``config``."""

    number: int
    config: Config
    kind: str
    """``candidate``, the kind of a yardstick (``hand-made``, ``multi-expert``, ``single-model``), ``expert``, ``audit``,
    ``probabilities``, ``confirmation`` or ``finalist``."""
    expert: int = 0
    """Number of the only expert to train, without a score. 0: train all experts that the bank lacks, and score the ensemble."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds. The score is the mean over them."""
    rung: int = 0
    """Number of rungs below proxy length; 0 at proxy length."""

    @property
    def name(self) -> str:
        """Unique readable name for a dashboard: number, kind and architecture."""
        return f"{self.number:03d}-{self.kind}{self.expert or ''}-{self.config.architecture_id}"

    def failed(self, reason: str) -> "Outcome":
        """Return the outcome of a task that failed for ``reason``."""
        return Outcome(self.number, expert=self.expert, rung=self.rung, failure=reason)


@dataclass(frozen=True)
class Outcome:
    """Result of a task: scores, or the reason of its failure."""

    number: int
    expert: int = 0
    """The task's ``expert``."""
    rung: int = 0
    """The task's ``rung``."""
    failure: str | None = None
    fid: float | None = None
    """Mean over the training seeds."""
    fids: tuple[float, ...] = ()
    """First objective, FID or KID, for each training seed."""
    kid: float | None = None
    loss: float | None = None
    """Interval loss of a single expert: mean squared error on held-out images, averaged over the training seeds."""
    loss_error: float | None = None
    steps: int | None = None
    """Training steps of an expert."""
    macs: float | None = None
    params: int | None = None
    latency_ms: float | None = None
    latency_device: str | None = None
    """Kind of device on which ``latency_ms`` was measured; None in older records."""
    features: str | None = None
    begun_at: float | None = None
    """Unix time at which the work began, after the start of the worker and the opening of the data."""
    training_seconds: float = 0.0
    sampling_seconds: float = 0.0
    scoring_seconds: float = 0.0
    training_passes: int | None = None
    """Cost of its trainings in forward passes of one image through one expert, where a step's gradient counts as two. Trainings
    found in the bank count 0. None in older records."""
    scoring_passes: int | None = None
    """Forward passes for drawing its samples. Sampler steps shared with earlier cascades count 0. None in older records."""

    @property
    def metric(self) -> str:
        """First objective of the search, fid or kid."""
        return "kid" if self.fid is None and self.kid is not None else "fid"

    @property
    def quality(self) -> float | None:
        """Value of the first objective."""
        return self.kid if self.metric == "kid" else self.fid

    @property
    def seconds(self) -> float:
        """Seconds spent in training, sampling and scoring."""
        return self.training_seconds + self.sampling_seconds + self.scoring_seconds

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Outcome":
        """Return the outcome that ``to_dict`` turned into ``content``. Unknown keys are ignored."""
        known = {field.name: content[field.name] for field in fields(cls) if field.name in content}
        return cls(**known | {"fids": tuple(known.get("fids", ()))})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def values(self, objectives: Sequence[str]) -> list[float]:
        return [getattr(self, objective) for objective in objectives]


def attempt(objective: Callable[[Task], Outcome], task: Task) -> Outcome:
    """Return the outcome of ``task``. An exception becomes a failed outcome with its reason. Engines call this in workers.

    Raises ``SearchFault`` for a full disk, which is no candidate's fault and would fail all later trials.
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
