"""The classifier: a backbone and a head, of which parts can be frozen."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unfreeze.backbones import Backbone
from unfreeze.errors import UserError
from unfreeze.layer_groups import backbone_groups


class Logits(nn.Linear):
    """A linear layer that computes in full precision, also where the network around it does not.

    In bfloat16 two logits between 8 and 16 that differ by less than 1/16 are the same number: a tie of classes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        """Logits (B, C), float32, of (B, F)."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class Head(nn.Sequential):
    """Activations (B, F) -> logits (B, C): BatchNorm, dropout, a linear layer.

    BatchNorm puts activations of any backbone on one scale, so that one range of learning rates fits all.
    """

    def __init__(self, features: int, classes: int, dropout: float) -> None:
        super().__init__(nn.BatchNorm1d(features), nn.Dropout(dropout), Logits(features, classes))
        self.features, self.classes, self.dropout = features, classes, dropout


class Classifier(nn.Module):
    """Images (B, 3, S, S), normalised -> logits (B, C).

    Attributes:
        bn_freeze: whether the backbone's BatchNorm statistics are kept while it trains.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head, self.bn_freeze = backbone, head, True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of a batch; a backbone that is frozen whole leaves no graph behind."""
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.parameters())
        with torch.set_grad_enabled(trains):
            activations = self.backbone(images)
        return self.head(activations)


def layer_groups(model: Classifier) -> list[list[str]]:
    """Names of all parameters in three groups: early backbone, late backbone, head."""
    groups = [[f"backbone.{name}" for name in group] for group in backbone_groups(model.backbone)]
    return [*groups, [f"head.{name}" for name, _ in model.head.named_parameters()]]


def freeze_to(model: Classifier, n: int, bn_freeze: bool = True) -> None:
    """Freeze the layer groups before number n; those from n on train.

    Args:
        model: the classifier.
        n: 0 trains everything, 1 leaves the early backbone frozen, 2 trains only the head.
        bn_freeze: keep the backbone's BatchNorm statistics also where it trains.

    Raises:
        UserError: there is no layer group n.
    """
    groups = layer_groups(model)
    if not 0 <= n < len(groups):
        raise UserError(f"unfreeze.freeze_to is {n}, but must be 0 to {len(groups) - 1}.")
    parameters = dict(model.named_parameters())
    for number, group in enumerate(groups):
        for name in group:
            parameters[name].requires_grad_(number >= n)
    model.bn_freeze = bn_freeze


def set_train_mode(model: Classifier) -> None:
    """Training mode for what trains, eval mode for what is frozen.

    Frozen means frozen: BatchNorm statistics, dropout and stochastic depth of a frozen part stay as for prediction. A
    module without parameters of its own goes with the part that it is in.
    """

    def visit(module: nn.Module, inherited: bool) -> None:
        own = [p.requires_grad for p in module.parameters()]
        module.training = any(own) if own else inherited
        for child in module.children():
            visit(child, module.training)

    visit(model, True)
    if model.bn_freeze:
        for module in model.backbone.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def parameter_groups(model: Classifier, lr_ratio: float) -> list[dict[str, Any]]:
    """The parameters that train, for an optimizer, with differential rates.

    Each group carries ``lr_scale``: 1 for the head, for each earlier layer group that of the next divided by
    ``lr_ratio``. Within it weight decay is as in `decay_groups`.
    """
    parameters = dict(model.named_parameters())
    groups: list[dict[str, Any]] = []
    names = layer_groups(model)
    for number, group in enumerate(names):
        scale = lr_ratio ** (number - len(names) + 1)
        training = [parameters[name] for name in group if parameters[name].requires_grad]
        groups += [part | {"lr_scale": scale} for part in decay_groups(training)]
    return groups


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Parameters for an optimizer: weight decay on matrices, none on biases and norms, which are one-dimensional."""
    parameters = list(parameters)
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    plain = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]
