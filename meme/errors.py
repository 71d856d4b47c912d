"""The exceptions that a user reads, and text that is fit to print."""

MOST_QUOTED = 200  # characters


def printable(text: str) -> str:
    """``text`` with newlines, control characters and undecodable bytes escaped, so that a name cannot forge a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def in_one_line(error: BaseException) -> str:
    """The beginning of what a library says of ``error``, for a sentence of ours; its type where it says nothing."""
    return " ".join(str(error).split())[:MOST_QUOTED] or type(error).__name__


class UserError(ValueError):
    """A wrong setting, file or folder: one sentence that names the field and what is allowed.

    Commands print it without a traceback and exit with status 2. It is one printable line, whatever the names in it.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))


class TrainingDiverged(RuntimeError):
    """Gradients, losses or weights are no longer finite numbers: one sentence, which commands print as they do a ``UserError``.

    It is the fault of a candidate: a search records it as a failed trial and goes on.
    """
