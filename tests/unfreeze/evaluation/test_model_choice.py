"""Choice of the model that is passed on."""

import numpy as np
import pytest

from unfreeze.evaluation.model_choice import Candidate, choose

LABELS = np.arange(300) % 2


def candidate(name: str, wrong: int, sure: float = 0.9) -> Candidate:
    """A model with the confidence ``sure`` in every answer. Its first ``wrong`` answers are wrong."""
    probabilities = np.full((len(LABELS), 2), 1 - sure, np.float32)
    probabilities[np.arange(len(LABELS)), LABELS] = sure
    probabilities[:wrong] = probabilities[:wrong, ::-1]
    return Candidate(name, probabilities, LABELS)


def test_a_model_that_is_more_accurate_beyond_chance_is_handed_on_whatever_its_log_loss() -> None:
    best, reason = choose([candidate("head", 30, sure=0.9), candidate("full", 10, sure=0.6)])
    assert best.name == "full" and best.scores.loss > candidate("head", 30).scores.loss
    assert "more accurate" in reason and "0.9667" in reason and "0.9000" in reason


def test_full_training_that_lost_accuracy_is_not_handed_on() -> None:
    best, _ = choose([candidate("head", 10, sure=0.7), candidate("augmented", 40), candidate("full", 30)])
    assert best.name == "head"


def test_where_accuracies_cannot_be_told_apart_log_loss_decides() -> None:
    best, reason = choose([candidate("head", 10, sure=0.7), candidate("full", 12, sure=0.9)])
    assert best.name == "full" and "log loss" in reason


def test_two_of_three_may_be_level() -> None:
    best, reason = choose([candidate("head", 12), candidate("augmented", 10, sure=0.8), candidate("full", 60)])
    assert best.name == "head" and "the accuracies of head and augmented on" in reason


@pytest.mark.parametrize("more", range(1, 12))
def test_the_limit_is_mcnemars_at_five_percent(more: int) -> None:
    """On the n images where the two differ, `full` is wrong. The chance of this is 2^-n: below 5 % from n = 5."""
    best, _ = choose([candidate("head", 10, sure=0.6), candidate("full", 10 + more, sure=0.9)])
    assert (best.name == "head") == (more >= 5)
