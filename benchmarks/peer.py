"""fastai's side of the comparison, used as documented: `vision_learner`, `lr_find`, `fine_tune`, `tta`."""

import time
from functools import cache
from typing import Any

import numpy as np
import torch

from benchmarks.work import SWEEP, Work, backbone, batch_size, files, timed
from unfreeze.evaluation.metrics import measure


def make_learner(work: Work, seed: int = 0, train_bn: bool = True) -> Any:
    """A learner with the weights of unfreeze's backbone in its body, on the same images and split.

    ``train_bn``: whether the BatchNorm layers of a frozen network train, which is fastai's default.
    """
    from fastai.vision import all as fastai

    fastai.set_seed(seed)
    network = backbone(work)
    table = files(work)
    table = table[table["split"].isin(["train", "valid"])].assign(is_valid=table["split"] == "valid")
    loaders = fastai.ImageDataLoaders.from_df(
        table, path="/", fn_col="file", label_col="label", valid_col="is_valid",
        item_tfms=fastai.Resize(work.image_size),
        batch_tfms=[*_augmentations(work), fastai.Normalize.from_stats(network.mean, network.std)],
        bs=batch_size(work), num_workers=work.workers,
    )  # fmt: skip
    library, short = work.settings.backbone.name.split(":")
    arch = short if library == "timm" else getattr(fastai, short)
    learner = fastai.vision_learner(
        loaders, arch, pretrained=False, normalize=False, metrics=fastai.accuracy, train_bn=train_bn
    )
    body = learner.model[0]
    theirs, ours = body.state_dict(), network.body.state_dict()
    assert [v.shape for v in theirs.values()] == [v.shape for v in ours.values()]
    body.load_state_dict(dict(zip(theirs, ours.values(), strict=True)))
    _check_same(network, body, work.image_size)
    learner.freeze()
    return learner


def _check_same(network: Any, body: Any, size: int) -> None:
    """Check that the activations of unfreeze's network are the means of the feature maps of fastai's body."""
    with torch.no_grad(), torch.random.fork_rng():
        images = torch.randn(2, 3, size, size)
        ours, theirs = network.eval()(images), body.eval()(images).mean((2, 3))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def _augmentations(work: Work) -> list[Any]:
    """fastai's default augmentations, with upside-down mirroring if unfreeze uses it too."""
    from fastai.vision.augment import aug_transforms

    return aug_transforms(flip_vert=work.settings.augment.flip in ("both", "dihedral"))


@cache
def _learner(work: Work, train_bn: bool = True) -> Any:
    return make_learner(work, train_bn=train_bn)


def lr_find(work: Work) -> float:
    """Seconds for an LR range test of the unfrozen network, with `Work.sweep` batches."""
    learner = _learner(work)
    learner.unfreeze()
    start, end = SWEEP.values()
    with _quiet(learner):
        seconds = timed(lambda: learner.lr_find(start, end, work.sweep, stop_div=False, show_plot=False))
    assert len(learner.recorder.losses) == work.sweep
    return seconds


def frozen_epoch(work: Work, train_bn: bool = True) -> float:
    """Seconds for an augmented epoch of the head and BatchNorm layers of the frozen network, including validation."""
    learner = _learner(work, train_bn)
    learner.freeze()
    with _quiet(learner):
        return timed(lambda: learner.fit_one_cycle(1, 1e-4))


def frozen_norms_epoch(work: Work) -> float:
    """Seconds for the same epoch without training BatchNorm layers: only the head trains."""
    return frozen_epoch(work, train_bn=False)


def full_epoch(work: Work) -> float:
    """Seconds for an epoch of the whole network, including validation."""
    learner = _learner(work)
    learner.unfreeze()
    with _quiet(learner):
        return timed(lambda: learner.fit_one_cycle(1, 1e-5))


def tta(work: Work) -> float:
    """Seconds for TTA of the validation images."""
    learner = _learner(work)
    with _quiet(learner):
        return timed(lambda: learner.tta(n=work.views))


def recipe(work: Work, seed: int) -> dict[str, float]:
    """Seconds from images to evaluated model, and scores on valid and test, plain and with TTA."""
    start = time.perf_counter()
    learner = make_learner(work, seed)
    with _quiet(learner):
        rate = learner.lr_find(show_plot=False).valley
        learner.fine_tune(work.full_epochs, rate, freeze_epochs=work.frozen_epochs)
        scores: dict[str, float] = {}
        table = files(work)
        for split in ("valid", "test"):
            rows = table[table["split"] == split]
            loader = learner.dls.test_dl(rows, with_labels=True)
            for prefix, (probabilities, labels) in (
                ("", learner.get_preds(dl=loader)),
                ("tta_", learner.tta(dl=loader, n=work.views)),
            ):
                measured = measure(np.asarray(labels, np.int64), probabilities.numpy())
                scores |= {f"{split}_{prefix}{name}": value for name, value in measured.items()}
    return {"seconds": time.perf_counter() - start, "rate": float(rate), **scores}


def _quiet(learner: Any) -> Any:
    """Context manager that disables fastai's printed table and progress bars, which take time."""
    import contextlib

    stack = contextlib.ExitStack()
    stack.enter_context(learner.no_bar())
    stack.enter_context(learner.no_logging())
    return stack
