"""The classifier: a backbone and a head."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from unfreeze.models.backbones import Backbone


class Logits(nn.Linear):
    """A linear layer that computes in full precision, even if the rest of the network does not.

    In bfloat16 the numbers between 8 and 16 are 1/16 apart. Two logits that differ by less may be rounded to the same
    number, so that their classes tie.

    Attributes:
        temperature: divisor of the logits in eval mode, which calibrates the probabilities
            (`unfreeze.evaluation.calibration`); saved with the weights.
    """

    temperature: torch.Tensor

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)
        self.register_buffer("temperature", torch.ones(()))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Logits (B, C) in float32 for activations (B, F); in eval mode divided by the temperature."""
        with torch.autocast(input.device.type, enabled=False):
            logits = super().forward(input.float())
        return logits if self.training else logits / self.temperature


class Head(nn.Sequential):
    """Activations (B, F) -> logits (B, C): BatchNorm, dropout, a linear layer.

    BatchNorm puts activations of any backbone on one scale, so that one range of learning rates fits all.
    """

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__(nn.BatchNorm1d(features), nn.Dropout(dropout), Logits(features, classes))
        self.features, self.classes, self.dropout = features, classes, dropout

    @property
    def norm(self) -> nn.BatchNorm1d:
        """Its first layer."""
        return cast(nn.BatchNorm1d, self[0])

    @property
    def logits(self) -> Logits:
        """Its last layer."""
        return cast(Logits, self[2])


class Classifier(nn.Module):
    """Images (B, 3, S, S), normalised -> logits (B, C).

    Attributes:
        bn_freeze: whether the backbone's BatchNorm statistics are kept while it trains.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head, self.bn_freeze = backbone, head, True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of a batch; for a completely frozen backbone no autograd graph is kept."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(trains):
            activations = self.backbone(images)
        return self.head(activations)

    @property
    def temperature(self) -> float:
        """Divisor of the logits in eval mode (`Logits`)."""
        return float(self.head.logits.temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.head.logits.temperature.fill_(value)


class SeveralHeads(nn.Module):
    """Images (B, 3, S, S), normalised -> logits (B, H, C) of H heads on one backbone."""

    def __init__(self, backbone: Backbone, heads: Sequence[Head]) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, nn.ModuleList(heads)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of a batch."""
        activations = self.backbone(images)
        return torch.stack([head(activations) for head in self.heads], 1)
