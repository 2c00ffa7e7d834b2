"""The one error a user can cause."""


class InputError(ValueError):
    """Bad input: the message is one line that names the value and the fix.

    The command line prints it and exits with status 2; every other exception is a bug.

    Attributes:
        param: the name of the setting or the field that is wrong, if it is one.
        code: a word by which a program can tell this error from others.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code
