"""A wish to stop, from whoever runs a training to the training; and what being ready for it may cost."""

from dataclasses import dataclass

SHARE = 0.02
"""Making safe what was done takes at most this share of the time, however slow the disk: the interval grows with the cost."""


class Interrupted(BaseException):
    """Somebody asked the work to stop; what was under way can be gone on with."""


@dataclass
class Interruption:
    """A wish to stop.

    Attributes:
        asked: somebody wants the work to stop.
        deferred: a training is under way, which will stop by itself after its next batch and a checkpoint.
    """

    asked: bool = False
    deferred: bool = False
