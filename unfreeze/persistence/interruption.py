"""The stop-request flag of a training, and the share of the time that checkpoints may take."""

from dataclasses import dataclass

SHARE = 0.02
"""Largest share of the time for checkpoints, or for flushes of a `ResumableFile`.

On a slow disk the interval between them grows accordingly.
"""


class Interrupted(BaseException):
    """The work was stopped by request, and can be resumed."""


@dataclass
class Interruption:
    """Stop-request flag.

    Attributes:
        asked: whether a stop was requested.
        deferred: whether a training is running. It checks the flag after each batch, writes a checkpoint, and stops.
    """

    asked: bool = False
    deferred: bool = False
