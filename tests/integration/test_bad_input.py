"""A data set with all kinds of bad input at once, processed by the real steps; and a disk that fills up."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pipeline.exit_codes import USER_ERROR
from pipeline.process.forkserver import warm_process
from tests import corpus
from tests.integration.conftest import Project
from tests.unfreeze.reports.test_reports import check
from unfreeze.settings.overrides import apply_overrides

LABEL = '"><img src=x onerror=alert(1)>'
NOWHERE = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}


@pytest.fixture(scope="module")
def project(make_project: Callable[[], Project]) -> Iterator[Project]:
    with warm_process():  # one import of torch for all steps
        project = make_project()
        project.environment |= NOWHERE | {"UNFREEZE_WARM": os.environ["UNFREEZE_WARM"]}
        yield project


def spoil(photos: Path) -> tuple[int, dict[str, str]]:
    """Add all kinds of files found in users' folders to a class.

    Returns the number of images in the class, and the reasons why the other files must be skipped.
    """
    names = [*corpus.NAMES, *map(os.fsdecode, corpus.RAW_NAMES)]
    named = {n: corpus.encoded(np.roll(corpus.NOISE, i + 1, 1), "PNG") for i, n in enumerate(names)}
    bad = {name: content for name, (content, _) in corpus.bad().items()}
    for folder, files in (("good", corpus.good()), ("bad", bad), ("named/deep/er", named)):
        corpus.write(photos / LABEL / folder, files)
    corpus.write(photos / LABEL, {n: b"x" for n in (".DS_Store", "Thumbs.db", "._a.jpg", "desktop.ini", "notes.txt")})
    corpus.write(photos / LABEL / "__MACOSX", corpus.good())
    corpus.write(photos, {"beside the classes.png": corpus.good()["plain.png"]})
    Image.new("L", (1001, 1000)).save(photos / LABEL / "huge.png")
    os.mkfifo(photos / LABEL / "pipe.png")
    for name, target in (
        ("circle.png", "circle.png"),
        ("gone.png", "nowhere.png"),
        ("round", "."),
        ("zero.png", "/dev/zero"),
    ):
        (photos / LABEL / name).symlink_to(target)
    reasons = {f"{LABEL}/bad/{name}": reason for name, (_, reason) in corpus.bad().items()}
    reasons |= {
        f"{LABEL}/huge.png": "1001 x 1000 pixels are more than 1 megapixels",
        f"{LABEL}/pipe.png": "not a file but a folder, pipe or device",
        f"{LABEL}/zero.png": "not a file but a folder, pipe or device",
        f"{LABEL}/circle.png": "cannot be read: Too many levels of symbolic links",
        f"{LABEL}/gone.png": "cannot be read: No such file or directory",
    }
    return len(corpus.good()) + len(names), reasons


def numbers(project: Project, stage: str) -> dict[str, float]:
    return dict(json.loads((project.folder / "artifacts" / stage / "metrics.json").read_text()))


def cells(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, keep_default_na=False, dtype=str)


@pytest.mark.timeout(200)
def test_all_of_it_at_once(project: Project) -> None:
    photos, params = project.folder.parent / "photos", project.folder / "params.yaml"
    count, reasons = spoil(photos)
    apply_overrides(params, ["data.max_broken=0.9", "data.max_megapixels=1"])
    total = 48 + count
    assert f"packed {total} images, set {len(reasons)} aside" in project.run("tasks", "ingest")
    metrics = numbers(project, "ingest")
    assert (metrics["images"], metrics["broken"], metrics["classes"]) == (total, len(reasons), 3)
    assert metrics["train"] + metrics["valid"] + metrics["test"] == total
    found = cells(project.folder / "artifacts/ingest/images.csv")
    assert len(found) == total + len(reasons) and set(found["label"]) == {"bright", "dark", LABEL}
    told = dict(found.loc[found["reason"] != "", ["path", "reason"]].itertuples(index=False, name=None))
    assert told.keys() == reasons.keys()
    assert found["path"].is_unique and "beside the classes.png" not in set(found["path"])

    output = project.run("tasks", "explore")
    assert f"{len(reasons)} broken" in output and numbers(project, "explore")["images"] == total
    reader = check((project.folder / "artifacts/explore/report.html").read_text(encoding="utf-8"))
    for path, reason in told.items():
        assert path in reader.text and reason in reader.text
    assert LABEL in reader.text


def fingerprints(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.mark.timeout(200)
def test_labels_from_a_csv_file(project: Project) -> None:
    photos = project.folder.parent / "listed"
    labels = ["<script>alert(1)</script>", "007", "NA", "=1+1"]
    rows = []
    for number in range(32):
        name = f"{number:02}" + ("<b>.png" if number % 2 else "")
        corpus.write(photos, {name: corpus.encoded(np.roll(corpus.NOISE, number % 31, 1), "PNG")})
        rows.append((name, labels[number % 4]))
    corpus.write(photos, {"broken": b"<html>"})
    lines = [";".join((f'"{path}"', label)) for path, label in [*rows, *rows[:3], ("broken", "007")]]
    (photos / "labels.csv").write_bytes(("\ufeffPath;Label\r\n" + "\r\n".join(lines) + "\r\n").encode())
    apply_overrides(project.folder / "params.yaml", ["data.source=../listed", "data.max_broken=0.9"])
    assert "packed 32 images, set 1 aside" in project.run("tasks", "ingest")
    found = cells(project.folder / "artifacts/ingest/images.csv")
    assert dict(zip(found["path"], found["label"], strict=True)) == dict(rows) | {"broken": "007"}
    project.run("tasks", "explore")
    reader = check((project.folder / "artifacts/explore/report.html").read_text(encoding="utf-8"))
    assert all(label in reader.text for label in labels) and "broken007not an image" in reader.text


@pytest.mark.timeout(200)
def test_a_disk_that_fills_up(project: Project, tmp_path: Path, mounted: Callable[..., None]) -> None:
    """The source is read-only. Finished results are kept, and the run continues after space is freed."""
    for number in range(20):  # long images, which take more space than estimated
        file = tmp_path / "long" / ("007", "08")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (32, 600, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    (tmp_path / "long/007/broken.png").write_bytes(b"<html>")
    mounted(tmp_path / "long", "--bind", "-o", "ro", str(tmp_path / "long"))
    apply_overrides(project.folder / "params.yaml", [f"data.source={tmp_path}/long"])
    artifacts = project.folder / "artifacts"
    mounted(artifacts, "-t", "tmpfs", "-o", "size=4m", "none")
    project.run("tasks", "ingest")
    before = fingerprints(artifacts / "ingest")

    (artifacts / "filler").write_bytes(b"x" * (shutil.disk_usage(artifacts).free - 600_000))
    apply_overrides(project.folder / "params.yaml", ["seed=1"])
    said = project.run("tasks", "ingest", code=USER_ERROR)
    assert "No space left on device. Make space" in said and str(artifacts / "ingest") in said
    assert fingerprints(artifacts / "ingest") == before

    subprocess.run(["mount", "-o", "remount,ro", str(artifacts)], check=True)
    said = project.run("tasks", "explore", code=USER_ERROR)
    assert f"{artifacts}/explore: Read-only file system. See who may" in said and "Traceback" not in said

    subprocess.run(["mount", "-o", "remount,rw", str(artifacts)], check=True)
    (artifacts / "filler").unlink()
    project.run("tasks", "ingest")
    after = fingerprints(artifacts / "ingest")
    assert after.keys() == before.keys() and after["images.csv"] != before["images.csv"]
    project.run("tasks", "explore")
    reader = check((artifacts / "explore/report.html").read_text(encoding="utf-8"))
    assert "007/broken.png007not an image" in reader.text
