"""Where the images are: folders, CSV files and the built-in sample, all read into one table.

The table has a row per image: ``file`` (where it lies), ``path`` (how people are shown it), ``label``, ``split``
(``train``, ``valid``, ``test``, or empty where the source does not say) and ``group`` (images that belong together, or
empty).
"""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from unfreeze.data.samples import SAMPLES, elpv
from unfreeze.errors import UserError

Row = tuple[str, str, str, str, str]

COLUMNS = ["file", "path", "label", "split", "group"]
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "validate", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""The usual spellings of the splits' names."""
# fmt: off
NO_IMAGES = frozenset((
    ".txt", ".rst", ".md", ".csv", ".tsv", ".xls", ".xlsx", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".html",
    ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".log", ".pdf", ".doc", ".docx", ".zip", ".tar", ".gz", ".7z", ".rar",
    ".db", ".ini", ".dvc", ".npy", ".npz", ".h5", ".pt", ".pth", ".safetensors", ".mp4", ".mov", ".avi", ".mp3", ".wav",
))
# fmt: on
"""Files that lie beside images and are none. Any other ending is tried, an unknown one and none too."""
LITTER = frozenset(("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "Icon\r"))
"""What systems leave in folders, beside hidden files."""


def read_source(source: str) -> pd.DataFrame:
    """List the images of a source, without opening them.

    Args:
        source: a folder with a subfolder per class; a folder with ``train/``, ``valid/`` and optionally ``test/``, each
            with a subfolder per class; a folder with a ``labels.csv``; a CSV file with columns ``path,label`` and
            optionally ``split`` and ``group``; or ``sample:elpv``.

    Returns:
        The table described above, sorted by path. ``file`` is absolute.

    Raises:
        UserError: the source is missing, cannot be read, is empty, of no known kind, or has fewer than two classes.
    """
    try:
        table = _table(source)
    except OSError as error:
        raise UserError(f"data.source: {shown(str(error.filename))} cannot be read: {error.strerror}.") from None
    if table.empty:
        raise UserError(f"data.source: there are no images in {source}; see docs/data.md for what it can be.")
    classes = sorted(table["label"].unique())
    if len(classes) < 2:
        raise UserError(
            f"data.source: all {len(table)} images of {source} are of the class {classes[0]!r}; it takes two classes or "
            f"more.{_deeper(source, classes[0])}"
        )
    return table.sort_values("path", kind="stable", ignore_index=True)


def shown(name: str) -> str:
    """A name of a file as text that can be stored and printed: bytes that are not UTF-8, and control characters but for
    the line feed, are escaped."""
    if name.isprintable():
        return name
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") and c != "\n" else c
        for c in name
    )


def _table(source: str) -> pd.DataFrame:
    if source.startswith("sample:"):
        if source not in SAMPLES:
            raise UserError(f"data.source: there is no {source}; there is {', '.join(SAMPLES)}.")
        return _frame([(str(file), path, label, "", "") for file, path, label in elpv()])
    if "://" in source:
        raise UserError(
            f"data.source: {source} is an address, and images are read from this machine's file system: mount or download "
            "them, and name the folder or CSV file."
        )
    where = _where(source)
    if os.path.isdir(where):
        labels = where / "labels.csv"
        return _csv(labels) if labels.is_file() else _folder(str(where))
    if where.suffix.lower() in (".csv", ".tsv") and os.path.isfile(where):
        return _csv(where)
    if os.path.exists(where):
        raise UserError(f"data.source: {source} is neither a folder nor a CSV file.")
    raise UserError(f"data.source: {source} does not exist (looked for {where}).")


def _frame(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)  # pandas' own text cannot hold names that are not UTF-8


def _where(source: str) -> Path:
    return Path(source).absolute()


def _deeper(source: str, label: str) -> str:
    """A hint where the only class is a folder that holds the classes, as archives like to be unpacked."""
    inner = _where(source) / label
    if os.path.isdir(inner) and len(_subfolders(str(inner))) > 1:
        return f" Are its subfolders the classes? Then set data.source to {os.path.join(source, label)}."
    return ""


def _folder(root: str) -> pd.DataFrame:
    """A folder with a subfolder per class, or with such folders for each split."""
    folders = _subfolders(root)
    splits = {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
    # "train" may be a class, beside "bus" and "car"; then there are no classes in it.
    training = [name for name, split in splits.items() if split == "train" and _subfolders(os.path.join(root, name))]
    rows: list[Row] = []
    if training:
        for name, split in splits.items():
            labels = _subfolders(os.path.join(root, name))
            if not labels and any(walk(os.path.join(root, name))):
                raise UserError(_no_classes(root, name))
            for label in labels:
                rows += _images(root, os.path.join(root, name, label), label, split)
    elif splits and len(splits) == len(folders):
        raise UserError(_no_classes(root, next((name for name in splits if splits[name] == "train"), None)))
    else:
        for label in folders:
            rows += _images(root, os.path.join(root, label), label, "")
    return _frame(rows)


def _no_classes(root: str, name: str | None) -> str:
    if name is None:
        return f"data.source: {shown(root)} has folders for validation or testing, but none for training (train)."
    return f"data.source: the images in {shown(os.path.join(root, name))} need a subfolder for each class."


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_folder(entry) and not _ignored(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def _images(root: str, folder: str, label: str, split: str) -> list[Row]:
    return [(file, shown(os.path.relpath(file, root)), shown(label), split, "") for file in walk(folder)]


def walk(folder: str) -> Iterator[str]:
    """Files below a folder that may be images, in a fixed order; links are followed, but no folder is entered twice."""
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        below = []
        with os.scandir(here) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if _ignored(entry.name):
                    continue
                if _is_folder(entry):
                    below.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() not in NO_IMAGES:
                    yield entry.path
        waiting += reversed(below)


def _csv(file: Path) -> pd.DataFrame:
    """A CSV file of images, whose paths start at its own folder."""
    table = _cells(file)
    columns = list(table.columns)
    lacking = [name for name in ("path", "label") if name not in columns]
    if lacking:
        raise UserError(
            f"data.source: {file} has no column {' and no column '.join(lacking)}; it has "
            f"{', '.join(columns) or 'none at all'}. It needs path and label, and may have split and group."
        )
    table = pd.DataFrame({name: table[name] if name in columns else "" for name in ("path", "label", "split", "group")})
    if table.empty:
        return _frame([])
    _refuse(file, table["path"].eq("") | table["label"].eq(""), table, "have no path or no label")
    table["split"] = table["split"].str.lower().replace(SPLITS)
    strange = ~table["split"].isin(["", *set(SPLITS.values())])
    _refuse(file, strange, table, "have a split that is not train, valid or test")

    root = str(file.parent)
    table["path"] = [
        os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path) for path in table["path"]
    ]
    outside = table["path"].eq("..") | table["path"].str.startswith("../")
    _refuse(file, outside, table, f"lead out of the folder {root}, where all images must be")
    files = [os.path.join(root, path) for path in table["path"]]
    missing = pd.Series([not os.path.isfile(path) for path in files], table.index)
    _refuse(file, missing, table, "name a file that does not exist")
    table.insert(0, "file", pd.Series(files, table.index, dtype=object))
    table = table.drop_duplicates()
    twice = table["path"].duplicated(keep=False)
    _refuse(file, twice, table, "list an image twice, with different labels, splits or groups")
    for name in ("path", "label", "group"):
        table[name] = table[name].map(shown)
    return table[COLUMNS]


def _cells(file: Path) -> pd.DataFrame:
    """The cells of a CSV file as text without blanks around it; names of columns in lower case."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"data.source: {file} is not UTF-8 text; save it as CSV in UTF-8.") from None
    header = re.split("[\r\n]", text.lstrip(), maxsplit=1)[0]
    separator = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    rows: list[list[str]] = []
    try:
        for cells in reader:
            row = [cell.strip() for cell in cells]
            if not any(row):
                continue
            if rows and any(row[len(rows[0]) :]):
                raise UserError(
                    f"data.source: {file}, line {reader.line_num}, has {len(row)} cells instead of {len(rows[0])}; "
                    "put text that contains the separator in quotes."
                )
            rows.append(row if not rows else (row + [""] * len(rows[0]))[: len(rows[0])])
    except csv.Error as error:
        raise UserError(f"data.source: {file}, line {reader.line_num}, is not CSV: {error}.") from None
    names = [name.lower() for name in rows[0]] if rows else []
    double = [name for name in ("path", "label", "split", "group") if names.count(name) > 1]
    if double:
        raise UserError(f"data.source: {file} has more than one column {double[0]}.")
    return pd.DataFrame(rows[1:], columns=names, dtype=object)


def _refuse(file: Path, wrong: pd.Series, table: pd.DataFrame, what: str) -> None:
    """Raise a UserError that names the first wrong rows, where there are any."""
    if wrong.any():
        named = ", ".join(repr(path) for path in table.loc[wrong, "path"].head(3))
        raise UserError(f"data.source: of {len(table)} rows of {file}, {int(wrong.sum())} {what}: {named}.")
