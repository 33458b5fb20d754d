"""The training loop, the data path and predictions, compared with computations by hand."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from unfreeze.batches.loader import FEW, Loader, activation_batches, images_per_batch, shuffled
from unfreeze.batches.rendering import Normalisation
from unfreeze.batches.views import random_views, tta_views
from unfreeze.data.packed import PackedImages
from unfreeze.device import to_device
from unfreeze.errors import UserError
from unfreeze.evaluation.predicting import backbone_activations, predict, predict_tta
from unfreeze.evaluation.predictor import packed_in_memory
from unfreeze.models.backbones import Backbone, create_backbone
from unfreeze.models.classifier import Classifier, Head
from unfreeze.models.freezing import freeze_to, layer_groups, parameter_groups, set_train_mode
from unfreeze.models.weights import load_classifier, save_classifier
from unfreeze.settings.schema import Augment, Settings, load_settings
from unfreeze.training.loop import Callbacks, TrainingData, fit, make_optimizer, set_rate
from unfreeze.training.phases import Activations, Images, fit_full, fit_head
from unfreeze.training.schedules import make_schedule
from unfreeze.training.train_step import train_batch

SIZE = 16
CPU = torch.device("cpu")
NORM = Normalisation((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@pytest.fixture(scope="module")
def settings() -> Settings:
    return load_settings(Path(__file__).parent.parent.parent.parent / "params.yaml")


def images(count: int, width: int = SIZE, height: int = SIZE) -> PackedImages:
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]
    packed = packed_in_memory(pixels, ["a", "b"], SIZE)
    return dataclasses.replace(packed, labels=np.arange(count, dtype=np.int64) % 2)


class Body(nn.Sequential):
    def __init__(self) -> None:
        early = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        late = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        super().__init__(early, late, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def network(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(Backbone(Body(), "test", 6, NORM.mean, NORM.std, SIZE), Head(6, 2, 0.3))


def test_augmented_epochs_repeat_with_the_seed_and_differ_without(settings: Settings) -> None:
    loader, rows = Loader(images(12), NORM, CPU, 4), np.arange(12)

    def epoch(seed: int, number: int) -> torch.Tensor:
        return torch.cat([x for x, _ in loader.augmented(rows, settings.augment, seed, number)])

    assert torch.equal(epoch(1, 0), epoch(1, 0))
    assert not torch.equal(epoch(1, 0), epoch(1, 1))
    assert not torch.equal(epoch(1, 0), epoch(2, 0))


def test_random_crops_stay_inside_the_image(settings: Settings) -> None:
    packed = images(64, width=40)
    augment = dataclasses.replace(settings.augment, rotate=0.0, zoom=1.5)
    views = random_views(np.arange(64), packed.sizes, SIZE, augment, np.random.default_rng(0))
    reach = np.abs(views.linear).sum(2) * (SIZE - 1) / 2
    assert (views.centre - reach >= -1e-3).all()
    assert (views.centre + reach <= packed.sizes - 1 + 1e-3).all()


def test_an_epoch_holds_every_image_once_but_for_the_rest() -> None:
    batches = shuffled(np.arange(10, 30), 8, seed=3, epoch=1)
    assert [len(b) for b in batches] == [8, 8]
    together = np.concatenate(batches)
    assert len(set(together)) == 16 and set(together) <= set(range(10, 30))
    assert len(shuffled(np.arange(3), 8, 0, 0)[0]) == 3


def test_batches_without_gradients_are_larger_on_a_gpu_and_never_smaller_than_in_training() -> None:
    packed = images(4)
    assert Loader(packed, NORM, CPU, 8).wide == 16
    for size, batch, expected in ((224, 32, 512), (160, 32, 1003), (1024, 32, 64), (224, 300, 600)):
        loader = Loader(dataclasses.replace(packed, image_size=size), NORM, torch.device("cuda"), batch)
        assert loader.wide == expected


def test_small_training_sets_get_smaller_batches() -> None:
    packed = images(4)
    for train, expected in ((FEW - 1, 32), (FEW, 64)):
        splits = ["train"] * train + ["valid"] * FEW  # images of other splits do not count
        table = pd.DataFrame({"split": splits})
        assert images_per_batch("auto", dataclasses.replace(packed, table=table)) == expected
        assert images_per_batch(8, dataclasses.replace(packed, table=table)) == 8


@pytest.mark.parametrize("first", [0, 16, 32])
def test_activations_are_the_same_whatever_image_they_begin_with(first: int) -> None:
    loader = Loader(images(35), NORM, CPU, 8)
    torch.manual_seed(0)
    backbone = to_device(create_backbone("timm:tf_efficientnet_lite0", "none", SIZE), CPU)
    whole = np.concatenate(list(backbone_activations(backbone, loader)))
    assert whole.shape == (35, backbone.num_features)
    np.testing.assert_array_equal(np.concatenate(list(backbone_activations(backbone, loader, first))), whole[first:])


def test_head_on_activations_is_head_through_the_frozen_backbone() -> None:
    """With the same batches, the weights are the same afterwards, because the backbone is frozen."""
    packed = images(16)
    loader = Loader(packed, NORM, CPU, 8)
    through, alone = network(), network()
    activations = np.concatenate(list(backbone_activations(alone.backbone.float(), loader)))
    freeze_to(through, 2)
    order = [np.arange(8), np.arange(8, 16)]
    results = []
    for model, parameters, batches in (
        (through, parameter_groups(through, 10), [b for rows in order for b in loader.plain(rows)]),
        (alone.head, [{"params": list(alone.head.parameters()), "lr_scale": 1.0}],
         list(activation_batches(activations, packed.labels, order, CPU))),
    ):  # fmt: skip
        if isinstance(model, Classifier):
            set_train_mode(model)
        else:
            model.train()
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        torch.manual_seed(5)
        with torch.autocast("cpu", enabled=False):
            for inputs, labels in batches:
                loss = nn.functional.cross_entropy(model(inputs.float()), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        head = model.head if isinstance(model, Classifier) else model
        results.append({k: v.clone() for k, v in head.state_dict().items()})
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_frozen_parts_do_not_change_by_a_bit(settings: Settings, n: int) -> None:
    model = network()
    freeze_to(model, n, bn_freeze=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = make_optimizer(parameter_groups(model, 3), settings.train)
    set_rate(optimizer, 0.05)
    batches = Loader(images(16), NORM, CPU, 8).augmented(np.arange(16), settings.augment, 0, 0)
    set_train_mode(model)
    for batch in batches:
        train_batch(model, optimizer, batch, nn.CrossEntropyLoss())
    frozen = {name.rsplit(".", 1)[0] for group in layer_groups(model)[:n] for name in group}
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == (name.rsplit(".", 1)[0] in frozen or name.endswith("temperature")), name


def test_bn_freeze_keeps_statistics_and_trains_weights(settings: Settings) -> None:
    model = network()
    freeze_to(model, 0, bn_freeze=True)
    set_train_mode(model)
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    optimizer = make_optimizer(parameter_groups(model, 1), settings.train)
    set_rate(optimizer, 0.05)
    for batch in Loader(images(8), NORM, CPU, 8).plain(np.arange(8)):
        train_batch(model, optimizer, batch, nn.CrossEntropyLoss())
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "tracked" in name), name


def test_differential_rates_divide_group_by_group() -> None:
    model = network()
    freeze_to(model, 0)
    scales = {}
    for group in parameter_groups(model, 10):
        for parameter in group["params"]:
            scales[id(parameter)] = group["lr_scale"]
    for number, names in enumerate(layer_groups(model)):
        for name in names:
            assert scales[id(model.get_parameter(name))] == pytest.approx(10.0 ** (number - 2))
    assert len(scales) == len(list(model.parameters()))


def test_rates_follow_the_schedule_and_the_best_cycle_is_handed_on() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "lr_scale": 0.5}], lr=0)
    losses = iter([1.0, 0.5, 0.8, 0.1])
    states, seen = [], []

    def validate():  # type: ignore[no-untyped-def]
        from unfreeze.evaluation.metrics import Scores

        states.append(model.weight.detach().clone())
        return Scores(len(states), 0.5, calibrated_loss=next(losses))  # only the calibrated loss is compared

    def epochs(epoch: int, first: int):  # type: ignore[no-untyped-def]
        for i in range(first, 3):
            seen.append((epoch, i))
            yield torch.ones(4, 2) * (3 - epoch), torch.tensor([0, 1, 0, 0])

    schedule = make_schedule("sgdr", 4, 1, 1, 3)
    told: list[dict[str, float]] = []
    history = fit(
        model, optimizer, schedule, 0.1, TrainingData(epochs, validate), train_mode=model.train,
        stop_when_overfitting=True, callbacks=Callbacks(batches=told.extend),
    )  # fmt: skip
    assert [row["rate"] for row in history.batches] == pytest.approx(0.1 * schedule.factors[: len(told)])
    assert [row["rate"] for row in history.epochs] == pytest.approx([0.1] * len(history.epochs))  # at a cycle's start
    assert told == history.batches
    assert history.best_cycle == 1 and len(history.epochs) == 3
    assert torch.equal(model.weight, states[history.best_cycle])


def test_a_loss_that_is_no_number_stops_with_rate_and_iteration() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0)

    def epochs(epoch: int, first: int):  # type: ignore[no-untyped-def]
        yield torch.full((2, 2), float("nan")), torch.tensor([0, 1])

    with pytest.raises(UserError, match="iteration 0.*rate"):
        fit(model, optimizer, make_schedule("constant", 1, 1, 1, 1), 0.1, TrainingData(epochs), train_mode=model.train)


def test_same_seed_same_weights_other_seed_others(settings: Settings) -> None:
    def weights(seed: int) -> torch.Tensor:
        model = network()
        loader, rows = Loader(images(16), NORM, CPU, 4), np.arange(16)
        torch.manual_seed(seed)
        short = dataclasses.replace(settings.train_full, cycles=1, until_overfitting=False)
        data = Images(loader, rows, rows[:0], settings.augment, seed)
        fit_full(model, data, 0.01, short, settings.unfreeze, settings.train)
        return torch.cat([v.float().reshape(-1) for v in model.state_dict().values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_head_learns_what_can_be_told_apart(settings: Settings) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 2
    activations = (rng.normal(size=(80, 6)) + 6 * labels[:, None]).astype(np.float32)
    head = Head(6, 2, 0.0)
    rows = np.arange(80)
    data = Activations(activations, labels, rows[:60], rows[60:], 32, 0, CPU)
    history = fit_head(head, data, 0.05, settings.train_head, settings.train)
    assert history.epochs[-1]["valid_accuracy"] > 0.95


class Brightness(nn.Module):
    """Logits from the mean of the input square, so that the probability identifies the square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.float().mean((1, 2, 3))
        return torch.stack([mean, -mean], 1)


def test_tta_is_the_average_by_hand_and_sees_all_of_a_3_to_1_image() -> None:
    pixels = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    pixels[:, :SIZE], pixels[:, 2 * SIZE :] = 250, 90  # the plain centre square is black
    packed = packed_in_memory([pixels], ["a", "b"], SIZE)
    loader, rows, model = Loader(packed, NORM, CPU, 4), np.array([0]), Brightness()
    plain, found = predict_tta(model, loader, rows, Augment("none", 0, 1, 0), 3).averaged()

    def by_hand(left: int) -> np.ndarray:
        square = pixels[:, left : left + SIZE] / 255
        mean = ((square - NORM.mean) / NORM.std).mean()
        return np.exp([mean, -mean]) / np.exp([mean, -mean]).sum()

    views = np.mean([by_hand(0), by_hand(SIZE), by_hand(2 * SIZE)], 0)
    np.testing.assert_allclose(plain[0], by_hand(SIZE), atol=1e-3)
    np.testing.assert_allclose(found[0], (by_hand(SIZE) + views) / 2, atol=1e-3)


@pytest.mark.parametrize("flip", ["none", "horizontal", "both", "dihedral"])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (SIZE + 9, SIZE), (SIZE, 3 * SIZE)])
@pytest.mark.parametrize("count", [1, 4, 8, 20])
def test_views_of_tta_are_those_of_training_each_once_and_inside(flip: str, size: tuple[int, int], count: int) -> None:
    augment = Augment(flip, 0, 1.2, 0.1)
    linear, centre = tta_views(np.array(size), SIZE, augment, count)
    assert len(linear) >= count
    scales = np.abs(np.linalg.det(linear)) ** 0.5
    assert scales.min() >= 1 / 1.2 - 1e-6 and scales.max() <= 1 + 1e-6
    half = np.abs(linear).sum(2) * (SIZE - 1) / 2
    assert (centre - half >= -1e-3).all() and (centre + half <= np.array(size) - 1 + 1e-3).all()
    seen = np.column_stack([linear.reshape(-1, 4), centre])
    plain = [1, 0, 0, 1, *((np.array(size) - 1) / 2)]
    assert len(np.unique(seen.round(4), axis=0)) == len(seen)
    assert size != (SIZE, SIZE) or not (np.abs(seen - plain) < 1e-4).all(1).any()


def test_tta_without_other_views_is_the_plain_prediction() -> None:
    pixels = [np.full((SIZE, SIZE, 3), brightness, np.uint8) for brightness in (90, 200)]
    packed = packed_in_memory(pixels, ["a", "b"], SIZE)
    loader, rows, model = Loader(packed, NORM, CPU, 4), np.array([0, 1]), Brightness()
    plain, found = predict_tta(model, loader, rows, Augment("none", 0, 1, 0), 8).averaged()
    np.testing.assert_array_equal(plain, predict(model, loader.plain(rows)))
    np.testing.assert_allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize(("flip", "views"), [("none", 1), ("horizontal", 1), ("both", 3), ("dihedral", 7)])
def test_without_zoom_no_view_of_a_square_is_there_twice(flip: str, views: int) -> None:
    linear, _ = tta_views(np.array([SIZE, SIZE]), SIZE, Augment(flip, 0, 1, 0), 8)
    assert len(np.unique(linear, axis=0)) == len(linear) == views


def test_weights_come_back_as_they_were_and_damage_is_refused(tmp_path: Path) -> None:
    from unfreeze.models.backbones import create_backbone

    model = Classifier(create_backbone("timm:test_resnet", "none", 32), Head(96, 2, 0.1))
    model.head = Head(model.backbone.num_features, 2, 0.1)
    path, augment = tmp_path / "model.safetensors", Augment("both", 5, 1.1, 0.2)
    save_classifier(model, path, ["ä", "b"], 32, augment)
    back, meta = load_classifier(path)
    assert meta["classes"] == ["ä", "b"] and meta["augment"] == augment and not list(tmp_path.glob("*.partial"))
    for (name, a), b in zip(model.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with safe_open(path, "pt") as file:
        said = json.loads(file.metadata()["unfreeze"])
    for wrong, sentence in (
        ({"augment": {**said["augment"], "flip": "up"}}, "augment.flip is 'up', but must be one of none, horizontal"),
        ({"augment": {"flip": "none"}}, "augment.rotate is missing"),
        ({"augment": 3}, "augment must be a mapping"),
        ({"augment": None}, "augment must be a mapping"),
        ({"tta_views": 0}, "evaluate.tta_views is 0, but must be a whole number, at least 1 and"),
    ):
        save_file(model.state_dict(), path, {"unfreeze": json.dumps(said | wrong)})
        with pytest.raises(UserError, match=sentence):
            load_classifier(path)
    del said["augment"]
    save_file(model.state_dict(), path, {"unfreeze": json.dumps(said | {"flip": "both"})})
    with pytest.raises(UserError, match="lacks augment: an earlier version of unfreeze wrote it"):
        load_classifier(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        load_classifier(path)
