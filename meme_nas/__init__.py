"""The search over MEME's architectures: what ``run_search.py`` runs, from Python.

``search(SearchSettings(...))`` is the whole command; the others read what it leaves, also while it runs. Whatever else a module
offers can be imported from it by its own path.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from meme_nas.settings import SearchSettings

if TYPE_CHECKING:
    from meme_nas.record.ranking import front, hypervolumes, winner
    from meme_nas.record.study import read_trials
    from meme_nas.record.tasks import Outcome
    from meme_nas.record.trial_log import TrialRecord
    from meme_nas.report.page import write_report
    from meme_nas.report.summary import Summary
    from meme_nas.run import run as search

# Where the names come from that need torch or Optuna, seconds that --help shall not take; and what they are called there.
_LATER = {
    "Outcome": ("meme_nas.record.tasks", "Outcome"),
    "Summary": ("meme_nas.report.summary", "Summary"),
    "TrialRecord": ("meme_nas.record.trial_log", "TrialRecord"),
    "front": ("meme_nas.record.ranking", "front"),
    "hypervolumes": ("meme_nas.record.ranking", "hypervolumes"),
    "read_trials": ("meme_nas.record.study", "read_trials"),
    "search": ("meme_nas.run", "run"),
    "winner": ("meme_nas.record.ranking", "winner"),
    "write_report": ("meme_nas.report.page", "write_report"),
}

__all__ = [
    "Outcome",
    "SearchSettings",
    "Summary",
    "TrialRecord",
    "front",
    "hypervolumes",
    "read_trials",
    "search",
    "winner",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """The names that need torch or Optuna, imported when they are first asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'meme_nas' has no attribute {name!r}")
    module, theirs = _LATER[name]
    return getattr(import_module(module), theirs)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
