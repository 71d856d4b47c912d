"""Python interface of the search over MEME's architectures, which ``run_search.py`` runs.

``search(SearchSettings(...))`` is the whole command. The other names read its results, also while it runs. Other contents of the
modules are imported by their own paths.
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

# Module and original name of the names that need torch or Optuna. Importing these takes seconds, which --help must not wait for.
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
    """Import and return a name that needs torch or Optuna. ``AttributeError`` for unknown names."""
    if name not in _LATER:
        raise AttributeError(f"module 'meme_nas' has no attribute {name!r}")
    module, theirs = _LATER[name]
    return getattr(import_module(module), theirs)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
