"""Find masks: pictures that label the pixels of an image, and that lie beside it under the same name."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

MASK_FOLDERS = frozenset((
    "mask", "masks", "seg", "segs", "segmentation", "segmentations", "gt", "gts", "groundtruth", "ground_truth",
    "annotation", "annotations",
))  # fmt: skip
"""Names of folders of masks, beside the folder or folders of a class's images."""
MARKED = re.compile(r"[ _.-]+(mask|seg|segmentation|gt|groundtruth|ground_truth)([ _.-]*\d+)?$", re.IGNORECASE)
"""Suffix of a mask's name after the name of its image: ``0001_mask.png``, ``0001_mask_1.png``."""
EXACT, LOSSY = frozenset((".png", ".bmp", ".gif", ".tif", ".tiff")), frozenset((".jpg", ".jpeg"))


def find_masks(files: Iterable[str], folder: str) -> set[str]:
    """Files of a class that are masks of its other files, judged by their names.

    That is: ``a_mask.png`` beside ``a.png``; ``masks/a.png`` if there is an ``a.png`` elsewhere in the class; and
    ``a.png`` beside ``a.jpg`` if every .png file of that folder has such a twin, and at least half of its JPEGs do.

    Args:
        files: paths of the files of the class, beginning with ``folder``.
        folder: the class's own folder, whose name is ignored.
    """
    folders: dict[str, list[str]] = defaultdict(list)
    for file in files:
        folders[os.path.dirname(file)].append(file)
    masked = {here for here in folders if MASK_FOLDERS & set(here[len(folder) :].lower().split(os.sep))}
    images = {_stem(file) for here, inside in folders.items() if here not in masked for file in inside}
    found: set[str] = set()
    for here, inside in folders.items():
        stems = images if here in masked else {_stem(file) for file in inside}
        for file in inside:
            stem = _stem(file)
            base = MARKED.sub("", stem)
            if base in stems and (here in masked or base != stem):
                found.add(file)
        if here not in masked:
            found.update(_twins(inside))
    return found


def _twins(files: list[str]) -> Iterator[str]:
    """Lossless files of a type, if each has the name of a JPEG, and there are at least half as many as JPEGs."""
    photos = {_stem(file) for file in files if _ending(file) in LOSSY}
    others: dict[str, list[str]] = defaultdict(list)
    for file in files:
        if _ending(file) in EXACT:
            others[_ending(file)].append(file)
    for same in others.values():
        if all(_stem(file) in photos for file in same) and len(same) >= len(photos) / 2:
            yield from same


def _stem(file: str) -> str:
    return os.path.splitext(os.path.basename(file))[0]


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()
