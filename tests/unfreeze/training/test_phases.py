"""The recipe's training phases on a real network: resuming after an interruption, values computed once, and messages."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.devices import DEVICES
from unfreeze.acceleration.frozen import frozen_copy
from unfreeze.batches.loader import Batch, Loader, shuffled
from unfreeze.batches.rendering import Normalisation
from unfreeze.device import seed_everything, to_device
from unfreeze.errors import UserError
from unfreeze.evaluation import predicting
from unfreeze.evaluation.metrics import score
from unfreeze.evaluation.predicting import predict, predict_tta, predict_tta_of_heads
from unfreeze.evaluation.predictor import packed_in_memory
from unfreeze.models.backbones import create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.settings.schema import LRFind, Settings, TrainAugmented, TrainFull, load_settings
from unfreeze.training import phases
from unfreeze.training.checkpoints import Checkpoint
from unfreeze.training.history import History
from unfreeze.training.loop import Callbacks, make_optimizer
from unfreeze.training.phases import Images, derive_seed, fit_augmented, fit_full, unfrozen
from unfreeze.training.range_test import range_test

SIZE, BATCH, CPU = 32, 8, torch.device("cpu")
TRAIN, VALID = np.arange(42), np.arange(42, 60)  # five batches, and two remaining images
BATCHES = 5


class Killed(Exception):
    """Simulates the end of the process."""


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(Path(__file__).parent.parent.parent.parent / "params.yaml")


def material(device: torch.device = CPU) -> tuple[Classifier, Loader]:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (SIZE, SIZE + 4, 3), dtype=np.uint8) for _ in range(60)]
    packed = packed_in_memory(pixels, ["a", "b"], SIZE)
    packed.table["path"] = [f"image {i}.png" for i in range(60)]
    packed = dataclasses.replace(packed, labels=np.arange(60, dtype=np.int64) % 2)
    seed_everything(1)
    backbone = create_backbone("timm:tf_efficientnet_lite0", "none", SIZE)
    model = to_device(Classifier(backbone, Head(backbone.num_features, 2, 0.5)), device)
    return model, Loader(packed, Normalisation(backbone.mean, backbone.std), device, BATCH)


def augmented(
    settings: Settings,
    checkpoint: Checkpoint | None = None,
    rate: float = 1e-3,
    device: torch.device = CPU,
    **callbacks: Callable[..., None],
) -> tuple[Classifier, History, Loader]:
    model, loader = material(device)
    history = fit_augmented(
        model, Images(loader, TRAIN, VALID, settings.augment, 7), rate, TrainAugmented("sgdr", 2, 1, 1),
        settings.train, Callbacks(**callbacks, checkpoint=checkpoint),
    )  # fmt: skip
    return model, history, loader


@DEVICES
@pytest.mark.parametrize(
    "kill_at, together", [(kill_at, 2) for kill_at in range(2 * BATCHES)] + [(1, 3), (3, 3), (7, 4)]
)
def test_the_augmented_head_ends_the_same_whatever_batch_it_was_killed_at(
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    kill_at: int,
    together: int,
    device: torch.device,
) -> None:
    """Several batches go through the backbone together. The training may resume at any of them."""
    monkeypatch.setattr(Loader, "wide", together * BATCH)

    def kill(rows: Any) -> None:
        if rows[-1]["iteration"] >= kill_at:
            raise Killed

    model, history, _ = augmented(settings, device=device)
    checkpoint = Checkpoint(tmp_path / "training.safetensors", "key", seconds=1e9, batches=1)
    with pytest.raises(Killed):
        augmented(settings, checkpoint, batches=kill, device=device)
    again, resumed, _ = augmented(settings, checkpoint, device=device)
    assert resumed == history
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@DEVICES
@pytest.mark.parametrize("kill_at", [1, BATCHES, 13])
def test_a_range_test_ends_the_same_whatever_batch_it_was_killed_at(
    tmp_path: Path, settings: Settings, kill_at: int, device: torch.device
) -> None:
    """Covers several epochs, dropout, an optimizer with state, and weights that have changed."""

    def sweep(checkpoint: Checkpoint | None = None, last: int | None = None) -> tuple[list[float], list[float], int]:
        model, loader = material(device)
        seen = 0

        def batches(epoch: int, first: int) -> Iterator[Batch]:
            nonlocal seen
            for batch in loader.augmented(TRAIN, settings.augment, 0, epoch, first):
                if seen == last:
                    raise Killed
                seen += 1
                yield batch

        with unfrozen(model, loader, TRAIN, settings.unfreeze) as groups:
            optimizer = make_optimizer(groups, settings.train)
            short = LRFind(1e-5, 0.03, 14, "minimum", None)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            curve = range_test(model, optimizer, batches, short, 2, checkpoint)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        return curve["rate"].tolist(), curve["loss"].tolist(), seen

    checkpoint = Checkpoint(tmp_path / "sweep.safetensors", "key", seconds=1e9, batches=1)
    *curve, whole = sweep()
    with pytest.raises(Killed):
        sweep(checkpoint, kill_at)
    *again, rest = sweep(checkpoint)
    assert again == curve
    assert (whole, rest) == (14, 14 - kill_at)


@DEVICES
@pytest.mark.parametrize("kill_at", [1, 8, 9])
def test_predictions_end_the_same_whatever_batch_they_were_killed_at(
    tmp_path: Path, settings: Settings, kill_at: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions of the views come first, then those of the plain images. The last batch of each is small."""
    model, loader = material(device)
    seen: list[int] = []
    last = math.inf

    def count(network: Any, images: Any, output: Any) -> None:
        if len(seen) == last:
            raise Killed
        seen.append(len(images[0]))

    def watched(*arguments: Any) -> Any:
        frozen = frozen_copy(*arguments)
        frozen.register_forward_hook(count)
        return frozen

    def predictions(kept: ResumableFile | None) -> list[bytes]:
        seen.clear()
        found = predict_tta(model, loader, VALID[:17], settings.augment, 8, kept)
        return [probabilities.tobytes() for probabilities in found.averaged()]

    monkeypatch.setattr(predicting, "TOGETHER", 1)
    monkeypatch.setattr(predicting, "frozen_copy", watched)
    expected, batches = predictions(None), list(seen)
    assert len(batches) == 11 and batches[-3] < batches[0] > batches[-1]
    last = kill_at
    with pytest.raises(Killed), ResumableFile(tmp_path / "kept", "key", 1e9) as kept:
        predictions(kept)
    last = math.inf
    for left in (batches[kill_at:], []):
        with ResumableFile(tmp_path / "kept", "key", 1e9) as kept:
            assert predictions(kept) == expected
        assert seen == left


@DEVICES
@pytest.mark.parametrize("keep", [False, True])
def test_heads_on_one_backbone_predict_together_what_each_predicts_alone(
    tmp_path: Path, settings: Settings, keep: bool, device: torch.device
) -> None:
    model, loader = material(device)
    heads = [Head(model.backbone.num_features, 2, 0.5).to(device).eval() for _ in range(3)]
    with ResumableFile(tmp_path / "kept", "key", 1e9) if keep else nullcontext() as kept:
        together = predict_tta_of_heads(model.backbone, heads, loader, VALID, settings.augment, 3, kept)
    for head, found in zip(heads, together, strict=True):
        alone = predict_tta(Classifier(model.backbone, head), loader, VALID, settings.augment, 3)
        np.testing.assert_allclose(found.plain, alone.plain, atol=1e-6)
        np.testing.assert_allclose(found.views, alone.views, atol=1e-6)
    assert not np.allclose(together[0].plain, together[1].plain, atol=1e-3)


@DEVICES
def test_the_augmented_head_is_judged_as_it_predicts(settings: Settings, device: torch.device) -> None:
    model, history, loader = augmented(settings, device=device)
    found = score(predict(model, loader.plain(VALID)), loader.packed.labels[VALID])
    assert history.epochs[-1]["valid_loss"] == pytest.approx(found.loss, abs=0.01)
    assert history.epochs[-1]["valid_accuracy"] == pytest.approx(found.accuracy, abs=1.01 / len(VALID))


def test_the_frozen_network_sees_two_batches_at_once_and_validation_images_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(*arguments: Any) -> Any:
        frozen = frozen_copy(*arguments)
        frozen.register_forward_hook(lambda module, images, output: seen.append(len(images[0])))
        return frozen

    monkeypatch.setattr(phases, "frozen_copy", watched)
    augmented(settings)
    epoch = [2 * BATCH, 2 * BATCH, BATCH]
    assert seen == [*epoch, 2 * BATCH, len(VALID) - 2 * BATCH, *epoch]


def test_only_the_head_of_the_augmented_head_changes(settings: Settings) -> None:
    before, _ = material()
    after, _, _ = augmented(settings)
    for name, tensor in after.state_dict().items():
        same = name.startswith("backbone.") or name.endswith("temperature")
        assert torch.equal(tensor, before.state_dict()[name]) == same, name


@pytest.mark.parametrize("step", ["train_augmented", "train_full"])
def test_where_the_loss_is_no_number_the_rate_and_the_images_are_named(settings: Settings, step: str) -> None:
    with pytest.raises(UserError) as caught:
        if step == "train_augmented":
            augmented(settings, rate=1e38)
        else:
            model, loader = material()
            full = TrainFull("constant", 1, 1, 1, warmup=0, until_overfitting=False)
            data = Images(loader, TRAIN, VALID, settings.augment, 7)
            fit_full(model, data, 1e38, full, settings.unfreeze, settings.train)
    sentence, *names = str(caught.value).split("\n  ")
    found = re.fullmatch(
        r"The training loss became (nan|inf) at iteration \d+ \(epoch 1, batch (\d)\) with the rate .*", sentence
    )
    assert found and "a lower rate" in sentence
    rows = shuffled(TRAIN, BATCH, derive_seed(7, step), 0)[int(found[2]) - 1]
    assert names == [f"image {row}.png" for row in rows]
