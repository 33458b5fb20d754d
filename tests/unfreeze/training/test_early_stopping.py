"""Early stopping at overfitting, with scripted histories."""

import math

import pytest

from unfreeze.training.early_stopping import until_overfitting

NAN = math.nan


def play(train: list[float], valid: list[float]) -> tuple[int, int]:
    """Number of cycles until the stop, and the best cycle."""
    for cycles in range(1, len(train) + 1):
        stop, best = until_overfitting(train[:cycles], valid[:cycles])
        if stop:
            break
    return cycles, best


@pytest.mark.parametrize(
    ("train", "valid", "cycles", "best"),
    [
        pytest.param([0.5], [0.6], 1, 0, id="a single cycle never overfits"),
        pytest.param([0.5, 0.4, 0.3], [0.6, 0.5, 0.4], 3, 2, id="both fall: all cycles, the last is best"),
        pytest.param([0.5, 0.4, 0.3, 0.2], [0.6, 0.5, 0.55, 0.3], 3, 1, id="stops at the first that is no better"),
        pytest.param([0.5, 0.4, 0.3], [0.6, 0.7, 0.1], 2, 0, id="the first cycle can be the best"),
        pytest.param([0.5, 0.4, 0.3], [0.6, 0.6, 0.1], 2, 0, id="no better is not better; the earlier is kept"),
        pytest.param([0.5, 0.6, 0.4], [0.6, 0.7, 0.5], 3, 2, id="both rise: that is no over-fitting"),
        pytest.param([0.5, 0.5, 0.4], [0.6, 0.7, 0.5], 3, 2, id="the training loss stands still: go on"),
        pytest.param([0.5, 0.6, 0.55, 0.4, 0.3], [0.6, 0.7, 0.7, 0.7, 0.1], 4, 0, id="below the lowest, not the last"),
        pytest.param([0.5, 0.6, 0.7, 0.8], [0.6, 0.8, 0.7, 0.7], 4, 0, id="never stopped, an earlier cycle is best"),
        pytest.param([0.5, 0.4, 0.3], [0.6, NAN, 0.1], 2, 0, id="a validation loss that is no number is no better"),
        pytest.param([0.5, 0.4, 0.3], [0.6, math.inf, 0.1], 2, 0, id="nor is an infinite one"),
        pytest.param([0.5, 0.4], [NAN, 0.6], 2, 1, id="any number is better than none"),
        pytest.param([0.5, NAN, 0.5], [0.6, 0.7, 0.7], 3, 0, id="a training loss that is no number does not fall"),
        pytest.param([NAN, 0.5, 0.45, 0.4], [0.6, 0.5, 0.7, 0.7], 3, 1, id="and hides no later fall"),
        pytest.param([NAN, NAN, NAN], [NAN, NAN, NAN], 3, 0, id="nothing is a number"),
    ],
)
def test_history(train: list[float], valid: list[float], cycles: int, best: int) -> None:
    assert play(train, valid) == (cycles, best)


def test_losses_are_left_alone() -> None:
    train, valid = [0.5, 0.4, 0.3], [0.6, NAN, 0.7]
    assert until_overfitting(train, valid) == (True, 0)
    assert train == [0.5, 0.4, 0.3] and valid[0] == 0.6 and math.isnan(valid[1])


@pytest.mark.parametrize(("train", "valid"), [([], []), ([0.5], []), ([0.5, 0.4], [0.5])])
def test_histories_that_are_none(train: list[float], valid: list[float]) -> None:
    with pytest.raises(ValueError, match="of every cycle"):
        until_overfitting(train, valid)
