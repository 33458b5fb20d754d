"""The one error that is the user's to mend."""


class UserError(Exception):
    """Something outside the program is wrong: says what, where (file, key, image) and what to do.

    Shown as a sentence without a traceback; the process exits with code 2.
    """
