"""The one exception a user reads, and text that is fit to print."""


def printable(text: str) -> str:
    """``text`` with newlines, control characters and undecodable bytes escaped, so that a name cannot forge a line."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class UserError(ValueError):
    """A wrong setting, file or folder: one sentence that names the field and what is allowed.

    Commands print it without a traceback and exit with status 2. It is one printable line, whatever the names in it.
    """

    def __init__(self, sentence: str):
        super().__init__(printable(sentence))
