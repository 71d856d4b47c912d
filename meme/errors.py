"""The exceptions that a user reads, and text that is fit to print."""

import os
import shlex
from collections.abc import Sequence

MOST_QUOTED = 200  # characters


def printable(text: str) -> str:
    """Escape newlines, control characters and undecodable bytes in ``text``, so that a name cannot forge a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def shell_command(words: Sequence[str]) -> str:
    """Return ``words`` as a command that a shell takes as it is printed, whatever bytes are in the names of files."""
    return " ".join(shlex.quote(word) if word.isprintable() else _in_escapes(word) for word in words)


def _in_escapes(word: str) -> str:
    """Quote a word as ``$'...'``, which bash and zsh read."""
    plain = {byte: chr(byte) for byte in range(32, 127)} | {ord("'"): "\\'", ord("\\"): "\\\\"}
    return "$'" + "".join(plain.get(byte, f"\\x{byte:02x}") for byte in os.fsencode(word)) + "'"


def in_one_line(error: BaseException) -> str:
    """Return the beginning of a library's message, for the middle of a sentence; the error's type where the message is
    empty."""
    return " ".join(str(error).split())[:MOST_QUOTED] or type(error).__name__


class UserError(ValueError):
    """A wrong setting, file or folder: one sentence that names the field and what is allowed.

    Commands print it without a traceback and exit with status 2. It is one printable line, whatever the names in it.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


class TrainingDiverged(RuntimeError):
    """Gradients, losses or weights are no longer finite numbers. The message is one sentence, printed like that of a
    ``UserError``.

    The candidate is at fault: a search records it as a failed trial and continues.
    """
