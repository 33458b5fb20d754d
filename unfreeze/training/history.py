"""The history of a training: a row for each batch, and one for each epoch."""

from dataclasses import dataclass, field

import pandas as pd


@dataclass
class History:
    """The rows of a training's batches and epochs.

    Attributes:
        batches: iteration (from 0), rate (of the last layer group), loss; in an LR range test also starting, the
            starting weights' loss.
        epochs: epoch (from 0), cycle (from 0), train_loss, valid_loss, valid_accuracy, rate (the epoch's highest).
        best_cycle: the cycle whose weights were kept.
    """

    batches: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_cycle: int = 0

    def batches_frame(self) -> pd.DataFrame:
        """The rows of batches as a table."""
        return pd.DataFrame(self.batches, columns=None if self.batches else ["iteration", "rate", "loss"])

    def epochs_frame(self) -> pd.DataFrame:
        """The rows of epochs as a table; NaN if there was no validation."""
        return pd.DataFrame(self.epochs).reindex(
            columns=["epoch", "cycle", "train_loss", "valid_loss", "valid_accuracy", "rate"]
        )
