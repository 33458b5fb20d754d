"""Where the images are: folders, CSV files and the built-in sample, all read into one table.

The table has a row per image: ``file`` (where it lies), ``path`` (how people are shown it), ``label``, ``split``
(``train``, ``valid``, ``test``, or empty where the source does not say) and ``group`` (images that belong together, or
empty).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from unfreeze.errors import UserError
from unfreeze.samples import SAMPLES, elpv

COLUMNS = ["file", "path", "label", "split", "group"]
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "validate", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""The usual spellings of the splits' names."""
NO_IMAGES = frozenset(
    [
        ".txt",
        ".csv",
        ".tsv",
        ".json",
        ".jsonl",
        ".md",
        ".xml",
        ".html",
        ".htm",
        ".py",
        ".ipynb",
        ".yaml",
        ".yml",
        ".pdf",
        ".doc",
        ".docx",
        ".zip",
        ".tar",
        ".gz",
        ".db",
        ".ini",
        ".log",
    ]
)
"""Files that lie beside images and are none."""


def read_source(source: str) -> pd.DataFrame:
    """List the images of a source, without opening them.

    Args:
        source: a folder with a subfolder per class; a folder with ``train/``, ``valid/`` and optionally ``test/``, each
            with a subfolder per class; a folder with a ``labels.csv``; a CSV file with columns ``path,label`` and
            optionally ``split`` and ``group``; or ``sample:elpv``.

    Returns:
        The table described above, sorted by path.

    Raises:
        UserError: the source is missing, empty, of no known kind, or has fewer than two classes.
    """
    if source.startswith("sample:"):
        if source not in SAMPLES:
            raise UserError(f"data.source: there is no {source}; there is {', '.join(SAMPLES)}.")
        table = pd.DataFrame([(str(file), path, label, "", "") for file, path, label in elpv()], columns=COLUMNS)
    else:
        where = Path(source).expanduser()
        if where.is_dir():
            table = _csv(where / "labels.csv") if (where / "labels.csv").is_file() else _folder(where)
        elif where.suffix.lower() in (".csv", ".tsv") and where.is_file():
            table = _csv(where)
        elif where.exists():
            raise UserError(f"data.source: {source} is neither a folder nor a CSV file.")
        else:
            raise UserError(f"data.source: {source} does not exist (looked for {where.absolute()}).")
    if table.empty:
        raise UserError(
            f"data.source: there are no images in {source}; it needs a subfolder with images for each class."
        )
    classes = sorted(table["label"].unique())
    if len(classes) < 2:
        raise UserError(
            f"data.source: all {len(table)} images of {source} are of the class {classes[0]!r}; it takes two classes or "
            "more, each in a subfolder of its own."
        )
    return table.sort_values("path", ignore_index=True)


def _folder(root: Path) -> pd.DataFrame:
    """A folder with a subfolder per class, or with such folders for each split."""
    folders = _subfolders(root)
    splits = {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
    rows: list[tuple[str, str, str, str, str]] = []
    if "train" in splits.values():
        for name, split in splits.items():
            for label in _subfolders(root / name):
                rows += _images(root, root / name / label, label, split)
    else:
        for label in folders:
            rows += _images(root, root / label, label, "")
    return pd.DataFrame(rows, columns=COLUMNS)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not _hidden(e.name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN")


def _images(root: Path, folder: Path, label: str, split: str) -> list[tuple[str, str, str, str, str]]:
    return [(file, os.path.relpath(file, root), label, split, "") for file in walk(str(folder))]


def walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Files below a folder that may be images; links are followed, but not in circles."""
    here = os.path.realpath(folder)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if _hidden(entry.name):
                continue
            if entry.is_dir():
                yield from walk(entry.path, above | {here})
            elif os.path.splitext(entry.name)[1].lower() not in NO_IMAGES:
                yield entry.path


def _csv(file: Path) -> pd.DataFrame:
    """A CSV file of images, whose paths start at its own folder."""
    try:
        table = pd.read_csv(file, sep=None, engine="python", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, OSError) as error:
        raise UserError(f"data.source: {file} cannot be read as CSV: {error}") from None
    table.columns = table.columns.str.strip().str.lower()
    missing = [name for name in ("path", "label") if name not in table]
    if missing:
        raise UserError(
            f"data.source: {file} has no column {' and no column '.join(missing)}; its columns are "
            f"{', '.join(table.columns)}. It needs path and label, and may have split and group."
        )
    for name in ("split", "group"):
        if name not in table:
            table[name] = ""
    table = table[["path", "label", "split", "group"]].apply(lambda column: column.str.strip()).drop_duplicates()
    _refuse(file, table["path"].eq("") | table["label"].eq(""), table, "have no path or no label")
    table["split"] = table["split"].str.lower().replace(SPLITS)
    _refuse(
        file, ~table["split"].isin(["", *set(SPLITS.values())]), table, "have a split that is not train, valid or test"
    )
    table["file"] = [str(file.parent / path) for path in table["path"]]
    root = os.path.realpath(file.parent)
    outside = [os.path.commonpath([root, os.path.realpath(path)]) != root for path in table["file"]]
    _refuse(file, pd.Series(outside, table.index), table, f"lead out of the folder {file.parent}")
    _refuse(file, ~table["file"].map(os.path.isfile), table, "name a file that does not exist")
    _refuse(
        file,
        table["path"].duplicated(keep=False),
        table,
        "list an image twice, with different labels, splits or groups",
    )
    return table[COLUMNS]


def _refuse(file: Path, wrong: pd.Series, table: pd.DataFrame, what: str) -> None:
    """Raise a UserError that names the first wrong rows, where there are any."""
    if wrong.any():
        named = ", ".join(repr(path) for path in table.loc[wrong, "path"].head(3))
        raise UserError(f"data.source: {int(wrong.sum())} rows of {file} {what}: {named}.")
