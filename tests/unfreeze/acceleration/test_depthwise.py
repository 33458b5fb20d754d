"""Gradients of depthwise convolutions are the same as autograd's."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unfreeze.acceleration.depthwise import depthwise, slow_in_half, slow_to_train


def gradients(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, stride: int, edges: tuple[int, ...], ours: bool
):
    inputs = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    x, weight, bias = inputs
    if ours:
        y = depthwise(x, weight, bias, (stride, stride), edges)
    else:
        y = F.conv2d(F.pad(x, edges), weight, bias, stride, groups=len(weight))
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, inputs, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))]


@pytest.mark.parametrize("size", [(9, 9), (8, 11), (12, 7)])
@pytest.mark.parametrize("edges", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (2, 2, 2, 2), (1, 2, 0, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (4, 6), (1, 5)])
def test_gradients_are_autograds(
    kernel: tuple[int, int], stride: int, edges: tuple[int, int, int, int], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    tensors = torch.randn(2, 5, *size), torch.randn(5, 1, *kernel), torch.randn(5)
    x, weight, bias = (t.double() for t in tensors)
    (rows, columns), (left, right, top, bottom) = kernel, edges
    fewer = min(left, columns - 1), min(right, columns - 1), min(top, rows - 1), min(bottom, rows - 1)
    for found, expected in zip(
        *(gradients(x, weight, bias, stride, fewer, ours) for ours in (True, False)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kernel", "stride", "edge"), [(5, 1, (2, 2, 2, 2)), (3, 2, (0, 1, 0, 1)), (7, 1, (3, 3, 3, 3))]
)
def test_bfloat16_rounds_no_more_than_autograds(kernel: int, stride: int, edge: tuple[int, int, int, int]) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 32, 12, 12), torch.randn(32, 1, kernel, kernel), torch.randn(32)
    exact = gradients(x.double(), weight.double(), bias.double(), stride, edge, ours=False)
    half = [
        gradients(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), stride, edge, ours=ours) for ours in (True, False)
    ]
    for ours, theirs, right in zip(*half, exact, strict=True):
        error, allowed = ((t.double() - right).norm() / right.norm() for t in (ours, theirs))
        assert error < 1.5 * allowed < 0.02


@pytest.mark.parametrize(
    ("arguments", "ours", "ours_in_half", "in_float32"),
    [
        ({"kernel_size": 3, "padding": 1}, False, False, False),
        ({"kernel_size": 3, "stride": 2}, False, True, False),
        ({"kernel_size": 5, "stride": 2, "padding": 2}, False, True, False),
        ({"kernel_size": 5, "padding": 2}, True, True, False),
        ({"kernel_size": (1, 5), "padding": (0, 2)}, True, True, False),
        ({"kernel_size": 5, "padding": 5}, False, False, True),
        ({"kernel_size": 5, "padding": "same"}, True, True, False),
        ({"kernel_size": 5, "dilation": 2}, False, False, True),
        ({"kernel_size": 5, "out_channels": 8}, False, False, True),
        ({"kernel_size": 5, "groups": 2}, False, False, False),
    ],
)
def test_which_are_slow(arguments: dict, ours: bool, ours_in_half: bool, in_float32: bool) -> None:
    conv = nn.Conv2d(**{"in_channels": 4, "out_channels": 4, "groups": 4} | arguments)
    assert (slow_to_train(conv, half=False), slow_to_train(conv, half=True)) == (ours, ours_in_half)
    assert slow_in_half(conv) == in_float32
