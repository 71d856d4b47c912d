"""SIGTERM, as clusters and containers send it before they kill, treated as Ctrl-C: what is running ends in good order.

And both put off where they would break it.
"""

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


@contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C and SIGTERM that come within the context are taken at its end, when what belongs together is together again.

    Of the main thread, which alone is interrupted by them.
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
