"""Errors that are told in a sentence."""


class UserError(Exception):
    """Something outside the program is wrong: says what, where (file, key, image) and what to do.

    Shown as a sentence without a traceback; the process exits with code 2.
    """


class TransientError(UserError):
    """Something that may have gone away when the work is tried again, which is worth it; a step ends with code 1."""
