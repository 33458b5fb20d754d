"""A training that is interrupted and resumed ends bit for bit like an uninterrupted one."""

import dataclasses
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.devices import DEVICES
from unfreeze.batches.loader import Batch
from unfreeze.evaluation.metrics import Scores
from unfreeze.persistence.interruption import Interrupted, Interruption
from unfreeze.settings.schema import Train
from unfreeze.training.checkpoints import Checkpoint, Progress
from unfreeze.training.history import History
from unfreeze.training.loop import Callbacks, TrainingData, fit, make_optimizer
from unfreeze.training.schedules import make_schedule
from unfreeze.training.state import rng_state, set_rng_state, trainable_state

CPU = torch.device("cpu")
BATCHES, CYCLES = 3, 4
VALID_LOSSES = (1.0, 0.8, 0.4, 0.6)
"""The third cycle is the best. Its weights must survive an interruption in the fourth."""


class Killed(Exception):
    """Raised by a test at the point where a process would be killed."""


def network(device: torch.device = CPU) -> nn.Sequential:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.4), nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(4, 2))
    return model.to(device, memory_format=torch.channels_last)


def epochs(epoch: int, first: int) -> Iterator[Batch]:
    for i in range(first, BATCHES):
        rng = np.random.default_rng([epoch, i])
        yield torch.from_numpy(rng.normal(size=(8, 2, 5, 5)).astype(np.float32)), torch.arange(8) % 2


def training(
    optimizer: str,
    checkpoint: Checkpoint | None,
    kill_at: int | None = None,
    on: str = "batches",
    stop: bool = True,
    device: torch.device = CPU,
) -> tuple[dict[str, torch.Tensor], History, list[int]]:
    """One process's part of a training; also returns the iterations reported to callbacks, including replayed ones."""
    model = network(device)
    told: list[int] = []
    done: list[dict[str, float]] = []

    def batches(rows: list[dict[str, float]]) -> None:
        told.extend(int(row["iteration"]) for row in rows)
        if on == "batches" and kill_at is not None and told[-1] >= kill_at:
            raise Killed

    def epoch(row: dict[str, float]) -> None:
        if on == "epoch" and row["epoch"] == kill_at:
            raise Killed
        done.append(row)

    def resumed(progress: Progress) -> None:
        told.extend(int(row["iteration"]) for row in progress.history.batches)
        done.extend(progress.history.epochs)

    def validate() -> Scores:
        model.eval()
        return Scores(0.5, 0.5, calibrated_loss=VALID_LOSSES[len(done)])

    history = fit(
        model,
        make_optimizer([{"params": list(model.parameters())}], Train(optimizer, 0.01, 0.0, "none")),
        make_schedule("sgdr", CYCLES, 1, 1, BATCHES),
        0.05,
        TrainingData(lambda epoch, first: ((x.to(device), y.to(device)) for x, y in epochs(epoch, first)), validate),
        train_mode=model.train,
        stop_when_overfitting=stop,
        callbacks=Callbacks(batches, epoch, resumed=resumed, checkpoint=checkpoint),  # type: ignore[arg-type]
    )
    return model.state_dict(), history, told


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def at(folder: Path, **changes: object) -> Checkpoint:
    plain = Checkpoint(folder / "training.safetensors", "key", seconds=1e9, batches=1)
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


@DEVICES
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("on", "kill_at"), [*(("batches", i) for i in range(12)), *(("epoch", i) for i in range(4))])
def test_killed_anywhere_it_ends_with_the_same_weights_and_history(
    tmp_path: Path, optimizer: str, batches: int, on: str, kill_at: int, device: torch.device
) -> None:
    weights, history, told = training(optimizer, None, device=device)
    with pytest.raises(Killed):
        training(optimizer, at(tmp_path, batches=batches), kill_at, on, device=device)
    torch.manual_seed(99)  # another process starts with another random state
    again, resumed, told_again = training(optimizer, at(tmp_path, batches=batches), device=device)
    assert same(weights, again)
    assert resumed == history
    assert told_again == told == list(range(12))


def test_killed_at_every_batch_in_turn(tmp_path: Path) -> None:
    weights, history, _ = training("adamw", None)
    for i in range(12):
        with pytest.raises(Killed):
            training("adamw", at(tmp_path), i)
    again, resumed, _ = training("adamw", at(tmp_path))
    assert same(weights, again)
    assert resumed == history


@pytest.mark.parametrize("kill_at", [1, 4, 8])
def test_killed_in_float16_it_goes_on_with_the_same_scale_of_gradients(
    tmp_path: Path, kill_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalers = []

    def grad_scaler(device: torch.device) -> torch.amp.GradScaler:
        # Some of its first steps are skipped. The skipped steps and the growth of the scale depend on its state.
        scalers.append(torch.amp.GradScaler(device.type, init_scale=2.0**30, growth_interval=2))
        return scalers[-1]

    monkeypatch.setattr("unfreeze.device.precision", lambda device: torch.float16)
    monkeypatch.setattr("unfreeze.training.train_step.grad_scaler", grad_scaler)
    weights, history, _ = training("adamw", None)
    with pytest.raises(Killed):
        training("adamw", at(tmp_path), kill_at)
    again, resumed, _ = training("adamw", at(tmp_path))
    assert same(weights, again)
    assert resumed == history
    assert scalers[0].state_dict() == scalers[2].state_dict()
    assert scalers[0].get_scale() != 2.0**30


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    weights, history, _ = training("adamw", at(tmp_path))
    seen = []

    def watched(epoch: int, first: int) -> Iterator[Batch]:
        seen.append(epoch)
        return epochs(epoch, first)

    model = network()
    optimizer = make_optimizer([{"params": list(model.parameters())}], Train("adamw", 0.01, 0.0, "none"))
    schedule = make_schedule("sgdr", CYCLES, 1, 1, BATCHES)
    again = fit(
        model, optimizer, schedule, 0.05, TrainingData(watched), train_mode=model.train,
        callbacks=Callbacks(checkpoint=at(tmp_path)),
    )  # fmt: skip
    assert not seen
    assert again == history
    assert same(weights, model.state_dict())


def test_state_of_a_fused_optimizer_comes_back_in_the_layout_of_its_weights(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        training("adamw", at(tmp_path), 4)
    model = network().train()
    optimizer = make_optimizer([{"params": list(model.parameters())}], Train("adamw", 0.01, 0.0, "none"))
    assert at(tmp_path).load(trainable_state(model), optimizer)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (damage, "checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\x80\x04" + os.urandom(500)), "damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], says: str
) -> None:
    weights, _, _ = training("adamw", None)
    with pytest.raises(Killed):
        training("adamw", at(tmp_path), 7)
    spoil(tmp_path / "training.safetensors")
    again, _, told = training("adamw", at(tmp_path))
    assert says in caplog.text
    assert "training.safetensors is not used" in caplog.text
    assert same(weights, again)
    assert told == list(range(12))


def test_both_damaged_it_starts_anew(tmp_path: Path) -> None:
    weights, _, _ = training("adamw", None)
    with pytest.raises(Killed):
        training("adamw", at(tmp_path), 7)
    for path in tmp_path.iterdir():
        damage(path)
    assert same(weights, training("adamw", at(tmp_path))[0])


def test_other_settings_never_go_on_from_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Killed):
        training("sgd", at(tmp_path), 7)
    weights, _, _ = training("adamw", None)
    again, _, _ = training("adamw", at(tmp_path, key="other"))
    assert "made with other settings, images or code" in caplog.text
    assert same(weights, again)


def test_a_wish_to_stop_is_granted_after_the_batch_and_a_checkpoint(tmp_path: Path) -> None:
    weights, _, _ = training("adamw", None)
    wish = Interruption()
    checkpoint = at(tmp_path, batches=None, interruption=wish)
    model = network()
    optimizer = make_optimizer([{"params": list(model.parameters())}], Train("adamw", 0.01, 0.0, "none"))

    def interrupted(epoch: int, first: int) -> Iterator[Batch]:
        for i, batch in enumerate(epochs(epoch, first), first):
            wish.asked = wish.deferred and (epoch, i) == (1, 1)
            yield batch

    schedule = make_schedule("sgdr", CYCLES, 1, 1, BATCHES)
    with pytest.raises(Interrupted):
        fit(
            model, optimizer, schedule, 0.05, TrainingData(interrupted), train_mode=model.train,
            callbacks=Callbacks(checkpoint=checkpoint),
        )  # fmt: skip
    assert not wish.deferred
    progress = at(tmp_path).load(trainable_state(model), optimizer)
    assert progress is not None
    assert (progress.epoch, progress.batch) == (1, 2)
    again, _, _ = training("adamw", at(tmp_path), stop=False)
    assert same(training("adamw", None, stop=False)[0], again)
    assert not same(weights, again)


def test_a_wish_to_stop_is_granted_in_the_middle_of_validation(tmp_path: Path) -> None:
    weights, _, _ = training("adamw", None, stop=False)
    wish = Interruption()
    checkpoint = at(tmp_path, batches=None, interruption=wish)
    model = network()
    optimizer = make_optimizer([{"params": list(model.parameters())}], Train("adamw", 0.01, 0.0, "none"))
    validated = []

    def validate() -> Scores:
        validated.append(wish.deferred)
        if len(validated) == 2:
            raise Interrupted  # as the signal's handler does if stops are not deferred
        return Scores(0.5, 0.5)

    schedule = make_schedule("sgdr", CYCLES, 1, 1, BATCHES)
    with pytest.raises(Interrupted):
        fit(
            model, optimizer, schedule, 0.05, TrainingData(epochs, validate), train_mode=model.train,
            callbacks=Callbacks(checkpoint=checkpoint),
        )  # fmt: skip
    assert validated == [False, False] and not wish.deferred
    progress = at(tmp_path).load(trainable_state(model), optimizer)
    assert progress is not None
    assert (progress.epoch, progress.batch) == (1, BATCHES)
    again, _, _ = training("adamw", at(tmp_path), stop=False)
    assert same(weights, again)


def test_the_interval_grows_with_the_cost(tmp_path: Path) -> None:
    checkpoint = at(tmp_path, seconds=0.0, batches=None)
    assert checkpoint.due()
    checkpoint._cost = 1.0
    checkpoint._last -= 49
    assert not checkpoint.due()
    checkpoint._last -= 2
    assert checkpoint.due()


def test_a_full_disk_costs_the_checkpoint_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    weights, _, _ = training("adamw", None)
    again, _, _ = training("adamw", at(tmp_path / "file"))  # a folder that cannot be created
    assert "No checkpoint" in caplog.text
    assert same(weights, again)


def test_half_a_checkpoint_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unfreeze.training.checkpoints.os.fsync", full)
    model = network().train()
    optimizer = make_optimizer([{"params": list(model.parameters())}], Train("adamw", 0.01, 0.0, "none"))
    at(tmp_path).save(trainable_state(model), optimizer, Progress())
    assert not list(tmp_path.iterdir())


def test_chance_comes_back() -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(1))]

    draw()
    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first
