"""Use of the available hardware."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.devices import NEEDS_A_GPU, NEEDS_NO_GPU
from unfreeze import device
from unfreeze.device import choose_device, describe, deterministically, precision
from unfreeze.errors import UserError

CODE = """
import resource, sys
import torch
from unfreeze.device import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def batch():
    return [torch.ones(12_000_000) for _ in range(2)]
def mapped():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = []
for _ in range(30):
    before = mapped()
    batch()
    counts.append(mapped() - before)
print(min(counts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_memory_that_a_batch_frees_is_there_for_the_next() -> None:
    """Count the pages that a batch of 96 MB maps: 23,400 if its memory was returned to the operating system.

    At first the heap sometimes grows by a tensor. The test therefore uses the best of thirty batches.
    """

    def fewest(what: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, what], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert fewest("keep") < 1_000 < 20_000 < fewest("default")


def test_the_cpu_is_taken_where_it_is_wanted() -> None:
    assert choose_device("cpu").type == "cpu"
    assert describe(choose_device("cpu")) == f"the CPU, {torch.get_num_threads()} threads"


@NEEDS_A_GPU
def test_a_gpu_is_taken_where_there_is_one() -> None:
    assert choose_device("auto").type == choose_device("cuda").type == "cuda"


@NEEDS_NO_GPU
def test_cuda_is_refused_with_the_reason_where_it_does_not_work() -> None:
    with pytest.raises(UserError, match="device is cuda, but CUDA does not work here: .+ Set device to auto or cpu"):
        choose_device("cuda")


@NEEDS_NO_GPU
@pytest.mark.parametrize("driver", [True, False])
def test_auto_warns_with_the_reason_where_there_is_a_driver(
    driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a driver, nobody expects a GPU."""
    (tmp_path / "version").touch()
    monkeypatch.setattr(device, "DRIVER", tmp_path / ("version" if driver else "none"))
    with caplog.at_level(logging.WARNING, "unfreeze"):
        assert choose_device("auto").type == "cpu"
    assert bool(caplog.records) == driver
    assert not driver or "CUDA does not work: " in caplog.text


@pytest.mark.filterwarnings("ignore:put_ does not have")
def test_an_operation_without_a_deterministic_form_is_named_and_done_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def work() -> torch.Tensor:
        return torch.zeros(3).put_(torch.tensor([1]), torch.tensor([5.0]))

    torch.use_deterministic_algorithms(True)
    try:
        with caplog.at_level(logging.WARNING, "unfreeze"):
            assert deterministically(work).tolist() == [0, 5, 0]
        assert "Not repeatable bit for bit" in caplog.text and "put_" in caplog.text
        with pytest.raises(RuntimeError, match="of another kind"):
            deterministically(lambda: (_ for _ in ()).throw(RuntimeError("of another kind")))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("amx, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bfloat16_only_with_amx(
    monkeypatch: pytest.MonkeyPatch, amx: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert precision(torch.device("cpu")) == dtype
