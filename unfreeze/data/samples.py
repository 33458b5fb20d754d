"""The built-in sample: `sample:elpv`, photographs of solar cells from a Python package."""

import importlib.util
from contextlib import suppress
from pathlib import Path

from unfreeze.errors import UserError

SAMPLES = {"sample:elpv": Path("samples/elpv.yaml")}
"""Name of each built-in sample in `data.source`, and the file that pins the version of its package."""


def link_sample(source: str, folder: Path = Path()) -> None:
    """Create a link in ``folder`` to a built-in sample's file, named as in `data.source`, as a dependency for DVC.

    `dvc.yaml` lists `data.source` as a dependency of `ingest`. A file named ``sample:elpv`` could not be checked out on
    Windows, so the link is not under version control.
    """
    if source in SAMPLES and not (folder / source).exists():
        with suppress(FileExistsError):  # another process was quicker
            (folder / source).symlink_to(SAMPLES[source])


def elpv() -> list[tuple[Path, str, str]]:
    """Files of the elpv dataset (Buerhop-Lutz et al., 2018), each with the path to show to users, and the label.

    A cell is ``defective`` if the experts' defect probability is above 0.5, else ``functional``.

    Raises:
        UserError: the package is not installed.
    """
    found = importlib.util.find_spec("elpv_dataset")  # without importing it
    if found is None or found.origin is None:
        raise UserError("data.source: sample:elpv needs the package elpv-dataset: pip install elpv-dataset")
    folder = Path(found.origin).parent / "data"
    rows = []
    for line in (folder / "labels.csv").read_text(encoding="utf-8").splitlines():
        path, probability, _ = line.split()
        rows.append((folder / path, path, "defective" if float(probability) > 0.5 else "functional"))
    return rows
