"""Handle SIGTERM, which clusters and containers send before they kill, as Ctrl-C: running work ends in good order.

Both can be deferred where they would break something.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_came = threading.Event()


def was_terminated() -> bool:
    """Return whether the latest interruption was SIGTERM, and not Ctrl-C.

    The exception does not say, since libraries catch an interruption and raise one of their own, or return as if nothing had
    happened.
    """
    return _came.is_set()


def terminate_on_sigterm() -> None:
    """Raise ``KeyboardInterrupt`` on SIGTERM from now on. Call it again after a library that installs its own handler."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _raise)


@contextmanager
def terminated_by_sigterm() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` on SIGTERM within the context."""
    before = signal.getsignal(signal.SIGTERM)
    _came.clear()
    terminate_on_sigterm()
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Defer Ctrl-C and SIGTERM to the end of the context, so that its work is never left half done.

    It has an effect only in the main thread, the only one that they interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
        for late in came:
            signal.raise_signal(late)


def _raise(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not break off the ending; SIGKILL still does
    _came.set()
    raise KeyboardInterrupt
