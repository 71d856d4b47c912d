"""SIGTERM, as clusters and containers send it before they kill, treated as Ctrl-C: what is running ends in good order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_came = threading.Event()


def was_terminated() -> bool:
    """Whether the latest interruption was SIGTERM, and not Ctrl-C.

    The exception does not say: libraries catch an interruption and raise one of their own, or return as if all were done.
    """
    return _came.is_set()


def terminate_on_sigterm() -> None:
    """Raise ``KeyboardInterrupt`` on SIGTERM from now on. Call it again after a library that takes the signal for itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise)


@contextmanager
def terminated_by_sigterm() -> Iterator[None]:
    """``terminate_on_sigterm`` within the context."""
    before = signal.getsignal(signal.SIGTERM)
    _came.clear()
    terminate_on_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _raise(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break off the ending; SIGKILL still does
    _came.set()
    raise KeyboardInterrupt
