"""Until it overfits: when to stop adding cycles, and which one to keep."""

from collections.abc import Sequence

import numpy as np


def until_overfitting(train_losses: Sequence[float], valid_losses: Sequence[float]) -> tuple[bool, int]:
    """Whether training overfits, judged at the end of the newest cycle.

    It does when the validation loss at the cycle's end is no better than the best so far, while the training loss is
    still the lowest so far: the network learns the training images by heart.

    Args:
        train_losses: training loss of the last epoch of each cycle so far.
        valid_losses: validation loss at the end of each cycle so far.

    Returns:
        Whether to stop, and the number (from 0) of the cycle with the lowest validation loss.
    """
    valid = np.nan_to_num(np.asarray(valid_losses, float), nan=np.inf, posinf=np.inf)
    best = int(valid.argmin())
    newest = len(valid) - 1
    falls = newest > 0 and train_losses[-1] < min(train_losses[:-1])
    return bool(best < newest and falls), best
