"""Inputs on which DVC would hang or fail, or whose changes it would not notice, are reported in advance."""

import os
import socket
import subprocess
from pathlib import Path

import pytest

from flows import dvc, passes
from flows.cli import main
from pipeline.watchable import check_readable, check_watched
from tasks.ingest import ingest
from tests import corpus
from unfreeze.data.sources import read_source
from unfreeze.errors import UserError
from unfreeze.settings.overrides import apply_overrides
from unfreeze.settings.schema import load_settings

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
            check_readable(str(photos))
    said = str(caught.value).splitlines()
    assert said[0].startswith(f"data.source: DVC, which watches {photos}, cannot read 5 of its entries")
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
        check_readable(str(photos))


def test_all_else_is_fine(photos: Path) -> None:
    corpus.write(photos / "cat/deep", dict.fromkeys(corpus.NAMES, b"x"))
    (photos / "cat/round").symlink_to(".")
    (photos / "cat/up").symlink_to("..")
    (photos / "cat/link.png").symlink_to("a.png")
    for source in (str(photos), str(photos / "labels.csv"), "sample:elpv", "/nowhere"):
        check_readable(source)


def test_files_that_may_not_be_read_are_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, closed = os.access, {str(photos / "cat/a.png"), str(photos / "dog/link.png")}
    (photos / "dog/link.png").symlink_to("a.png")
    monkeypatch.setattr(os, "access", lambda path, mode: path not in closed and usual(path, mode))  # root could read
    with pytest.raises(UserError, match="cannot read 2 of its entries") as caught:
        check_readable(str(photos))
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


def test_a_merges_conflict_in_the_lock_file_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subprocess.run(dvc.dvc("init", "--no-scm", "--quiet"), check=True)
    Path("dvc.yaml").write_text("stages:\n  a:\n    cmd: echo\n")
    Path("dvc.lock").write_text("schema: '2.0'\n<<<<<<< HEAD\nstages: {}\n=======\nstages: {a: 1}\n>>>>>>> other\n")
    with pytest.raises(UserError, match=r"dvc.lock has merge conflicts.*git checkout --ours dvc.lock") as caught:
        dvc.stale_stages()
    assert not isinstance(caught.value, dvc.DamagedLock)


def test_a_copy_without_git_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc" / "config").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="or run `git init` here"):
        dvc.stale_stages()


def linked(photos: Path, *classes: str) -> str:
    """A folder whose classes are links to folders."""
    subset = photos.parent / "subset"
    subset.mkdir()
    for label in classes:
        (subset / label).symlink_to(photos / label)
    return str(subset)


def files(source: Path | str) -> list[str]:
    return read_source(str(source))["file"].tolist()


def test_images_behind_links_to_folders_are_refused(photos: Path) -> None:
    source = linked(photos, "cat", "dog")
    with pytest.raises(UserError, match="does not follow links to folders, and would not notice") as caught:
        check_watched(source, files(source))
    assert str(caught.value).splitlines()[-2:] == [f"  {source}/cat", f"  {source}/dog"]


def test_a_link_deep_in_a_class_is_refused_too(photos: Path, tmp_path: Path) -> None:
    corpus.write(tmp_path / "store/2026", {"b.png": b"x"})
    (photos / "cat/old").mkdir()
    (photos / "cat/old/more").symlink_to(tmp_path / "store")
    with pytest.raises(UserError, match=rf"There is 1 link to folders:\n  {photos}/cat/old/more$"):
        check_watched(str(photos), files(photos))


def test_links_to_files_and_a_link_to_the_whole_folder_are_fine(photos: Path, tmp_path: Path) -> None:
    (photos / "cat/link.png").symlink_to("a.png")
    (photos / "cat/round").symlink_to(".")
    (tmp_path / "whole").symlink_to(photos)
    for source in (photos, tmp_path / "whole", tmp_path / "whole/cat/.."):
        check_watched(str(source), files(source))


def test_a_step_that_dvc_runs_refuses_links_to_folders(photos: Path) -> None:
    params = photos.parent / "params.yaml"
    params.write_text(PARAMS.read_text())
    apply_overrides(params, [f"data.source={linked(photos, 'cat', 'dog')}"])
    with pytest.raises(UserError, match="does not follow links"):
        ingest.function(None, 0, load_settings(params).data)


@pytest.mark.parametrize("source", [".", "..", "artifacts"])
def test_a_folder_in_which_a_run_writes_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    project = photos / "project"
    (project / "artifacts").mkdir(parents=True)
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=f"{source} contains {project}.*, where a run writes"):
        check_readable(source)
    check_readable("../cat")


def test_names_that_dvc_takes_for_its_own_are_refused(photos: Path) -> None:
    corpus.write(photos / "cat", {".dvcignore": b""})
    with pytest.raises(UserError, match=r"cat/\.dvcignore: DVC refuses a folder with this file in it"):
        check_readable(str(photos))
    with pytest.raises(UserError, match="ends in .dvc"):
        check_readable(str(photos.rename(photos.with_suffix(".dvc"))))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DVC project, which is the working directory."""
    for words in (("git", "init", "-q"), dvc.dvc("init", "-q")):
        subprocess.run(words, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_images_in_the_project_that_dvc_does_not_see_are_named(project: Path, photos: Path) -> None:
    for source in ("photos", "photos/../photos/"):
        check_watched(source, files(source))
    (project / ".dvcignore").write_text("photos/cat/\n")
    with pytest.raises(UserError, match=r"does not see 1 of the images in it, .*\n  .*/photos/cat/a\.png$"):
        check_watched("photos", files("photos"))


def test_a_project_of_dvc_within_this_one_is_not_seen(project: Path, photos: Path) -> None:
    (photos / ".dvc").mkdir()
    for source in ("photos", "data/photos"):
        with pytest.raises(UserError, match="does not see 2 of the images"):
            check_watched(source, files(source))
        (project / "data").mkdir(exist_ok=True)
        photos = photos.rename(project / "data/photos")
