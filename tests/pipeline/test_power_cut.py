"""After a power loss, data that was reported as written is on the disk.

The file system is real, and keeps as much in memory as it may.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import dvc_cache, step
from pipeline.artifacts import write_json
from pipeline.exit_codes import WORTH_A_RETRY
from pipeline.tracking.journal import Journal, read, remove, waiting
from tests.disk import Disk
from tests.pipeline.test_no_space import NoTracker
from tests.unfreeze.data.test_packed import data, draw_photos
from unfreeze.data.packing import pack
from unfreeze.data.sources import read_source
from unfreeze.models.classifier import Head
from unfreeze.models.weights import save_head
from unfreeze.persistence.resumable import ResumableFile
from unfreeze.settings.overrides import apply_overrides
from unfreeze.training.checkpoints import Checkpoint, Progress
from unfreeze.training.history import History


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk to which only flushed data is written; other data stays in memory for minutes."""
    try:
        made = Disk(tmp_path / "machine", 64, "commit=300,noauto_da_alloc")
    except OSError as error:
        pytest.skip(f"no disk of its own: {error}")
    yield made
    made.remove()


def weights(folder: Path, version: int) -> None:
    torch.manual_seed(version)
    save_head(Head(300, 20, 0.5), folder / "written")


def metrics(folder: Path, version: int) -> None:
    write_json(folder / "written", {"version": version})


def settings(folder: Path, version: int) -> None:
    if version == 1:
        shutil.copy("params.yaml", folder / "written")
        os.sync()
    apply_overrides(folder / "written", [f"seed={version}"])


def checkpoint(folder: Path, version: int) -> None:
    model = nn.Linear(300, 20)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    progress = Progress(history=History([], [], None), best={}, epoch=version, batch=0, iteration=0, done=False)
    Checkpoint(folder / "written", "key", seconds=0).save(dict(model.named_parameters()), optimizer, progress)


def grown(folder: Path, version: int) -> None:
    with ResumableFile(folder / "scratch", f"{version}", 1e9) as file:
        file.append(os.urandom(100_000), version)
        file.put(folder / "written")


def packed(folder: Path, version: int) -> None:
    pack(read_source(str(folder.parent.parent / "photos")), folder, data(folder), version)


@pytest.mark.parametrize("write", [weights, metrics, settings, checkpoint, grown, packed])
def test_what_was_written_is_there(write: Callable[[Path, int], None], disk: Disk, tmp_path: Path) -> None:
    draw_photos(tmp_path / "photos")
    for version in (1, 2):
        write(disk.folder, version)
        written = {path: path.read_bytes() for path in disk.folder.rglob("*") if path.is_file()}
        disk.cut()
        assert written and {path: path.read_bytes() for path in written} == written


def test_this_disk_does_lose_what_nobody_waits_for(disk: Disk) -> None:
    before, lost = disk.folder / "before", False
    for _ in range(10):  # meanwhile, a step of another test may flush all disks
        before.write_bytes(b"before")
        os.sync()
        (disk.folder / "partial").write_bytes(bytes(100_000))
        (disk.folder / "partial").replace(before)
        (disk.folder / "new").write_bytes(b"new")
        disk.cut()
        lost = lost or (before.read_bytes() == b"before" and not (disk.folder / "new").exists())
        (disk.folder / "new").unlink(missing_ok=True)
    assert lost


def test_pieces_are_there_up_to_the_last_that_was_kept(disk: Disk) -> None:
    with ResumableFile(disk.folder / "file", "a", 1e9) as file:
        for n in range(10):
            file.append(bytes([n]) * 5000, n)
            if n == 6:
                file.keep()
        disk.cut()
    with ResumableFile(disk.folder / "file", "a", 1e9) as file:
        assert file.notes == list(range(7))


def test_a_journal_is_there_before_a_server_knows_of_it_and_its_end_before_it_is_sent(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(disk.folder)
    journal = Journal({"pass": "a", "stage": "ingest"})
    disk.cut()
    monkeypatch.chdir(disk.folder)
    assert [folder.name for folder in waiting()] == [journal.folder.name]
    journal = Journal({"pass": "a", "stage": "explore"})
    journal.write({"closed": True})
    journal.close()
    disk.cut()
    monkeypatch.chdir(disk.folder)
    assert [record for record, _ in read(waiting()[-1], 0)] == [{"closed": True}]
    remove(waiting()[0])
    assert [folder.name for folder in waiting()] == [journal.folder.name]


def cached(content: bytes, torn: bool) -> Path:
    """Create a file in the cache of the DVC project in this folder."""
    name = hashlib.md5(content).hexdigest()
    path = Path(".dvc/cache/files/md5", name[:2], name[2:]).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"" if torn else content)
    path.chmod(0o444)
    return path


def restart() -> None:
    """Simulate a restart of the machine."""
    note = json.loads(dvc_cache.NOTE.read_text())
    dvc_cache.NOTE.write_text(json.dumps(note | {"boot": "another"}))


def test_what_is_torn_in_dvcs_cache_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    assert dvc_cache.drop_torn() == []
    old = cached(b"damaged long before", torn=True)
    os.utime(old, (0, 0))
    dvc_cache.settle()
    whole, torn, listed = cached(b"whole", False), cached(b"torn", True), cached(b"empty", False)
    empty = cached(b"", torn=False)
    assert dvc_cache.drop_torn() == [] and torn.exists()
    restart()
    dvc_cache.RWLOCK.write_text("{}")
    assert dvc_cache.drop_torn() == [torn] and not torn.exists() and not dvc_cache.RWLOCK.exists()
    assert all(path.exists() for path in (old, whole, listed, empty))
    dvc_cache.settle()
    assert dvc_cache.drop_torn() == []
    dvc_cache.NOTE.write_text("")
    assert dvc_cache.drop_torn() == []
    dvc_cache.settle()
    dvc_cache.RWLOCK.write_text("{}")
    monkeypatch.setattr(dvc_cache, "identity", lambda process: "1-as of another container")
    assert dvc_cache.drop_torn() == [] and not dvc_cache.RWLOCK.exists()
    shutil.rmtree(".dvc")
    restart()
    assert dvc_cache.drop_torn() == []


def test_a_step_reads_nothing_that_dvc_has_put_back_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dvc repro` restores the outputs of earlier steps before anything has checked its cache."""
    begun: list[str] = []

    class Tracker(NoTracker):
        def __init__(self, stage: str, *_: object) -> None:
            begun.append(stage)

    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(step, "Tracker", Tracker)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], check=True)
    dvc_cache.settle()
    torn = cached(b"weights", torn=True)
    restart()
    train = step.Step("train_augmented", lambda run: {"accuracy": 1}, ())
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == WORTH_A_RETRY and "start again" in capsys.readouterr().err
    assert not torn.exists() and not begun
    train.main()
    assert begun == ["train_augmented"]
