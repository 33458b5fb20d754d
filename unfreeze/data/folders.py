"""Recognise the layout of image folders: classes, splits, masks, and what is not read.

Unambiguous layouts are recognised, with a note in the report; ambiguous ones raise a UserError.
"""

import fnmatch
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from unfreeze.data.masks import MASK_FOLDERS, find_masks
from unfreeze.errors import UserError

Row = tuple[str, str, str, str, str]
Excluded = Callable[[str], bool]
"""Whether a file or folder is left out, by its path relative to the source's folder."""

SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("valid", "validation", "val", "validate", "dev"), "valid"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
"""The usual spellings of the splits' names."""
FILLERS = frozenset((
    "set", "sets", "data", "dataset", "datasets", "image", "images", "img", "imgs", "photo", "photos", "picture",
    "pictures", "pic", "pics", "sample", "samples", "file", "files", "folder", "dir", "split", "seg",
))  # fmt: skip
"""Words that are ignored beside a split's name, as in ``seg_train``, ``test_set`` and ``train_images``."""
# fmt: off
NO_IMAGES = frozenset((
    ".txt", ".rst", ".md", ".csv", ".tsv", ".xls", ".xlsx", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".html",
    ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".log", ".pdf", ".doc", ".docx", ".zip", ".tar", ".gz", ".7z", ".rar",
    ".db", ".ini", ".dvc", ".npy", ".npz", ".h5", ".pt", ".pth", ".safetensors", ".mp4", ".mov", ".avi", ".mp3", ".wav",
))
# fmt: on
"""Extensions of files that are not images. Files with any other extension, or none, are tried as images."""
LITTER = frozenset(("__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "Icon\r"))
"""Names of files and folders that operating systems create; ignored, as hidden files are."""


def shown(name: str) -> str:
    """A file name as text that can be stored and printed.

    Bytes that are not UTF-8, and control characters except the line feed, are escaped.
    """
    if name.isprintable():
        return name
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ("Cc", "Cs") and c != "\n" else c
        for c in name
    )


def named(names: Iterable[str], most: int = 20) -> str:
    """Names for a message, in quotes and with unprintable characters escaped."""
    all_ = [repr(name) for name in names]
    return ", ".join(all_[:most]) + (f" and {len(all_) - most} more" if len(all_) > most else "")


def split_of(name: str) -> str:
    """The split that a name stands for: train, valid or test; empty if it names none or several, or has other words.

    Case, digits, punctuation and the words in `FILLERS` are ignored: ``Train``, ``train2017``, ``seg_train``,
    ``TrainSet``.
    """
    words = [_word(word) for word in re.findall("[a-z]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower())]
    found = {SPLITS[word] for word in words if word in SPLITS}
    return found.pop() if len(found) == 1 and all(word in SPLITS or word in FILLERS for word in words) else ""


def _word(word: str) -> str:
    """``trainset`` as ``train``; other words as they are."""
    ends = (end for end in range(len(word) - 1, 2, -1) if word[:end] in SPLITS and word[end:] in FILLERS)
    return word[: next(ends, len(word))]


def exclusion(patterns: str | None) -> tuple[Excluded, Callable[[], list[str]]]:
    """Return a predicate for the paths that ``data.exclude`` leaves out, and a function that lists unused patterns.

    Args:
        patterns: comma-separated shell patterns (``*``, ``?``, ``[...]``), matched against paths and against names of
            files and folders.
    """
    waiting = {p: re.compile(fnmatch.translate(p)) for p in map(str.strip, (patterns or "").split(",")) if p}
    globs = tuple(waiting.items())

    def excluded(path: str) -> bool:
        hits = [p for p, glob in globs if glob.match(path) or glob.match(os.path.basename(path))]
        for hit in hits:
            waiting.pop(hit, None)
        return bool(hits)

    return excluded, lambda: list(waiting)


def is_path_excluded(path: str, excluded: Excluded) -> bool:
    """Whether a file or one of its parent folders is left out."""
    parts = path.split(os.sep)
    return any(excluded(os.sep.join(parts[: i + 1])) for i in range(len(parts)))


def list_folder(root: str, excluded: Excluded) -> tuple[list[Row], list[str]]:
    """List the images of a folder whose subfolders are ``<class>``, ``<split>/<class>`` or ``<class>/<split>``.

    Returns:
        Rows as in `unfreeze.data.sources`, and notes on what was understood and what was not read.

    Raises:
        UserError: the folder has none of these layouts, or fits more than one.
    """
    tree = Tree(root, excluded)
    folders = tree.subfolders("")
    splits = {name: split for name in folders if (split := split_of(name))}
    notes: list[str] = []
    # "train" may be a class, like "bus" and "car"; then it has no class folders in it.
    if any(split == "train" and tree.subfolders(name) for name, split in splits.items()):
        places = _splits_then_classes(tree, splits, notes)
    elif splits and len(splits) == len(folders):
        raise UserError(_no_classes(root, next((name for name in splits if splits[name] == "train"), None)))
    else:
        inner = {label: tree.subfolders(label) for label in folders}
        below = _splits_below(tree, inner)
        places = _classes_then_splits(below, inner, notes) if below else _classes(tree, inner, notes)
    rows: list[Row] = []
    masks: list[str] = []
    for folder, label, split in places:
        files = tree.files(folder)
        beside = find_masks(files, os.path.join(root, folder))
        masks += sorted(beside)
        label = unicodedata.normalize("NFC", shown(label))
        rows += [(file, shown(os.path.relpath(file, root)), label, split, "") for file in files if file not in beside]
    if masks:
        notes.append(
            f"{len(masks):,} files are named as masks of other images, such as {shown(os.path.relpath(masks[0], root))}, and "
            "are left out. To use them, list the images in a CSV file."
        )
    return rows, notes + _two_forms(label for _, label, _ in places)


@dataclass(frozen=True)
class Tree:
    """A folder without its excluded files and folders; folders in it are given by their relative paths."""

    root: str
    excluded: Excluded

    def subfolders(self, folder: str) -> list[str]:
        """Names of the folders in a folder."""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            names = sorted(entry.name for entry in entries if _is_folder(entry) and not _ignored(entry.name))
        return [name for name in names if not self.excluded(os.path.join(folder, name))]

    def files(self, folder: str) -> list[str]:
        """Paths, beginning with `root`, of the files below a folder that may be images."""
        return list(self._walk(folder))

    def has_files(self, folder: str) -> bool:
        """Whether files that may be images lie in a folder itself."""
        return os.path.dirname(next(self._walk(folder), "")) == os.path.join(self.root, folder)

    def _walk(self, folder: str) -> Iterator[str]:
        start = len(os.path.join(self.root, ""))
        return walk(os.path.join(self.root, folder), lambda path: self.excluded(path[start:]))


Place = tuple[str, str, str]
"""A folder, and label and split of the images in it."""


def _splits_then_classes(tree: Tree, splits: dict[str, str], notes: list[str]) -> list[Place]:
    places: list[Place] = []
    read = {}
    for name, split in splits.items():
        folder = _unwrapped(tree, name, split)
        labels = tree.subfolders(folder)
        if not labels and tree.files(folder):
            raise UserError(_no_classes(tree.root, name))
        if len({split_of(label) for label in labels} - {""}) > 1:
            raise UserError(
                f"data.source: {shown(os.path.join(tree.root, folder))} has folders for splits in it ({named(labels)}): are "
                "these the splits? Then set data.source to it."
            )
        read[folder] = split
        places += [(os.path.join(folder, label), label, split) for label in labels]
    if any(folder.lower() != split for folder, split in read.items()):
        notes.append("Splits: " + ", ".join(f"{shown(folder)} is {split}" for folder, split in read.items()) + ".")
    _note_unread(sorted(set(tree.subfolders("")) - set(splits)), notes)
    return places


def _unwrapped(tree: Tree, folder: str, split: str) -> str:
    """The folder with a split's classes, without wrapper folders: ``train/train/<class>``, ``train/images/<class>``."""
    while (
        len(inner := tree.subfolders(folder)) == 1
        and (split_of(inner[0]) == split or inner[0].lower() in FILLERS)
        and tree.subfolders(os.path.join(folder, inner[0]))
    ):
        folder = os.path.join(folder, inner[0])
    return folder


def _splits_below(tree: Tree, inner: dict[str, list[str]]) -> dict[str, dict[str, str]]:
    """The split folders in each class folder, with their splits; empty if no class has any.

    ``inner``: all folders in each class folder.
    """
    below = {label: {name: split for name in names if (split := split_of(name))} for label, names in inner.items()}
    divided = [label for label, splits in below.items() if "train" in splits.values() and len(set(splits.values())) > 1]
    if not divided:
        return {}
    whole = [label for label, splits in below.items() if "train" not in splits.values() or tree.has_files(label)]
    if whole:
        raise UserError(
            f"data.source: the class {divided[0]!r} has folders for splits in it, but in {named(whole, 5)} there are images "
            "without a split, or none for training: give every class the same folders, or leave folders out with data.exclude."
        )
    return below


def _classes_then_splits(
    below: dict[str, dict[str, str]], inner: dict[str, list[str]], notes: list[str]
) -> list[Place]:
    names = sorted({f"{name} is {split}" for splits in below.values() for name, split in splits.items()})
    notes.append(f"Splits, in the folder of each class: {shown(', '.join(names))}.")
    unread = [os.path.join(label, name) for label, names in inner.items() for name in names if name not in below[label]]
    _note_unread(unread, notes)
    return [
        (os.path.join(label, name), label, split) for label, splits in below.items() for name, split in splits.items()
    ]


def _classes(tree: Tree, inner: dict[str, list[str]], notes: list[str]) -> list[Place]:
    labels = list(inner)
    if len(labels) > 1 and all(inner.values()) and not any(map(tree.has_files, labels)):
        shared = sorted(set.intersection(*map(set, inner.values())))
        like_splits = [label for label in labels if any(word in label.lower() for word in ("train", "test", "valid"))]
        if shared and like_splits:
            raise UserError(
                f"data.source: are the folders {named(labels)} splits? Each has {named(shared)} in it. Name them train, valid and "
                "test, or leave some out with data.exclude."
            )
        if len(shared) > 1:
            notes.append(
                f"Each of the classes {named(labels, 5)} has the folders {named(shared, 5)} in it: check that the "
                "outer folders are the classes, not the inner ones."
            )
    masks = [label for label in labels if label.lower() in MASK_FOLDERS]
    images = [label for label in labels if label.lower() in FILLERS]
    if masks and images and len(masks) + len(images) == len(labels):
        raise UserError(
            f"data.source: the folders {named(labels)} look like images and their masks, not like classes. Set data.source to the "
            "folder with a subfolder for each class, or list the images in a CSV file."
        )
    return [(label, label, "") for label in labels]


def _no_classes(root: str, name: str | None) -> str:
    if name is None:
        return f"data.source: {shown(root)} has folders for validation or testing, but none for training (train)."
    return (
        f"data.source: the images in {shown(os.path.join(root, name))} need a subfolder for each class; or leave that folder out "
        f"(data.exclude: {shown(name)})."
    )


def _note_unread(folders: list[str], notes: list[str]) -> None:
    if folders:
        notes.append(f"Not read, as they lie beside the folders of splits: {named(folders)}.")


def _two_forms(labels: Iterable[str]) -> list[str]:
    """A note on labels that differ only in their Unicode normalization, and are therefore one class."""
    forms: dict[str, set[str]] = defaultdict(set)
    for label in labels:
        forms[unicodedata.normalize("NFC", shown(label))].add(label)
    double = [label for label, spelled in forms.items() if len(spelled) > 1]
    return [f"Written in two Unicode normalizations, taken as one class: {named(double)}."] if double else []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _ignored(name: str) -> bool:
    return name.startswith(".") or name in LITTER


def walk(folder: str, excluded: Excluded = lambda path: False) -> Iterator[str]:
    """Files below a folder that may be images, in a fixed order; links are followed, but no folder is entered twice.

    Args:
        folder: where to begin.
        excluded: whether a file or folder, by its whole path, is left out.
    """
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
                if _ignored(entry.name) or excluded(entry.path):
                    continue
                if _is_folder(entry):
                    below.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() not in NO_IMAGES:
                    yield entry.path
        waiting += reversed(below)
