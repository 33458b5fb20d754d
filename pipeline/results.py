"""Files that an evaluation writes: predictions and the confusion matrix."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.step import Run
from unfreeze.data.packed import PackedImages
from unfreeze.evaluation.evaluating import Predictions
from unfreeze.evaluation.metrics import Labels, confusion

MANY, LIKELIEST = 100, 20
"""With more than MANY classes, only the probabilities of the LIKELIEST ones and of the true class are written.

All probabilities of 1,000 classes took 18 kB per image.
"""


def write_predictions(path: Path, packed: PackedImages, predictions: Mapping[str, Predictions]) -> None:
    """Write `predictions.csv`: path, split, label, predicted, ``p_<class>``..., then the same with TTA.

    With more than 100 classes, ``p_<class>`` has values only for the 20 most probable classes and the true class.
    """
    classes = np.array(packed.classes, dtype=object)
    tables = [pd.DataFrame({"path": [], "split": [], "label": [], "predicted": []})]
    for split, found in predictions.items():
        known, labels = packed.table.iloc[found.rows], packed.labels[found.rows]
        columns = {
            "path": known["path"].to_numpy(),
            "split": split,
            "label": known["label"].to_numpy(),
            "predicted": classes[found.plain.argmax(1)],
            **_columns(found.plain, labels, packed.classes, "p_"),
            "tta_predicted": classes[found.tta.argmax(1)],
            **_columns(found.tta, labels, packed.classes, "tta_p_"),
        }
        tables.append(pd.DataFrame(columns))
    pd.concat(tables[1:] or tables).to_csv(path, index=False, lineterminator="\n")


def keep_confusion(run: Run, packed: PackedImages, predictions: Mapping[str, Predictions]) -> None:
    """Write the confusion matrix with TTA, of the test split if it was predicted, else of the validation split.

    Without predictions, it contains only zeros.
    """
    found = predictions.get("test", predictions.get("valid"))
    labels = packed.labels[found.rows] if found else packed.labels[:0]
    predicted = found.tta.argmax(1) if found else labels
    matrix = confusion(labels, predicted, len(packed.classes))
    table = pd.DataFrame(matrix, index=pd.Index(packed.classes, name="true"), columns=packed.classes)
    table.to_csv(run.path("confusion_matrix.csv"), lineterminator="\n")


def _columns(probabilities: np.ndarray, labels: Labels, classes: list[str], prefix: str) -> dict[str, np.ndarray]:
    written = probabilities.round(6)
    if len(classes) > MANY:
        hidden = np.ones(written.shape, bool)
        np.put_along_axis(hidden, np.argpartition(-probabilities, LIKELIEST, 1)[:, :LIKELIEST], False, 1)
        hidden[np.arange(len(labels)), labels] = False
        written[hidden] = np.nan
    return {f"{prefix}{name}": written[:, i] for i, name in enumerate(classes)}
