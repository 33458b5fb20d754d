"""Layer groups, from early to late: two of the backbone, then the head; and which of them train.

Differential rates and gradual unfreezing need to know which parameters come first (fast.ai 0.7's layer groups).
"""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unfreeze.errors import UserError
from unfreeze.models.backbones import Backbone
from unfreeze.models.classifier import Classifier


def backbone_groups(backbone: Backbone) -> list[list[str]]:
    """Names of a backbone's parameters in two groups, early and late, each of about half of its blocks."""
    blocks = _timm_blocks(backbone.body) if hasattr(backbone.body, "group_matcher") else _blocks(backbone.body)
    middle = len(blocks) // 2
    halves = blocks[:middle], blocks[middle:]
    return [[f"body.{name}" for block in half for name in block] for half in halves]


def _timm_blocks(body: nn.Module) -> list[list[str]]:
    """Blocks of a timm network, as timm itself groups its parameters."""
    from timm.models import group_parameters

    groups = group_parameters(body, body.group_matcher(coarse=False))  # type: ignore[operator]
    return [groups[number] for number in sorted(groups)]


def _blocks(body: nn.Module) -> list[list[str]]:
    """Blocks of any other network: its modules in order; containers and the largest modules are split into children."""
    half = sum(p.numel() for p in body.parameters()) / 2
    blocks: list[list[str]] = []

    def walk(module: nn.Module, prefix: str) -> None:
        size = sum(p.numel() for p in module.parameters())
        open_up = type(module) in (nn.Sequential, nn.ModuleList) or size > half
        if not open_up or not list(module.children()):
            names = [prefix + name for name, _ in module.named_parameters()]
            if names:
                blocks.append(names)
            return
        own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
        if own:
            blocks.append(own)
        for name, child in module.named_children():
            walk(child, f"{prefix}{name}.")

    walk(body, "")
    return blocks


def layer_groups(model: Classifier) -> list[list[str]]:
    """Names of all parameters in three groups: early backbone, late backbone, head."""
    groups = [[f"backbone.{name}" for name in group] for group in backbone_groups(model.backbone)]
    return [*groups, [f"head.{name}" for name, _ in model.head.named_parameters()]]


def freeze_to(model: Classifier, n: int, bn_freeze: bool = True) -> None:
    """Freeze the layer groups before number n; those from n on train.

    Args:
        model: the classifier.
        n: 0 trains everything, 1 leaves the early backbone frozen, 2 trains only the head.
        bn_freeze: keep the BatchNorm statistics also in the parts of the backbone that train.

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
    """Put the modules that train into training mode, and the frozen modules into eval mode.

    BatchNorm, dropout and stochastic depth of a frozen part behave as in prediction. A module without parameters gets
    the mode of the module that contains it.
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

    Each group has an ``lr_scale``: 1 for the head, and for each earlier layer group the ``lr_scale`` of the next one
    divided by ``lr_ratio``. Weight decay is as in `decay_groups`.
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
    """Parameters for an optimizer: weight decay on weights of two or more dimensions, not on biases and norms."""
    parameters = list(parameters)
    decayed = {"params": [p for p in parameters if p.ndim > 1]}
    plain = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]
