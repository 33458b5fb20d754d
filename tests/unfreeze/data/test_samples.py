"""The built-in sample, and the link by which DVC watches it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from unfreeze.data.samples import SAMPLES, link_sample

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/elpv.yaml").write_text("version: 1")
    return tmp_path


def test_the_files_of_the_samples_are_there() -> None:
    for file in SAMPLES.values():
        assert yaml.safe_load((ROOT / file).read_text())["package"]


def test_a_sample_gets_its_name_and_nothing_else_does(project: Path) -> None:
    for source in ("sample:elpv", "sample:elpv", "../photos", "sample:other"):
        link_sample(source)
    assert sorted(path.name for path in project.iterdir()) == ["sample:elpv", "samples"]
    assert Path("sample:elpv").read_text() == "version: 1"


def test_dvc_watches_the_file_of_the_sample(project: Path) -> None:
    def dvc(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", "dvc", *words], capture_output=True, text=True, check=True)
        return done.stdout

    dvc("init", "--no-scm", "--quiet")
    Path("params.yaml").write_text("data: {source: 'sample:elpv'}")
    Path("dvc.yaml").write_text("stages: {ingest: {cmd: touch out, deps: ['${data.source}'], outs: [out]}}")
    link_sample("sample:elpv")
    dvc("repro")
    assert "up to date" in dvc("status")
    (project / "samples/elpv.yaml").write_text("version: 2")
    assert "modified:           sample:elpv" in dvc("status")
