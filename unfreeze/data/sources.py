"""Read the list of images from a folder, a CSV file or the built-in sample, as one table.

The table has a row per image: ``file`` (its path), ``path`` (as shown to users), ``label``, ``split`` (``train``,
``valid``, ``test``, or empty if the source gives none) and ``group`` (images that belong together, or empty).
"""

import csv
import io
import os
import re
import unicodedata
from pathlib import Path

import pandas as pd

from unfreeze.data.folders import Excluded, Row, Tree, exclusion, is_path_excluded, list_folder, named, shown, split_of
from unfreeze.data.labels import look_alikes, strange_labels
from unfreeze.data.samples import SAMPLES, elpv
from unfreeze.errors import UserError

COLUMNS = ["file", "path", "label", "split", "group"]
SHOWN_CLASSES = 200
"""Largest number of class names in a note."""
LEGEND = (
    "labels.csv is not read, as it lists no images (it has no columns path and label, and few rows): the folders are the "
    "classes."
)


class WrongColumns(UserError):
    """A CSV file lacks the column path or label; ``rows`` is its number of rows."""

    def __init__(self, sentence: str, rows: int) -> None:
        super().__init__(sentence)
        self.rows = rows


def read_source(source: str, exclude: str | None = None, min_images: int = 1) -> pd.DataFrame:
    """List the images of a source, without opening them.

    Args:
        source: a folder with a subfolder per class; a folder with ``train/``, ``valid/`` and optionally ``test/``, each
            with a subfolder per class, or the other way round; a folder with a ``labels.csv``; a CSV file with columns
            ``path,label`` and optionally ``split`` and ``group``; or ``sample:elpv``.
        exclude: comma-separated patterns of names or paths of files and folders to leave out.
        min_images: classes with fewer images are left out.

    Returns:
        The table described in the module's docstring, sorted by path. ``file`` is absolute. ``attrs["notes"]`` has
        sentences on how the source was understood, what was left out, and what looks wrong.

    Raises:
        UserError: the source is missing, cannot be read, is empty, of no known kind, or has fewer than two classes.
    """
    excluded, unused = exclusion(exclude)
    try:
        table, notes = _table(source, excluded)
    except OSError as error:
        raise UserError(f"data.source: {shown(str(error.filename))} cannot be read: {error.strerror}.") from None
    if idle := unused():
        notes.append(f"data.exclude: nothing matches {named(idle)}; patterns are names or paths of files and folders.")
    if table.empty:
        raise UserError(f"data.source: there are no images in {source}; see docs/data.md for what it can be.")
    notes += look_alikes(table["label"])
    counts = table["label"].value_counts()
    small = sorted(counts.index[counts < min_images])
    if small:
        notes.append(
            f"Classes with fewer than {min_images} images, left out as data.min_images says: {len(small)}, namely "
            f"{named(small, SHOWN_CLASSES)}."
        )
        table = table[~table["label"].isin(small)]
    classes = sorted(set(counts.index) - set(small))
    if not classes:
        raise UserError(
            f"data.min_images: no class of {source} has {min_images} images; the largest has {counts.max()}."
        )
    if len(classes) < 2:
        raise UserError(
            f"data.source: all {len(table)} images of {source} are of the class {classes[0]!r}; at least two classes "
            f"are needed.{_deeper(source, classes[0])}{' ' + notes[-1] if small else ''}"
        )
    table = table.sort_values("path", kind="stable", ignore_index=True)
    table.attrs["notes"] = notes
    return table


def _table(source: str, excluded: Excluded) -> tuple[pd.DataFrame, list[str]]:
    """The table, and notes on how the source was understood."""
    if source.startswith("sample:"):
        if source not in SAMPLES:
            raise UserError(f"data.source: there is no {source}; available: {', '.join(SAMPLES)}.")
        rows = [(str(file), path, label, "", "") for file, path, label in elpv()]
        return _frame([row for row in rows if not is_path_excluded(row[1], excluded)]), []
    if "://" in source:
        raise UserError(
            f"data.source: {source} is an address, and images are read from this machine's file system: mount or download "
            "them, and name the folder or CSV file."
        )
    where = Path(source).absolute()
    if os.path.isdir(where):
        return _labels_or_folders(where, excluded)
    if where.suffix.lower() in (".csv", ".tsv") and os.path.isfile(where):
        return _csv(where, excluded)
    if os.path.exists(where):
        raise UserError(f"data.source: {source} is neither a folder nor a CSV file.")
    raise UserError(f"data.source: {source} does not exist (looked for {where}).")


def _labels_or_folders(where: Path, excluded: Excluded) -> tuple[pd.DataFrame, list[str]]:
    """A folder with a ``labels.csv``, or with folders of images.

    A ``labels.csv`` beside folders of images may only explain the names of the classes; then it is not read.
    """
    labels = where / "labels.csv"
    if not labels.is_file():
        rows, notes = list_folder(str(where), excluded)
        return _frame(rows), notes
    try:
        return _csv(labels, excluded)
    except WrongColumns as error:
        try:
            rows, notes = list_folder(str(where), excluded)
        except UserError:
            rows = []
        # A legend has a row for each class, a list of images one for each image.
        if len({row[2] for row in rows}) < 2 or error.rows > len(rows) / 2:
            raise UserError(
                f"{error} Or remove it, or give it another name, if folders in {where} are the classes (docs/data.md)."
            ) from None
        return _frame(rows), [
            LEGEND,
            *notes,
        ]


def _frame(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS, dtype=object)  # pandas' string dtype holds only UTF-8


def _deeper(source: str, label: str) -> str:
    """A hint if the only class is a folder that contains the classes, as in many unpacked archives."""
    inner = Path(source).absolute() / label
    if os.path.isdir(inner) and len(Tree(str(inner), lambda path: False).subfolders("")) > 1:
        return f" Are its subfolders the classes, or the splits? Then set data.source to {os.path.join(source, label)}."
    return ""


def _csv(file: Path, excluded: Excluded) -> tuple[pd.DataFrame, list[str]]:
    """The table of a CSV file, whose paths are relative to its own folder; and notes on labels that look wrong."""
    table = _cells(file)
    columns = list(table.columns)
    lacking = [name for name in ("path", "label") if name not in columns]
    if lacking:
        raise WrongColumns(
            f"data.source: {file} has no column {' and no column '.join(lacking)}; it has "
            f"{', '.join(columns) or 'none at all'}. It needs path and label, and may have split and group.",
            len(table),
        )
    table = pd.DataFrame({name: table[name] if name in columns else "" for name in ("path", "label", "split", "group")})
    if table.empty:
        return _frame([]), []
    root = str(file.parent)
    table["path"] = [_with_slashes(root, path) for path in table["path"]]
    table["path"] = [
        os.path.relpath(path, root) if os.path.isabs(path) else os.path.normpath(path) if path else path
        for path in table["path"]
    ]
    table = table[[not is_path_excluded(path, excluded) for path in table["path"]]].copy()
    _refuse(file, table["path"].eq("") | table["label"].eq(""), table, "have no path or no label")
    table["split"] = [split_of(split) or split for split in table["split"]]
    strange = ~table["split"].isin(["", "train", "valid", "test"])
    _refuse(file, strange, table, "have a split that is not train, valid or test")

    outside = table["path"].eq("..") | table["path"].str.startswith("../")
    _refuse(file, outside, table, f"lead out of the folder {root}, where all images must be")
    table["path"] = [_as_on_disk(root, path) for path in table["path"]]
    files = [os.path.join(root, path) for path in table["path"]]
    missing = pd.Series([not os.path.isfile(path) for path in files], table.index)
    _refuse(file, missing, table, "name a file that does not exist")
    table.insert(0, "file", pd.Series(files, table.index, dtype=object))
    for name in ("label", "group"):
        table[name] = [unicodedata.normalize("NFC", shown(cell)) for cell in table[name]]
    table = table.drop_duplicates()
    twice = table["path"].duplicated(keep=False)
    _refuse(file, twice, table, "list an image twice, with different labels, splits or groups")
    table["path"] = table["path"].map(shown)
    return table[COLUMNS], strange_labels(table["label"])


def _as_on_disk(root: str, path: str) -> str:
    """A path in the Unicode normalization that it has on disk: CSV files and archives made on a Mac may use another."""
    forms = (path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))
    return next((form for form in forms if os.path.isfile(os.path.join(root, form))), path)


def _with_slashes(root: str, path: str) -> str:
    """A path with Windows' backslashes replaced by slashes, unless the path exists as it is written."""
    return path if os.path.exists(os.path.join(root, path)) else path.replace("\\", "/")


def _cells(file: Path) -> pd.DataFrame:
    """The cells of a CSV file as stripped text; column names in lower case."""
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"data.source: {file} is not UTF-8 text; save it as CSV in UTF-8.") from None
    if stated := re.match(r'\s*"?sep=([,;|\t])"?[^\S\r\n]*(?=[\r\n])', text, re.IGNORECASE):  # for Excel
        text = text[stated.end() :]
    header = re.split("[\r\n]", text.lstrip(), maxsplit=1)[0]
    separator = stated[1] if stated else max(",;\t", key=header.count)
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
    """Raise a UserError that names the first wrong rows, if there are any."""
    if wrong.any():
        named = ", ".join(repr(path) for path in table.loc[wrong, "path"].head(3))
        raise UserError(f"data.source: of {len(table)} rows of {file}, {int(wrong.sum())} {what}: {named}.")
