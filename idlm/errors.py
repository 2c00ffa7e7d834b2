"""The one error a user can cause."""


class InputError(ValueError):
    """Bad input: the message is one line that names the value and the fix.

    The command line prints it and exits with status 2; every other exception is a bug.
    """
