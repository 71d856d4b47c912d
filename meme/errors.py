"""The one exception a user is meant to read."""


class UserError(ValueError):
    """A wrong setting, file or folder: one sentence that names the field and what is allowed.

    Commands print it without a traceback and exit with status 2.
    """
