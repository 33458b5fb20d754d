"""What DVC would hang or stumble at is named before it does."""

import os
import socket
from pathlib import Path

import pytest

from flows import dvc, passes
from flows.checks import check_watchable
from flows.cli import main
from tests import corpus
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides

PARAMS = Path(__file__).parent.parent.parent / "params.yaml"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for label in ("cat", "dog"):
        corpus.write(tmp_path / "photos" / label, {"a.png": corpus.good()["plain.png"]})
    return tmp_path / "photos"


def test_what_is_no_plain_file_is_named(photos: Path) -> None:
    cat = photos / "cat"
    os.mkfifo(cat / "pipe.png")
    (photos / ".hidden").mkdir()
    (photos / ".hidden/gone").symlink_to("nowhere")
    (cat / "circle.png").symlink_to("circle.png")
    (cat / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(photos / "dog/s"))
        with pytest.raises(UserError) as caught:
            check_watchable(str(photos))
    said = str(caught.value).splitlines()
    assert said[0].startswith(f"data.source: DVC, which watches {photos}, cannot read 5 of the things in it")
    assert sorted(said[1:]) == [
        f"  {photos}/.hidden/gone: No such file or directory",
        f"  {photos}/cat/circle.png: Too many levels of symbolic links",
        f"  {photos}/cat/pipe.png: a pipe, socket or device",
        f"  {photos}/cat/zero.png: a pipe, socket or device",
        f"  {photos}/dog/s: a pipe, socket or device",
    ]


def test_names_that_are_not_utf_8_are_named(photos: Path) -> None:
    corpus.write(photos / "cat", {os.fsdecode(b"caf\xe9.png"): b"x"})
    with pytest.raises(UserError, match=r"caf\\udce9.png: its name is not UTF-8"):
        check_watchable(str(photos))


def test_all_else_is_fine(photos: Path) -> None:
    corpus.write(photos / "cat/deep", dict.fromkeys(corpus.NAMES, b"x"))
    (photos / "cat/round").symlink_to(".")
    (photos / "cat/up").symlink_to("..")
    (photos / "cat/link.png").symlink_to("a.png")
    for source in (str(photos), str(photos / "labels.csv"), "sample:elpv", "/nowhere"):
        check_watchable(source)


def test_files_that_may_not_be_read_are_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, closed = os.access, {str(photos / "cat/a.png"), str(photos / "dog/link.png")}
    (photos / "dog/link.png").symlink_to("a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed and usual(path, mode))  # the superuser may
    with pytest.raises(UserError, match="cannot read 2 of the things") as caught:
        check_watchable(str(photos))
    assert sorted(str(caught.value).splitlines()[1:]) == [f"  {path}: Permission denied" for path in sorted(closed)]


def test_before_dvc_is_asked(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text(PARAMS.read_text())
    apply_overrides(tmp_path / "params.yaml", [f"data.source={photos}"])
    os.mkfifo(photos / "cat/pipe.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dvc, "stale_stages", lambda: pytest.fail("asked"))
    with pytest.raises(UserError, match=r"pipe\.png"):
        passes.begin()
    assert main(["check"]) == 2 and "pipe.png: a pipe" in capsys.readouterr().err


def test_what_dvc_says_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"DVC cannot tell what has changed: ERROR: you are not inside of a DVC repository"
    ) as caught:
        dvc.stale_stages()
    assert "\n\n" not in str(caught.value)


def test_a_copy_without_git_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="after `git init`"):
        dvc.stale_stages()
