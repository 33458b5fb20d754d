"""A training step: forward, backward, optimizer. On a GPU it is recorded once as a CUDA graph and replayed.

The kernels of a network such as EfficientNet-Lite0 at batch 64 are so small that a GPU waits for their launches most
of the time. In a CUDA graph there are no gaps between them (`torch.cuda.CUDAGraph`). The graph reads its batch, the
learning rates and the random state from memory that stays in place, and changes weights and optimizer in place.
"""

import logging
from typing import Any

import torch
from torch import nn

from unfreeze.batches.loader import Batch
from unfreeze.device import autocast, deterministically, grad_scaler
from unfreeze.training.state import restored

logger = logging.getLogger("unfreeze")

WARM_UP = 3
"""Warm-up steps before the recording, in which libraries choose their algorithms and allocate their workspaces."""


def batch_loss(model: nn.Module, batch: Batch, loss: nn.Module) -> torch.Tensor:
    """The loss of a batch, on the device; ``loss`` maps logits (B, classes) and class numbers (B,) to it."""
    inputs, labels = batch
    with autocast(inputs.device):
        logits = model(inputs)
    return torch.as_tensor(loss(logits.float(), labels))


def train_batch(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss: nn.Module, scaler: Any = None
) -> torch.Tensor:
    """One step of the optimizer; returns the batch's loss, on the device. ``scaler``: a `grad_scaler`."""
    value = batch_loss(model, batch, loss)
    optimizer.zero_grad(set_to_none=True)
    if scaler is None:
        value.backward()
        optimizer.step()
    else:
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    return value.detach()


class TrainStep:
    """`train_batch` for one model and optimizer; on a GPU as a CUDA graph, if its results are the same bit for bit.

    While it is in use, tensors of the model and of the optimizer may be changed in place, but not replaced. Which
    parameters are trainable, and the modules' modes, must not change.

    Attributes:
        scaler: scales the gradients if the device computes in float16; its state belongs to a checkpoint. With it there
            is no CUDA graph: whether the optimizer skips a step depends on the gradients.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module) -> None:
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._graph: GraphedStep | None = None
        self._tried = False
        self.scaler = grad_scaler(next(model.parameters()).device)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Train on a batch; returns its loss, on the device."""
        if not self._tried and batch[0].is_cuda and not self.scaler.is_enabled():
            self._tried = True
            self._graph = record(self._model, self._optimizer, batch, self._loss)
        if self._graph is not None and self._graph.fits(batch):
            return self._graph(batch)
        return train_batch(self._model, self._optimizer, batch, self._loss, self.scaler)


def record(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss: nn.Module) -> "GraphedStep | None":
    """Record a training step, and compare it with a step that is not recorded.

    Weights, optimizer and random state are restored afterwards.

    Returns:
        The recorded step; None if the model cannot be recorded, or if a replay gives another result.
    """

    def bits(step: Any) -> list[torch.Tensor]:
        with restored(model, optimizer):
            value = step(batch)
            return [value.clone(), *(p.detach().clone() for p in model.parameters() if p.requires_grad)]

    def eager(given: Batch) -> torch.Tensor:
        return train_batch(model, optimizer, given, loss)

    stream: Any = torch.cuda.current_stream()
    try:
        expected = deterministically(lambda: bits(eager))
        graph = GraphedStep(model, optimizer, batch, loss)
        if not all(torch.equal(a, b) for a, b in zip(bits(graph), expected, strict=True)):
            raise RuntimeError("the recorded step gives another result.")
        return graph
    except RuntimeError as error:  # an operation that cannot be recorded, or no memory
        logger.info("Training without a CUDA graph: %s", (str(error) or type(error).__name__).splitlines()[0])
        torch.cuda.set_stream(stream)  # a failed capture leaves its own stream set
        _end_capture()
        return None
    finally:
        torch.cuda.empty_cache()  # free the memory of the steps that were not recorded


def _end_capture() -> None:
    """Make the GPU's random generator usable again after a failed capture, by a capture that succeeds.

    torch tells the generator about the end of a capture only if the capture succeeds. Until then, the generator refuses
    to draw numbers (torch 2.11: "Offset increment outside graph capture encountered unexpectedly").
    """
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")


class GraphedStep:
    """`train_batch` for one model, optimizer and shape of batch, recorded as a CUDA graph."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss: nn.Module) -> None:
        """Record the step; weights, optimizer and random state are restored afterwards.

        Args:
            model: on a GPU, in training mode.
            optimizer: of `make_optimizer`, over the parameters that train.
            batch: inputs and class numbers, of the shape of all later batches.
            loss: of logits (B, classes) and class numbers (B,).

        Raises:
            RuntimeError: the model does something that cannot be recorded, such as reading a value from the GPU.
        """
        self._inputs, self._labels = (tensor.clone() for tensor in batch)
        static = self._inputs, self._labels
        stream: Any = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with restored(model, optimizer), torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                train_batch(model, optimizer, static, loss)
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad(set_to_none=True)  # the gradients must be allocated in the graph's own memory
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._value = train_batch(model, optimizer, static, loss)

    def fits(self, batch: Batch) -> bool:
        """Whether a batch has the shape and dtype that were recorded."""
        return batch[0].shape == self._inputs.shape and batch[0].dtype == self._inputs.dtype

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Train on a batch; returns its loss, on the GPU."""
        inputs, labels = batch
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._value.clone()
