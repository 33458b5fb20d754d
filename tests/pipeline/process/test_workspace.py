"""Copies of the workspace in which DVC runs experiments."""

from pathlib import Path

import pytest

from pipeline.process.workspace import link_source, workspace

COPIES = (".dvc/tmp/exps/tmpa", ".dvc/tmp/exps/standalone/tmpb")  # from its queue, and from `dvc exp run --temp`


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    for copy in COPIES:
        (folder / copy).mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_the_workspace_is_the_one_that_was_copied(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace() == Path()
    for place in (*COPIES, f"{COPIES[0]}/below"):
        (project / place).mkdir(exist_ok=True)
        monkeypatch.chdir(project / place)
        assert workspace().resolve() == project


@pytest.mark.parametrize("source", ["../photos", "./../photos/labels.csv", "../../elsewhere/photos"])
def test_images_at_a_relative_path_are_found_from_a_copy(project: Path, source: str) -> None:
    images = project / source
    images.mkdir(parents=True)
    link_source(source)
    link_source(source)
    for copy in COPIES:
        assert (project / copy / source).resolve() == images.resolve()
    assert {path.name for path in project.iterdir()} == {".dvc"}


def test_a_link_follows_the_images(project: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "photos").symlink_to("one")
    link_source("../photos")
    (tmp_path / "two").mkdir()
    (tmp_path / "photos").unlink()
    (tmp_path / "photos").symlink_to("two")
    assert (project / COPIES[0] / "../photos").resolve() == tmp_path / "two"


@pytest.mark.parametrize("source", ["photos", "sample:elpv", "/tmp/photos", "..", "../../../../../photos"])
def test_nothing_is_linked_where_no_link_would_help(project: Path, source: str) -> None:
    link_source(source)
    assert not [path for path in project.rglob("*") if path.is_symlink()]
