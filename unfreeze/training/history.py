"""The history of a training: a row for each batch, and one for each epoch."""

from dataclasses import dataclass, field


@dataclass
class History:
    """The rows of a training's batches and epochs.

    Attributes:
        batches: iteration (from 0), rate (of the last layer group), loss; in an LR range test also starting, the
            starting weights' loss.
        epochs: epoch (from 0), cycle (from 0), train_loss, valid_loss, valid_accuracy, rate (the epoch's highest); for
            the whole network also valid_calibrated_loss, the validation loss after temperature scaling.
        best_cycle: the cycle whose weights were kept.
    """

    batches: list[dict[str, float]] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_cycle: int = 0
