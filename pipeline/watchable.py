"""Check whether DVC can watch the images of a source: which files it cannot read, and which folders it skips.

DVC reads every file of the folder that `data.source` names, before `ingest` runs. It hangs at some files, and fails at
others with a traceback, though `ingest` could handle these. Changes in folders that DVC skips would go unnoticed.
"""

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipeline.artifacts import artifact
from unfreeze.data.folders import shown
from unfreeze.errors import UserError

FIND = """
import os, sys
from pathlib import Path
from dvc.repo import Repo
repo, folder = Repo(), Path(os.path.abspath(sys.argv[1]))
for above in reversed(folder.parents):
    if above.is_relative_to(repo.root_dir):
        next(repo.dvcignore.walk(repo.fs, str(above)))
for path in repo.dvcignore.find(repo.fs, str(folder)):
    sys.stdout.buffer.write(os.fsencode(path) + b"\\0")
"""
"""Lists the files that DVC sees in a folder: those that no `.dvcignore` excludes, outside of nested DVC projects.

DVC finds a nested project only while it walks down from its own root. `dvc status` does this walk and `dvc repro` does
not. Therefore a folder with a nested project is always stale."""


def check_readable(source: str) -> None:
    """Check that DVC can read every file in a folder of images, without opening any.

    Args:
        source: value of `data.source`; ignored if it is not a folder.

    Raises:
        UserError: names the first files that it cannot read, and what to do.
    """
    if not _is_watched_folder(source):
        return
    for own in (".", artifact("", "")):
        if _is_within(os.path.realpath(own), os.path.realpath(source)):
            raise UserError(
                f"data.source: {source} contains {os.path.realpath(own)}, where a run writes, and DVC refuses "
                "such a folder. Put the images into a separate folder, or list them in a CSV file and name that."
            )
    if os.path.basename(os.path.abspath(source)).endswith(".dvc"):
        raise UserError(
            f"data.source: DVC mistakes {source} for one of its own files, as its name ends in .dvc: rename the folder."
        )
    found = [f"{shown(path)}: {why}" for path, why in _unreadable(source)]
    if found:
        raise UserError(
            f"data.source: DVC, which watches {source}, cannot read {len(found)} of its entries; remove them, or list "
            "the images in a CSV file and set data.source to that. Among them:\n  " + "\n  ".join(found[:5])
        )


def check_watched(source: str, files: Iterable[str]) -> None:
    """Check that DVC notices when one of the images in a folder changes.

    DVC does not follow links to folders. Within its own project it also skips what `.dvcignore` lists, and nested DVC
    projects.

    Args:
        source: value of `data.source`; ignored if it is not a folder.
        files: paths of the images, as `unfreeze.data.sources.read_source` returns them.

    Raises:
        UserError: names the first folders that DVC skips, and what to do.
    """
    if not _is_watched_folder(source):
        return
    links = sorted(_links(str(Path(source).absolute()), {os.path.dirname(file) for file in files}))
    if links:
        raise UserError(
            f"data.source: DVC, which watches {source}, does not follow links to folders, and would not notice "
            f"changes there. Replace each link with a folder of links to files (cp -rs), or list the images in a CSV "
            f"file and name that. There {_are(len(links), 'link')} to folders:\n  " + "\n  ".join(map(shown, links[:5]))
        )
    seen = _seen(os.path.abspath(source))
    if seen is not None and (unseen := sorted({os.path.abspath(file) for file in files} - seen)):
        raise UserError(
            f"data.source: DVC, which watches {source}, does not see {len(unseen)} of the images in it, and would not notice "
            "when they change: .dvcignore names them, or their folder is a separate DVC project. Put them outside of "
            f"{Path.cwd()}, or list them in a CSV file and set data.source to that. Among them:\n  "
            + "\n  ".join(map(shown, unseen[:5]))
        )


def _is_watched_folder(source: str) -> bool:
    return not source.startswith("sample:") and os.path.isdir(source)


def _is_within(path: str, folder: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))


def _are(count: int, what: str) -> str:
    return f"is 1 {what}" if count == 1 else f"are {count} {what}s"


def _links(root: str, folders: Iterable[str]) -> set[str]:
    """Links on the paths from a folder to the given folders below it."""
    found: set[str] = set()
    seen = {root}
    for folder in folders:
        while folder not in seen:
            seen.add(folder)
            if os.path.islink(folder):
                found.add(folder)
            folder = os.path.dirname(folder)
    return found


def _seen(root: str) -> set[str] | None:
    """The files that DVC sees in a folder.

    None if the folder is outside of this project, the project has no `.dvc`, or DVC fails.
    """
    if not (_is_within(root, os.getcwd()) and os.path.isdir(".dvc")):
        return None
    done = subprocess.run([sys.executable, "-c", FIND, root], capture_output=True)
    return {os.fsdecode(path) for path in done.stdout.split(b"\0")} if done.returncode == 0 else None


def _unreadable(folder: str) -> Iterator[tuple[str, str]]:
    seen: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as opened:
                entries = sorted(opened, key=lambda entry: entry.name)
        except OSError as error:
            yield here, str(error.strerror)
            continue
        for entry in entries:
            if entry.name == ".dvcignore":
                yield entry.path, "DVC refuses a folder with this file in it"
            elif not _is_utf8(entry.name):
                yield entry.path, "its name is not UTF-8"
            elif entry.is_file(follow_symlinks=False):
                if not os.access(entry.path, os.R_OK):
                    yield entry.path, os.strerror(errno.EACCES)
            elif why := _trouble(entry.path):
                yield entry.path, why
            elif os.path.isdir(entry.path):
                waiting.append(entry.path)


def _trouble(path: str) -> str:
    """Why something other than a plain file cannot be read; empty for a folder, or a link to something readable."""
    try:
        mode = os.stat(path).st_mode
        if not os.access(path, os.R_OK):
            return os.strerror(errno.EACCES)
    except OSError as error:
        return str(error.strerror)
    return "" if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else "a pipe, socket or device"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
