"""Averages of weights, and the choice of the averaged cycles."""

from collections.abc import Sequence

import pytest
import torch

from unfreeze.evaluation.soup import average_weights, greedy_soup


def test_floating_point_tensors_are_averaged_and_counters_kept() -> None:
    one = {"weight": torch.tensor([1.0, 2.0]), "batches": torch.tensor(7)}
    other = {"weight": torch.tensor([3.0, 6.0]), "batches": torch.tensor(9)}
    found = average_weights([one, other])
    assert found["weight"].tolist() == [2, 4] and found["batches"].item() == 7


@pytest.mark.parametrize(
    ("averages", "expected"),
    [
        ({(1, 2): 0.28, (1, 2, 3): 0.27}, [1, 2, 3]),
        ({(1, 2): 0.28, (1, 2, 3): 0.29}, [1, 2]),
        ({(1, 2): 0.31, (2, 3): 0.29}, [2, 3]),
        ({(1, 2): 0.31, (2, 3): 0.3}, [2]),
    ],
)
def test_a_cycle_joins_where_it_lowers_the_loss(averages: dict[tuple[int, ...], float], expected: list[int]) -> None:
    """Start from the best cycle, 2, and try the others in the order of their losses."""
    asked = []

    def loss_of(cycles: Sequence[int]) -> float:
        asked.append(tuple(cycles))
        return averages[tuple(cycles)]

    assert greedy_soup({1: 0.32, 2: 0.3, 3: 0.35}, loss_of, best=0.3) == expected
    assert len(asked) == 2


def test_a_single_cycle_is_no_soup() -> None:
    assert greedy_soup({1: 0.4}, lambda cycles: 0.0, best=0.4) == [1]
