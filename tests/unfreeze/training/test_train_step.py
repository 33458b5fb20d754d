"""A training step as a CUDA graph, compared with the same step without a graph."""

import logging

import pytest
import torch
from torch import nn

from tests.devices import NEEDS_A_GPU
from unfreeze.batches.loader import Batch
from unfreeze.settings.schema import Train
from unfreeze.training.loop import make_optimizer, set_rate
from unfreeze.training.train_step import TrainStep, record, train_batch

LOSS = nn.CrossEntropyLoss()
RATES = (1e-2, 3e-3, 1e-3, 1e-4)


class Looks(nn.Module):
    """Reads a value on the CPU, which cannot be recorded in a CUDA graph."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.mean()) > 0 else -x


def material(device: str, kind: str, *more: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer, list[Batch]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *more, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 36, 2)]
    model = nn.Sequential(*layers).to(device).train()
    optimizer = make_optimizer([{"params": list(model.parameters())}], Train(kind, 0.01, 0.0, "none"))
    batches = [(torch.randn(5, 3, 8, 8).to(device), torch.tensor([0, 1, 0, 1, 0]).to(device)) for _ in RATES]
    return model, optimizer, batches


def trained(device: str, kind: str, recorded: bool) -> list[torch.Tensor]:
    """Losses, weights and buffers after some steps, each with its own rate."""
    model, optimizer, batches = material(device, kind)
    step = TrainStep(model, optimizer, LOSS) if recorded else lambda b: train_batch(model, optimizer, b, LOSS)
    torch.manual_seed(1)
    losses = []
    for rate, batch in zip(RATES, batches, strict=True):
        set_rate(optimizer, rate)
        losses.append(step(batch))
    return [*losses, *model.parameters(), *model.buffers()]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", id="device_cuda", marks=NEEDS_A_GPU)])
def test_steps_have_the_same_bits_as_batches_trained_one_by_one(device: str, kind: str) -> None:
    expected = trained(device, kind, False)
    for _ in range(1 if device == "cpu" else 20):  # errors in the order of streams would not show every time
        for found, value in zip(trained(device, kind, True), expected, strict=True):
            assert torch.equal(found, value)


@NEEDS_A_GPU
@pytest.mark.parametrize("kind", [pytest.param("adamw", id="device_cuda")])
def test_a_recording_is_used_and_leaves_no_trace(kind: str) -> None:
    model, optimizer, batches = material("cuda", kind)
    # Detached, because an autograd graph would block the recording.
    before = [tensor.detach().clone() for tensor in [*model.parameters(), *model.buffers()]]
    chance = torch.cuda.get_rng_state()
    assert record(model, optimizer, batches[0], LOSS) is not None
    assert all(torch.equal(a, b) for a, b in zip(before, [*model.parameters(), *model.buffers()], strict=True))
    assert torch.equal(chance, torch.cuda.get_rng_state())


@NEEDS_A_GPU
@pytest.mark.parametrize("kind", [pytest.param("adamw", id="device_cuda")])
def test_a_model_that_cannot_be_recorded_is_trained_all_the_same(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, batches = material("cuda", kind, Looks())
    with caplog.at_level(logging.INFO, "unfreeze"):
        loss = TrainStep(model, optimizer, LOSS)(batches[0])
    assert torch.isfinite(loss) and "Training without a CUDA graph" in caplog.text
    torch.randn(2, device="cuda")  # the random generator works, and the next model can be recorded
    model, optimizer, batches = material("cuda", kind)
    assert record(model, optimizer, batches[0], LOSS) is not None


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes in float16 on the CPU, like a GPU with tensor cores but without bfloat16."""
    monkeypatch.setattr("unfreeze.device.precision", lambda device: torch.float16)


@pytest.mark.usefixtures("float16")
def test_gradients_too_small_for_float16_train_all_the_same() -> None:
    model, optimizer, [(images, labels), *_] = material("cpu", "sgd")
    before, head = model[-1].weight.detach().clone(), model[-1]
    images, loss = images * 1e-2, nn.CrossEntropyLoss(weight=torch.full((2,), 1e-6), reduction="sum")
    set_rate(optimizer, 1.0)
    train_batch(model, optimizer, (images, labels), loss)
    underflow = (model[0].weight.grad == 0).float().mean()
    head.weight.data.copy_(before)
    step = TrainStep(model, optimizer, loss)
    assert step.scaler.is_enabled()
    step((images, labels))
    assert underflow > (model[0].weight.grad == 0).float().mean() == 0


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_is_halved(kind: str) -> None:
    model, optimizer, [batch, *_] = material("cpu", kind)
    step = TrainStep(model, optimizer, LOSS)
    rubbish = [torch.full((size,), float("nan")) for size in (12, 12, 72, 108, 288, 432) for _ in range(50)]
    del rubbish  # an uninitialized tensor may get this memory
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    set_rate(optimizer, 1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    step(batch)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert step.scaler.get_scale() == 2.0**29
    momenta = [state.get("momentum_buffer") for state in optimizer.state.values()]
    assert all(momentum is None or not momentum.any() for momentum in momenta)
    for _ in range(30):
        step(batch)
    assert not torch.equal(model[-1].weight, before[-2])
    assert all(p.isfinite().all() for p in model.parameters())
