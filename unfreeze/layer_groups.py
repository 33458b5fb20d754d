"""Layer groups, from early to late: two of the backbone, then the head.

Differential rates and gradual unfreezing need to know which parameters come first (fast.ai 0.7's layer groups).
"""

from torch import nn

from unfreeze.backbones import Backbone


def backbone_groups(backbone: Backbone) -> list[list[str]]:
    """Names of a backbone's parameters in two groups, early and late, each of about half of its blocks."""
    blocks = _timm_blocks(backbone.body) if hasattr(backbone.body, "group_matcher") else _blocks(backbone.body)
    middle = len(blocks) // 2
    halves = blocks[:middle], blocks[middle:]
    return [[f"body.{name}" for block in half for name in block] for half in halves]


def _timm_blocks(body: nn.Module) -> list[list[str]]:
    """timm says itself which parameters belong to which of its layers."""
    from timm.models import group_parameters

    groups = group_parameters(body, body.group_matcher(coarse=False))  # type: ignore[operator]
    return [groups[number] for number in sorted(groups)]


def _blocks(body: nn.Module) -> list[list[str]]:
    """Any other network: its modules in order, the large containers opened up."""
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
