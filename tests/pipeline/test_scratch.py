"""The inputs on which a step's checkpoints depend, and the removal of checkpoints."""

from pathlib import Path

import pytest

from pipeline import scratch
from pipeline.artifacts import artifact


def test_checkpoints_depend_on_settings_images_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "pixels.bin").write_bytes(b"12")
    (tmp_path / "dvc.yaml").write_text("stages: {train_full: {deps: [code.py, pixels.bin]}}")
    word = scratch.fingerprint("train_full", {"rate": 1, "seed": 2})
    assert scratch.fingerprint("train_full", {"seed": 2, "rate": 1}) == word
    assert scratch.fingerprint("train_full", {"seed": 3, "rate": 1}) != word
    (tmp_path / "code.py").write_text("2")
    changed = scratch.fingerprint("train_full", {"seed": 2, "rate": 1})
    assert changed != word
    (tmp_path / "pixels.bin").write_bytes(b"123")
    assert scratch.fingerprint("train_full", {"seed": 2, "rate": 1}) != changed


def test_checkpoints_depend_on_all_files_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code/inner").mkdir(parents=True)
    (tmp_path / "code/inner/a.py").write_text("1")
    (tmp_path / "dvc.yaml").write_text("stages: {train_full: {deps: [code]}}")
    words = [scratch.fingerprint("train_full", {})]
    (tmp_path / "code/inner/__pycache__").mkdir()
    (tmp_path / "code/inner/__pycache__/a.pyc").write_text("compiled")
    assert scratch.fingerprint("train_full", {}) == words[0]
    for change in (
        lambda: (tmp_path / "code/inner/a.py").write_text("2"),
        lambda: (tmp_path / "code/b.py").write_text("new"),
        lambda: (tmp_path / "code/b.py").rename(tmp_path / "code/c.py"),
        lambda: (tmp_path / "code/c.py").unlink(),
    ):
        change()
        words.append(scratch.fingerprint("train_full", {}))
    assert len(set(words[:-1])) == 4 and words[-1] == words[1]


def test_checkpoints_of_finished_steps_and_of_other_settings_are_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("precompute/a", "train_head/a", "train_full/a", "train_full/b", "retrain/a"):
        (scratch.ROOT / name).mkdir(parents=True)
    for stage in ("ingest", "train_head"):  # precompute is unfinished: a later step was started by hand
        artifact(stage, "").mkdir(parents=True)
        artifact(stage, "metrics.json").touch()
    scratch.clear_earlier("train_full")
    scratch.clear_foreign(scratch.ROOT / "train_full/a")
    left = sorted(str(path.relative_to(scratch.ROOT)) for path in scratch.ROOT.glob("*/*"))
    assert left == ["precompute/a", "retrain/a", "train_full/a"]
