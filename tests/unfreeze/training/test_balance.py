"""Imbalanced classes: effects of weights and sampling, and better recall of a small class with either."""

import numpy as np
import pytest
import torch

from unfreeze.batches.loader import shuffled
from unfreeze.device import seed_everything
from unfreeze.models.classifier import Head
from unfreeze.settings.schema import Train, TrainHead
from unfreeze.training.balance import class_weights, make_loss, sampling_probabilities
from unfreeze.training.phases import Activations, fit_head

CPU = torch.device("cpu")


def train(balance: str, smoothing: float = 0.0) -> Train:
    return Train("adamw", 0.01, smoothing, balance)


def test_weights_are_in_inverse_proportion_to_the_images() -> None:
    assert class_weights(np.array([0, 0, 0, 2]), 4).tolist() == pytest.approx([4 / 6, 0, 4 / 2, 0])
    assert class_weights(np.array([0, 1, 1, 0]), 2).tolist() == [1, 1]


def test_the_weighted_loss_of_a_batch_is_its_weighted_mean() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.5]]), torch.tensor([0, 1, 0])
    loss = make_loss(train("loss"), np.array([0, 0, 0, 1]), 2, CPU)
    single = -torch.log_softmax(logits, 1)[range(3), labels]
    weights = torch.tensor([4 / 6, 2, 4 / 6])
    assert float(loss(logits, labels)) == pytest.approx(float((single * weights).sum() / weights.sum()))
    assert make_loss(train("none", 0.1), np.array([0, 0, 0, 1]), 2, CPU).weight is None


def test_the_sampler_draws_every_class_equally_often_and_the_same_again() -> None:
    labels = np.repeat([0, 1, 2], [900, 90, 10])
    rows = np.arange(5000, 6000)
    probabilities = sampling_probabilities(train("sampler"), labels)
    drawn = [shuffled(rows, 10, seed=3, epoch=epoch, probabilities=probabilities) for epoch in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    assert np.asarray(drawn[0]).shape == (100, 10)
    counts = np.bincount(labels[np.concatenate(drawn[0]) - 5000])
    assert counts == pytest.approx(np.full(3, 1000 / 3), abs=80)  # five standard deviations
    assert sampling_probabilities(train("none"), labels) is None
    assert sampling_probabilities(train("loss"), labels) is None


@pytest.mark.parametrize("balance", ["loss", "sampler"])
def test_more_of_a_small_class_is_found(balance: str) -> None:
    """Two clusters that overlap. One has a tenth as many images as the other."""

    def recall(balance: str) -> float:
        seed_everything(0)
        rng = np.random.default_rng(0)
        labels = np.repeat([0, 1, 0, 1], [300, 30, 300, 30])
        features = (rng.normal(size=(660, 8)) + labels[:, None] * 0.6).astype(np.float32)
        data = Activations(features, labels, np.arange(330), np.arange(0), 32, 0, CPU)
        head = Head(8, 2, 0.0)
        fit_head(head, data, 1e-2, TrainHead(8), train(balance))
        with torch.no_grad():
            predicted = head.eval()(torch.from_numpy(features[330:])).argmax(1).numpy()
        return float((predicted[labels[330:] == 1] == 1).mean())

    assert recall(balance) > recall("none") + 0.2
