"""A wish to stop, from whoever runs a training to the training."""

from dataclasses import dataclass


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
