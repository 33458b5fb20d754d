"""Early stopping: when to stop adding cycles, and which cycle's weights to keep."""

from collections.abc import Sequence

import numpy as np

PATIENCE = 1
"""Consecutive cycles without improvement that count as overfitting.

It is 1, because each further cycle takes at least as long as the first.
"""


def until_overfitting(train_losses: Sequence[float], valid_losses: Sequence[float]) -> tuple[bool, int]:
    """Whether training overfits, judged at the end of the newest cycle.

    Training overfits if the validation loss at the end of the last `PATIENCE` cycles was no better than the best before
    them, while the training loss is still the lowest so far. The losses should be calibrated: a network often becomes
    overconfident while its predictions still improve, and temperature scaling corrects that after training (Berta et
    al., Rethinking Early Stopping: Refine, Then Calibrate, 2025).

    Args:
        train_losses: training loss of the last epoch of each cycle so far.
        valid_losses: validation loss at the end of each cycle so far, after temperature scaling.

    Returns:
        Whether to stop, and the number (from 0) of the cycle with the lowest validation loss, the first of equal ones.
        A loss that is not a number counts as infinite.

    Raises:
        ValueError: there is no cycle yet, or the numbers of training and validation losses differ.
    """
    if not len(valid_losses) or len(train_losses) != len(valid_losses):
        raise ValueError("until_overfitting needs a training and a validation loss of every cycle so far")
    train = np.nan_to_num(np.asarray(train_losses, float), nan=np.inf, posinf=np.inf)
    valid = np.nan_to_num(np.asarray(valid_losses, float), nan=np.inf, posinf=np.inf)
    best, newest = int(valid.argmin()), len(valid) - 1
    falls = newest > 0 and train[-1] < train[:-1].min()
    return bool(newest - best >= PATIENCE and falls), best
