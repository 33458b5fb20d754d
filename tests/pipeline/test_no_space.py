"""Full disks, file size limits, folders without access: a one-line message, and no finished result is lost."""

import errno
import hashlib
import json
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from pipeline import step as steps
from pipeline.exit_codes import USER_ERROR
from pipeline.step import Run, Step
from unfreeze.models.classifier import Head
from unfreeze.models.weights import load_head, save_head

PARAMS = Path(__file__).parent.parent.parent / "params.yaml"


def disk(size: str) -> tuple[str, ...]:
    return "-t", "tmpfs", "-o", f"size={size}", "none"


class NoTracker:
    def __init__(self, *_: object) -> None: ...

    def close(self, status: str, metrics: Mapping[str, float], seconds: float) -> None: ...


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in (PARAMS, PARAMS.with_name("dvc.yaml")):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "Tracker", NoTracker)
    return tmp_path


def ended(work: Callable[[Run], Mapping[str, float]], capsys: pytest.CaptureFixture[str]) -> str:
    """Message of a step that ends with a user error."""
    with pytest.raises(SystemExit) as caught:
        Step("explore", work, ()).main()
    said = capsys.readouterr().err
    assert caught.value.code == USER_ERROR
    assert said.startswith("explore: ") and said.count("\n") == 1 and "what was finished is kept" in said
    return said


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("named", [True, False])
def test_whatever_a_step_runs_into(project: Path, capsys: pytest.CaptureFixture[str], number: int, named: bool) -> None:
    def work(run: Run) -> Mapping[str, float]:
        raise OSError(number, os.strerror(number), *(["curve.csv"] if named else []))

    said = ended(work, capsys)
    where = project / "curve.csv" if named else project / "artifacts/explore"
    assert f"{where}: {os.strerror(number)}. " in said
    assert ("Make space" in said) == (number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def test_other_errors_of_the_system_are_not_dressed_up(project: Path) -> None:
    def work(run: Run) -> Mapping[str, float]:
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    with pytest.raises(ConnectionResetError):
        Step("explore", work, ()).main()


def test_a_limit_of_file_sizes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(run: Run) -> Mapping[str, float]:
        run.path("report.html").write_text("x" * 100_000)
        return {}

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert "Make space" in ended(work, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not Path("artifacts/explore/metrics.json").exists()


def test_metrics_that_do_not_fit_leave_those_of_before(
    project: Path, capsys: pytest.CaptureFixture[str], mounted: Callable[..., None]
) -> None:
    mounted(project / "artifacts", *disk("64k"))
    Step("explore", lambda run: {"images": 3}, ()).main()

    def work(run: Run) -> Mapping[str, float]:
        run.path("filler").write_bytes(b"x" * (shutil.disk_usage("artifacts").free))
        return {"images": 4}

    assert f"{project}/artifacts/explore: No space left on device. Make space" in ended(work, capsys)
    assert json.loads(Path("artifacts/explore/metrics.json").read_text()) == {"images": 3}
    Path("artifacts/explore/filler").unlink()
    Step("explore", lambda run: {"images": 4}, ()).main()
    assert json.loads(Path("artifacts/explore/metrics.json").read_text()) == {"images": 4}


def test_a_folder_of_someone_else(
    as_nobody: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(as_nobody)
    monkeypatch.setattr(steps, "Tracker", NoTracker)
    for file in (PARAMS, PARAMS.with_name("dvc.yaml")):
        shutil.copyfile(file, file.name)
    Path("artifacts").mkdir(mode=0o555)
    said = ended(lambda run: {}, capsys)
    assert f"{as_nobody}/artifacts/explore: Permission denied. See who may read and write there" in said


def test_weights_that_do_not_fit_leave_those_of_before(tmp_path: Path, mounted: Callable[..., None]) -> None:
    mounted(tmp_path / "disk", *disk("256k"))
    file = tmp_path / "disk/head.safetensors"
    save_head(Head(16, 2, 0.5), file)
    before = hashlib.sha256(file.read_bytes()).digest()
    with pytest.raises(OSError) as caught:
        save_head(Head(4000, 400, 0.5), file)
    assert caught.value.errno == errno.ENOSPC
    assert hashlib.sha256(file.read_bytes()).digest() == before and os.listdir(tmp_path / "disk") == [file.name]
    assert load_head(file) is not None
