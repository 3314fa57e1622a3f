"""The one error that is the user's to mend."""


class UserError(Exception):
    """Bad input. The message says what was wrong, where (file, key, value) and what to do about it.

    Every command prints it without a traceback and exits with code 2.
    """
