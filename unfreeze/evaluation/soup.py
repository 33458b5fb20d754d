"""A model soup: one network with the average of the weights at the ends of several cycles.

Snapshots of one training are in the same basin of the loss, and their average often generalizes better than the best
of them, at the cost of one network (Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization,
2018). The snapshots to average are selected as in the greedy soup of Wortsman et al. (Model soups, 2022).
"""

from collections.abc import Callable, Mapping, Sequence

import torch


def average_weights(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean of several state dicts of one network; tensors that are not floating-point are the first one's."""
    return {
        name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in states[0].items()
    }


def greedy_soup(losses: Mapping[int, float], loss_of: Callable[[Sequence[int]], float], best: float) -> list[int]:
    """Select the cycles to average: the best, then each next one if it lowers the average's validation loss.

    Args:
        losses: validation loss at the end of each cycle, by the cycle's number.
        loss_of: takes numbers of cycles, and returns the validation loss of their average.
        best: validation loss of the best cycle alone, measured in the same way.

    Returns:
        Numbers of the cycles, in ascending order; the best cycle alone if no average is better.
    """
    first, *others = sorted(losses, key=lambda number: losses[number])
    members = [first]
    for number in others:
        found = loss_of(trial := sorted([*members, number]))
        if found < best:
            members, best = trial, found
    return members
