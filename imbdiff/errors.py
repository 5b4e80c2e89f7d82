"""The error that a user can mend: the command line prints its text without a traceback."""


class InputError(ValueError):
    """Something that came from outside is wrong. The message says what was expected, what came and what to do."""
