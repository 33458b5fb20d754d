"""Checkpoints that machines share. In these tests, a machine is a folder."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from pipeline import mirror, scratch
from pipeline.artifacts import write_json
from pipeline.dvc_remote import default_remote
from pipeline.mirror import Mirror, check_share, forget, shared_place
from unfreeze.errors import UserError
from unfreeze.training.checkpoints import Checkpoint, Progress
from unfreeze.training.state import trainable_state

STEP = scratch.ROOT / "train_full" / "word"


def saved(iteration: int, place: str, close: bool = True) -> tuple[Mirror, Checkpoint]:
    """Save a checkpoint and a cycle's weights on this machine, and have them copied to the shared location."""
    shared, checkpoint = Mirror(STEP, place), Checkpoint(STEP / "training.safetensors", "word", 60)
    checkpoint.written = shared.changed
    (STEP / "cycles").mkdir(parents=True, exist_ok=True)
    (STEP / "cycles" / "1.safetensors").write_bytes(b"weights")
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, iteration)
    checkpoint.save(trainable_state(model), torch.optim.SGD(model.parameters()), Progress(iteration=iteration))
    if close:
        shared.close()
    return shared, checkpoint


def reached() -> float:
    """Iteration of this machine's checkpoint, which `saved` has stored as a weight; -1 without a checkpoint."""
    model = nn.Linear(1, 1)
    checkpoint = Checkpoint(STEP / "training.safetensors", "word", 60)
    at = checkpoint.load(trainable_state(model), torch.optim.SGD(model.parameters()))
    return -1 if at is None else model.weight.item()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The shared location of two machines: `lost`, and `here`, on which this process runs."""
    for name in ("lost", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return str(tmp_path / "shared")


def lost(place: str, iteration: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path / "lost")
    saved(iteration, place)
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.parametrize(("here", "there", "after"), [(-1, 5, 5), (3, 5, 5), (5, 3, 5), (5, 5, 5), (7, -1, 7)])
def test_the_checkpoint_that_is_further_is_gone_on_from(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: int, there: int, after: int
) -> None:
    if there >= 0:
        lost(place, there, monkeypatch, tmp_path)
    if here >= 0:
        saved(here, str(tmp_path / "elsewhere"))
    taken = Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word", 60))
    assert (taken, reached()) == (there > here, after)
    if taken:
        assert (STEP / "cycles" / "1.safetensors").read_bytes() == b"weights"
    assert not [path for path in STEP.rglob("*") if "partial" in path.name or "sharing" in path.name]


def test_a_shared_checkpoint_that_is_torn_or_of_another_training_is_not_taken(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost(place, 5, monkeypatch, tmp_path)
    saved(3, str(tmp_path / "elsewhere"))
    [file] = Path(place).rglob("training.safetensors")
    whole = file.read_bytes()
    for content in (whole[:-3], whole[: len(whole) // 2], b"", whole[:-1] + b"x"):
        file.write_bytes(content)
        assert not Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word", 60))
    file.write_bytes(whole)
    assert not Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word on another device", 60))
    assert reached() == 3
    assert Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word", 60))


def test_a_checkpoint_whose_cycles_cannot_be_fetched_is_not_taken(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lost(place, 5, monkeypatch, tmp_path)
    get = Mirror._get

    def away_after_the_checkpoint(self: Mirror, fs: Any, file: str, target: Path) -> Path:
        if "/cycles/" in file:
            raise OSError("the connection was lost")
        return get(self, fs, file, target)

    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "_get", away_after_the_checkpoint)
        assert not Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word", 60))
    assert reached() == -1  # otherwise the training would continue without the weights of its cycles
    assert Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word", 60))
    assert reached() == 5 and (STEP / "cycles" / "1.safetensors").exists()


def test_a_reader_never_sees_half_a_checkpoint(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared, checkpoint = saved(0, place)
    shared = Mirror(STEP, place)
    checkpoint.written = shared.changed
    model = nn.Linear(300, 300)
    optimizer = torch.optim.SGD(model.parameters())
    seen: list[tuple[int, int, bool]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.append(checkpoint._reached(Path(place) / "train_full/word/training.safetensors"))

    reader = threading.Thread(target=look)
    reader.start()
    for iteration in range(1, 40):
        checkpoint.save(trainable_state(model), optimizer, Progress(iteration=iteration))
    shared.close()
    ended.set()
    reader.join()
    assert seen == sorted(seen) and min(seen)[0] >= 0 and len(set(seen)) > 1
    assert checkpoint._reached(Path(place) / "train_full/word/training.safetensors")[0] == 39


def test_a_place_that_is_away_costs_no_training(place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path(place).write_text("no folder")
    shared, checkpoint = saved(1, place)
    assert not shared.fetch(checkpoint)
    assert [record.message for record in caplog.records if "not shared at" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1 and reached() == 1


def test_a_place_that_hangs_holds_up_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PATIENCE", 0.2)
    monkeypatch.setattr(mirror, "_open", lambda address: time.sleep(30))
    monkeypatch.setattr(mirror, "ANSWERS", 0.2)
    start = time.monotonic()
    shared, checkpoint = saved(1, place)
    assert not shared.fetch(checkpoint)
    assert time.monotonic() - start < 10 and reached() == 1


def test_what_is_safe_in_the_remote_is_shared_no_more_nor_what_is_a_week_old(place: str, tmp_path: Path) -> None:
    saved(1, place)
    week = time.time() - 8 * 24 * 3600
    names = (
        "retrain/0123456789abcdef/full.safetensors",
        "retrain/fedcba9876543210/full.safetensors",
        "photos/0123456789abcdef/a",
        "retrain/b/a",
    )
    old, new, *foreign = [Path(place, name) for name in names]
    for file in (old, new, *foreign):
        file.parent.mkdir(parents=True)
        file.touch()
        if file != new:
            os.utime(file, (week, week))
    forget({"retrain"})
    assert (Path(place) / "train_full/word/training.safetensors").exists()
    forget({"ingest", "train_full"})
    assert not (Path(place) / "train_full/word").exists()
    saved(1, place)  # records the location, so that `forget` examines it
    forget({"retrain"})
    assert not old.exists() and new.exists() and all(file.exists() for file in foreign)


def test_a_complete_pass_removes_what_is_a_week_old_too(place: str) -> None:
    saved(1, place)
    old = Path(place, "retrain/0123456789abcdef/full.safetensors")
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (time.time() - 8 * 24 * 3600,) * 2)
    forget({"train_full"})
    assert not (Path(place) / "train_full/word").exists() and not old.exists()


def test_a_failed_copy_leaves_nothing_in_the_shared_location(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(type(fsspec.filesystem("file")), "mv", full)
        saved(1, place)
    assert not [file for file in Path(place).rglob("*") if file.is_file()]
    saved(1, place)
    assert (Path(place) / "train_full/word/training.safetensors").exists()


def test_checkpoints_are_shared_beside_dvcs_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shared_place(None) is None

    def dvc(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "dvc", *words], check=True, capture_output=True)

    dvc("init", "--no-scm", "-q")
    (tmp_path / "mnt").mkdir()
    dvc("remote", "add", "-q", "--default", "team", "mnt/dvc")
    assert shared_place(None) == f"{tmp_path}/mnt/dvc.checkpoints"
    assert shared_place("none") is None and shared_place("s3://bucket/x") == "s3://bucket/x"
    shutil.rmtree(tmp_path / "mnt")
    assert shared_place(None) is None
    dvc("remote", "add", "-q", "--default", "--local", "own", "s3://bucket/dvc")
    assert shared_place(None) == "s3://bucket/dvc.checkpoints"
    dvc("remote", "modify", "-q", "--local", "own", "url", "s3://bucket/")
    assert shared_place(None) == "s3://bucket/checkpoints"  # another bucket may belong to someone else
    dvc("remote", "modify", "-q", "--local", "own", "url", "https://host/dvc")
    assert shared_place(None) is None


def test_dvcs_remote_of_an_account_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "account"))
    (tmp_path / "account").mkdir()
    (tmp_path / "account/config").write_text(
        "[core]\n    remote = Team\n['remote \"team\"']\n    url = ssh://host/dvc\n"
    )
    assert shared_place(None) == "ssh://host/dvc.checkpoints"
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("['remote \"team\"']\n    url = ../mnt\n")
    assert default_remote() == f"{tmp_path}/mnt"
    (tmp_path / ".dvc/config").write_text("no configuration")
    assert shared_place(None) == "ssh://host/dvc.checkpoints"


def test_beside_dvcs_remote_checkpoints_lie_in_its_file_system(
    place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mirror, "default_remote", lambda: "s3://bucket/dvc/")
    monkeypatch.setattr(mirror, "open_remote", lambda url: (fsspec.filesystem("memory"), f"/{url.partition('://')[2]}"))
    beside = shared_place(None)
    assert beside == "s3://bucket/dvc.checkpoints"
    lost(beside, 5, monkeypatch, tmp_path)
    assert fsspec.filesystem("memory").exists("/bucket/dvc.checkpoints/train_full/word/training.safetensors")
    assert Mirror(STEP, beside).fetch(Checkpoint(STEP / "training.safetensors", "word", 60))
    assert reached() == 5


def test_a_place_that_cannot_be_opened_is_refused_with_the_key(tmp_path: Path) -> None:
    check_share(str(tmp_path / "not/there/yet"))
    check_share("none")
    check_share("ftp://127.0.0.1:1/x")  # it does not answer now, and the training would continue without it
    for place in ("nothing://x", "hdfs3://user:secret@x/y"):
        with pytest.raises(UserError, match="checkpoint.share: .* set it to none") as caught:
            check_share(place)
        assert "secret" not in str(caught.value)


def test_an_object_store_takes_checkpoints_too(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Uses the in-memory file system of fsspec, which is always installed."""
    lost("memory://team", 5, monkeypatch, tmp_path)
    assert Mirror(STEP, "memory://team").fetch(Checkpoint(STEP / "training.safetensors", "word", 60))
    assert reached() == 5
    write_json(mirror.NOTE, {"memory://team/train_full/word": "train_full"})
    forget({"train_full"})
    assert not Mirror(STEP, "memory://team").fetch(Checkpoint(STEP / "training.safetensors", "other", 60))
