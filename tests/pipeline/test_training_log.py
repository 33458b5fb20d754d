"""What MLflow is told of a training."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.training_log import POINTS, callbacks


class Execution:
    """A step's execution that keeps what it is told."""

    def __init__(self) -> None:
        self.points: list[int] = []
        self.tracker = SimpleNamespace(curve=lambda values, at: self.points.append(at))

    def checkpoint(self, name: str) -> None:
        return None


def told(execution: Any, epochs: int, batches: int) -> list[int]:
    rows = [{"iteration": float(i), "rate": 1e-3, "loss": 1.0} for i in range(epochs * batches)]
    callback = callbacks(execution, epochs, batches).batches
    for start in range(0, len(rows), 10):
        callback(rows[start : start + 10])
    return execution.points  # type: ignore[no-any-return]


@pytest.mark.parametrize(("batches", "every"), [(47, 1), (250, 1), (251, 2), (3125, 13)])
def test_a_curve_has_no_more_points_than_mlflow_shows(batches: int, every: int) -> None:
    found = told(Execution(), 4, batches)
    assert found == list(range(0, 4 * batches, every)) and len(found) <= POINTS
