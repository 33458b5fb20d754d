"""Ceilings: throughput of the network alone on one batch in memory, in images per second.

A ceiling is the throughput of the fastest variant: full precision or bfloat16, planes (channels first) or channels
last, eager or compiled, and unfreeze's own. Inference is measured with the training batch size and with twice that.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.ours import WHOLE
from benchmarks.work import Work, batch_size, classifier
from unfreeze.acceleration.fast_training import fast_training
from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.device import best_device, precision, to_device
from unfreeze.models.freezing import freeze_to, parameter_groups, set_train_mode
from unfreeze.settings.schema import Unfreeze
from unfreeze.training.loop import make_optimizer, set_rate

Ways = dict[str, float]
Variant = tuple[str, Any, torch.Tensor, Any]
FORWARD_REPEATS, STEP_REPEATS = 12, 6
_for_good = contextlib.ExitStack()
"""Contexts that stay open until the process ends."""


def forward(work: Work) -> Ways:
    """Images per second of the frozen network, for each variant; 0 if a variant is not available on this machine."""
    device, ways, size = best_device(), {}, batch_size(work)
    for count in (size, 2 * size):
        for name, model, batch, context in _variants(work, count, train=False):

            def run(model: Any = model, batch: Any = batch, context: Any = context) -> None:
                with torch.no_grad(), context():  # not inference mode, in which torch.compile folds no constants
                    model(batch)

            ways[f"{name}, {count} images"] = (
                count / _seconds(run, FORWARD_REPEATS, device) if model is not None else 0.0
            )
    return ways


def training(work: Work, unfreeze: Unfreeze = WHOLE) -> Ways:
    """Images per second of a training step (forward, backward, optimizer), for each variant."""
    device, ways = best_device(), {}
    for name, model, batch, context in _variants(work, batch_size(work), train=True, unfreeze=unfreeze):
        inner: Any = getattr(model, "_orig_mod", model)
        optimizer = make_optimizer(parameter_groups(inner, unfreeze.lr_ratio), work.settings.train)
        set_rate(optimizer, 1e-6)
        labels = torch.zeros(len(batch), dtype=torch.long, device=device)

        def run(
            model: Any = model, batch: Any = batch, context: Any = context, optimizer: Any = optimizer, y: Any = labels
        ) -> None:
            with context():
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        ways[name] = len(batch) / _seconds(run, STEP_REPEATS, device)
    return ways


@cache
def _variants(work: Work, count: int, train: bool, unfreeze: Unfreeze = WHOLE) -> list[Variant]:
    """(name, model, batch, context) of each variant; cached, because compiling takes longer than measuring."""
    return list(_each_variant(work, count, train, unfreeze))


def _each_variant(work: Work, count: int, train: bool, unfreeze: Unfreeze) -> Iterator[Variant]:
    torch._dynamo.config.recompile_limit = 64  # all variants are compiled from the same code
    device = best_device()
    base, _ = classifier(work, seed=0)  # as unfreeze creates it
    size = work.image_size
    batch = torch.randn(count, 3, size, size, device=device)

    def plain() -> Any:
        from benchmarks.work import backbone
        from unfreeze.models.classifier import Classifier

        return Classifier(backbone(work), copy.deepcopy(base.head)).to(device)

    def prepared(model: Any) -> Any:
        freeze_to(model, unfreeze.freeze_to if train else 2, unfreeze.bn_freeze)
        set_train_mode(model)
        return model if train else model.eval()

    def half() -> Any:
        return torch.autocast(device.type, dtype=torch.bfloat16)

    contexts: dict[str, Any] = {"float32": contextlib.nullcontext}
    if precision(device) == torch.bfloat16:
        contexts["bfloat16"] = half
    for dtype, context in contexts.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            where = "channels last" if layout is torch.channels_last else "planes"
            yield f"{dtype}, {where}", prepared(plain().to(memory_format=layout)), _laid(batch, layout), context
        last = _laid(batch, torch.channels_last)
        model = prepared(plain().to(memory_format=torch.channels_last))
        yield f"{dtype}, channels last, compiled", torch.compile(model, dynamic=False), last, context
    context = list(contexts.values())[-1]
    ours = prepared(to_device(plain(), device))
    if train:
        _for_good.enter_context(fast_training(ours.backbone, last))
    yield "unfreeze", ours, last, context
    if not train:
        yield "unfreeze, folded", frozen_copy(prepared(to_device(plain(), device)), last), last, context
        frozen = _constant(prepared(plain().to(memory_format=torch.channels_last)), last, context)
        yield "compiled with its weights as constants", frozen, last, context


def _constant(model: Any, batch: torch.Tensor, context: Any) -> Any:
    """The network compiled for inference with folded constants, or None if that fails on this machine."""
    import torch._inductor.config

    try:
        # Inductor's freezing is set in two places. The option separates this compiled code from that of the other
        # variants. The patch is needed because dynamo reads the global setting while it traces the network.
        compiled = torch.compile(model, dynamic=False, options={"freezing": True})
        with torch._inductor.config.patch(freezing=True), torch.no_grad(), context():
            compiled(batch)
        return compiled
    except Exception:
        return None


def _laid(batch: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    return batch.contiguous(memory_format=layout)


def _seconds(run: Callable[[], None], repeats: int, device: torch.device) -> float:
    """Median seconds of a call, after two warm-up calls."""
    times = []
    for i in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        if i >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
