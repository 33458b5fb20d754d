"""Depthwise convolutions with faster gradients on a CPU.

oneDNN has fast kernels for the forward pass, and for the gradient of weights that are at most three columns wide. For
wider weights with stride 1, and in bfloat16 for the gradient of a strided convolution's input, it falls back to
plain loops, which take ten to fifty times as long as the forward pass. Here both gradients are computed with oneDNN's
fast kernels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

COLUMNS = 3
"""Largest width of a kernel for which oneDNN has a fast gradient."""

Edges = tuple[int, int, int, int]


def slow_to_train(conv: nn.Conv2d, half: bool) -> bool:
    """Whether oneDNN has no fast gradient for a convolution, and `depthwise` can compute it instead.

    Args:
        conv: any convolution.
        half: whether in bfloat16, in which strided convolutions are slow too. In float32, oneDNN has fast kernels for
            strided convolutions of any width.
    """
    per_channel = conv.groups == conv.in_channels > 1
    return per_channel and _computed(conv) and (conv.kernel_size[1] > COLUMNS if conv.stride == (1, 1) else half)


def slow_in_half(conv: nn.Conv2d) -> bool:
    """Whether a convolution's gradient takes longer in bfloat16 than in float32, and `depthwise` cannot compute it."""
    return conv.groups == conv.in_channels > 1 and not _computed(conv)


def _computed(conv: nn.Conv2d) -> bool:
    outside = isinstance(conv.padding, tuple) and any(
        p >= k for p, k in zip(conv.padding, conv.kernel_size, strict=True)
    )
    return conv.out_channels == conv.groups and conv.dilation == (1, 1) and not outside


def depthwise(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, stride: tuple[int, ...], edges: Edges
) -> torch.Tensor:
    """Convolution of every channel with a kernel of its own.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, K, L), of the same type as ``x``.
        bias: (C,) or None.
        stride: of rows and columns.
        edges: zero padding left, right, top, bottom; less than the kernel's width and height.

    Returns:
        (B, C, H', W').
    """
    return _Depthwise.apply(x, weight, bias, stride, edges)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, ...],
        edges: Edges,
    ) -> torch.Tensor:
        padded = F.pad(x, edges) if any(edges) else x
        ctx.save_for_backward(padded, weight)
        ctx.size, ctx.stride, ctx.edges = x.shape[2:], stride, edges
        return F.conv2d(padded, weight, bias, stride, groups=len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        padded, weight = ctx.saved_tensors
        grad = grads[0].contiguous(memory_format=torch.channels_last)
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        return (
            _of_input(grad, weight, ctx.size, ctx.stride, ctx.edges) if of_x else None,
            _of_weight(grad, padded, weight, ctx.stride) if of_weight else None,
            grad.sum((0, 2, 3)) if of_bias else None,
            None,
            None,
        )


def _of_input(
    grad: torch.Tensor, weight: torch.Tensor, size: tuple[int, ...], stride: tuple[int, ...], edges: Edges
) -> torch.Tensor:
    """The input's gradient: a convolution of the output's gradient, dilated by the stride, with the flipped kernel."""
    (left, right, above, below), turned = edges, weight.flip(2, 3)
    rows, columns = weight.shape[2:]
    top, first = rows - 1 - above, columns - 1 - left
    if stride == (1, 1) and (left, above) == (right, below):
        return F.conv2d(grad, turned, padding=(top, first), groups=len(weight))
    shape = (*grad.shape[:2], size[0] + rows - 1, size[1] + columns - 1)
    spread = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last).zero_()
    last_row, last = top + (grad.shape[2] - 1) * stride[0], first + (grad.shape[3] - 1) * stride[1]
    spread[:, :, top : last_row + 1 : stride[0], first : last + 1 : stride[1]] = grad
    return F.conv2d(spread, turned, groups=len(weight))


def _of_weight(grad: torch.Tensor, padded: torch.Tensor, weight: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The weights' gradient, computed for up to `COLUMNS` columns of the kernel at a time, as for a narrower kernel."""
    rows, columns = weight.shape[2:]
    width = min(columns, COLUMNS)
    height, span = (grad.shape[2] - 1) * stride[0] + rows, (grad.shape[3] - 1) * stride[1] + width
    found = torch.empty_like(weight)
    for first in [*range(0, columns - width, width), columns - width]:
        seen = padded[:, :, :height, first : first + span].contiguous(memory_format=torch.channels_last)
        found[..., first : first + width] = torch.ops.aten.convolution_backward(
            grad,
            seen,
            weight[..., :width],
            None,
            stride,
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            len(weight),
            [False, True, False],
        )[1]
    return found
