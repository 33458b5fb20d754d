"""Copies of a training's checkpoints in a shared location, from which another machine resumes if this one is lost.

    <checkpoint.share>/<stage>/<fingerprint>/training.safetensors   the newest checkpoint of each training of the step
                                             cycles/1.safetensors   other files that the step keeps

They are copied while the training runs. Files that a checkpoint refers to are copied before it, and each file is
renamed to its final name when it is complete. They are removed once DVC's remote has the step's output.
"""

import contextlib
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import STAGES, write_json
from pipeline.dvc_remote import default_remote, open_remote
from pipeline.process.secrets import mask
from pipeline.tracking.journal import read_json
from unfreeze.errors import UserError

if TYPE_CHECKING:
    from unfreeze.training.checkpoints import Checkpoint

logger = logging.getLogger("unfreeze")

NOWHERE = "none"
PATIENCE = 10.0
"""Seconds that a step waits at its end for unfinished copies."""
ANSWERS = 60.0
"""Timeout in seconds for looking for a checkpoint in the shared location."""
UNFIT = ("http", "https", "webdav", "webdavs", "gdrive", "file")
"""Kinds of DVC remotes beside which checkpoints are not shared."""
FORGET = 7 * 24 * 3600
"""Age in seconds at which the checkpoints of an abandoned step are removed."""
FINGERPRINT = re.compile("[0-9a-f]{16}")
NOTE = Path(".unfreeze/shared.json")
"""List of the folders in the shared location that this workspace has written to."""


def shared_place(share: str | None) -> str | None:
    """The shared location according to `checkpoint.share`; None if checkpoints are not shared.

    By default it is beside DVC's default remote. Only configuration files are read; the network is not used.
    """
    if share is not None:
        return None if share == NOWHERE else share
    url = (default_remote() or "").rstrip("/")
    kind, separator, rest = url.partition("://")
    if not separator:
        return f"{url}.checkpoints" if url and Path(url).parent.is_dir() else None
    if kind in UNFIT:
        return None
    return f"{url}.checkpoints" if "/" in rest else f"{url}/checkpoints"  # if the remote is a whole bucket: within it


def check_share(share: str | None) -> None:
    """Raises UserError if `checkpoint.share` is not a valid address or lacks its driver; does not check that it exists.

    The default, beside DVC's remote, is not checked here; DVC checks it.
    """
    if share is not None and (place := shared_place(share)):
        try:
            _open(place)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"checkpoint.share: {mask(place)} cannot be opened ({mask(str(error))}). Name a folder or an "
                "fsspec address, install its driver (s3fs for s3://, for example), or set it to none."
            ) from None
        except Exception as error:  # drivers such as FTP's connect here; without an answer, the training continues
            logger.debug("%s does not answer: %s", mask(place), mask(str(error)))


def _open(place: str) -> tuple[Any, str]:
    """File system and path of a location; beside DVC's remote, the remote's file system, with DVC's credentials."""
    beside, url = shared_place(None), (default_remote() or "").rstrip("/")
    if beside and "://" in beside and f"{place}/".startswith(f"{beside}/"):
        fs, path = open_remote(url)
        fs.invalidate_cache()  # cached listings may be out of date: other machines write there
        return fs, path + place.removeprefix(url)
    import fsspec  # here, as most steps share nothing

    fs, path = fsspec.core.url_to_fs(place)
    return fs, str(path)


class Mirror:
    """Copies a step's checkpoints to the shared location in the background, and fetches those of another machine."""

    def __init__(self, scratch: Path, place: str) -> None:
        """Set up copying.

        Args:
            scratch: the step's folder of checkpoints; the folder in the shared location has the same last two names.
            place: the shared location, as `shared_place` returns it.
        """
        self._scratch, self.address = scratch, f"{place.rstrip('/')}/{'/'.join(scratch.parts[-2:])}"
        self._copied: dict[Path, tuple[int, int]] = {}
        self._waiting, self._ended = threading.Event(), threading.Event()
        self._said = False
        self._thread: threading.Thread | None = None

    def fetch(self, checkpoint: "Checkpoint") -> bool:
        """Fetch a training's checkpoint from the shared location if it has more progress than the local one.

        Returns:
            Whether it was fetched.
        """
        with self._saying():
            fs, folder = self._found(checkpoint.path.name)
            if fs is None:
                return False
            new = self._get(fs, f"{folder}/{checkpoint.path.name}", checkpoint.path)
            if not checkpoint.is_behind(new):
                new.unlink()
                return False
            for file in fs.find(folder):  # before the checkpoint, which cannot be used without its cycles' weights
                inside = Path(os.path.relpath(file, folder))
                if len(inside.parts) > 1 and inside.suffix == ".safetensors":
                    self._get(fs, file, self._scratch / inside).replace(self._scratch / inside)
            checkpoint.take(new)
            return True
        return False

    def changed(self) -> None:
        """Request a copy of the checkpoints in the background."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()
        self._waiting.set()

    def close(self) -> None:
        """Wait until changed files are copied, at most `PATIENCE` seconds."""
        if self._thread:
            self._ended.set()
            self._waiting.set()
            self._thread.join(PATIENCE)

    def _found(self, name: str) -> tuple[Any, str]:
        """File system (None if the checkpoint is not shared) and folder of a checkpoint.

        Raises:
            TimeoutError: the shared location does not answer. Its other errors are raised as well.
        """
        answer: list[tuple[Any, str] | Exception] = []

        def ask() -> None:
            try:
                fs, folder = _open(self.address)
                answer.append((fs if fs.isfile(f"{folder}/{name}") else None, folder))
            except Exception as error:
                answer.append(error)

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(ANSWERS)
        if not answer:
            raise TimeoutError(f"no answer in {ANSWERS:.0f} seconds")
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _get(self, fs: Any, file: str, target: Path) -> Path:
        """Copy a shared file into a temporary file beside its target; returns the copy."""
        copy = target.with_name(f"{target.name}.partial-shared")
        copy.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(file, str(copy))
        return copy

    def _work(self) -> None:
        ended = False
        while not ended:
            self._waiting.wait()
            self._waiting.clear()
            ended = self._ended.is_set()
            with self._saying():
                self._copy()

    def _copy(self) -> None:
        fs, folder = _open(self.address)
        note = read_json(NOTE)
        if self.address not in note:
            write_json(NOTE, note | {self.address: self._scratch.parts[-2]})
        with self._as_they_are() as checkpoints:
            others = [file for file in self._scratch.glob("*/*.safetensors") if file not in checkpoints.values()]
            for file, content in [*zip(others, others, strict=True), *checkpoints.items()]:
                state = content.stat().st_mtime_ns, content.stat().st_size
                if self._copied.get(file) != state:
                    target = f"{folder}/{file.relative_to(self._scratch).as_posix()}"
                    fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                    partial = f"{target}.partial-{uuid.uuid4().hex}"
                    try:
                        fs.put_file(str(content), partial)
                        fs.mv(partial, target)
                    except Exception:
                        with contextlib.suppress(Exception):
                            fs.rm_file(partial)
                        raise
                    self._copied[file] = state

    @contextlib.contextmanager
    def _as_they_are(self) -> Iterator[dict[Path, Path]]:
        """Hard links to the current checkpoints. A checkpoint that is written meanwhile is sent the next time."""
        names: dict[Path, Path] = {}
        kept = self._scratch / ".sharing"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        try:
            for file in self._scratch.glob("*.safetensors"):
                names[file] = kept / file.name
                try:
                    os.link(file, names[file])
                except OSError:  # a file system without hard links
                    shutil.copy2(file, names[file])
            yield names
        finally:
            shutil.rmtree(kept, ignore_errors=True)

    @contextlib.contextmanager
    def _saying(self) -> Iterator[None]:
        """Suppress errors of the shared location in the block, and log the first one: the training continues."""
        try:
            yield
        except Exception as error:
            if not self._said:
                self._said = True
                logger.warning(
                    "Checkpoints are not shared at %s: %s", mask(self.address), mask(str(error) or repr(error))
                )


def forget(stages: set[str]) -> None:
    """Remove this workspace's shared checkpoints of these steps, and all checkpoints unchanged for a week.

    Nothing is removed from a location that does not answer.

    Args:
        stages: steps whose results are in DVC's remote.
    """
    noted = read_json(NOTE)
    places = {address.rsplit("/", 2)[0] for address in noted}
    for address in [address for address, stage in noted.items() if stage in stages]:
        with contextlib.suppress(Exception):
            fs, folder = _open(address)
            if fs.exists(folder):
                fs.rm(folder, recursive=True)
            del noted[address]
            write_json(NOTE, noted)
    for place in places:
        with contextlib.suppress(Exception):
            _forget_old(place)


def _forget_old(place: str) -> None:
    """Remove old checkpoints; only folders ``<step>/<fingerprint>`` are examined, as there may be other files."""
    fs, folder = _open(place)
    for step in STAGES:
        for run in fs.ls(f"{folder}/{step}", detail=False) if fs.isdir(f"{folder}/{step}") else ():
            if FINGERPRINT.fullmatch(run.rstrip("/").rpartition("/")[2]):
                touched = [_seconds(fs.modified(file)) for file in fs.find(run)]
                if touched and time.time() - max(touched) > FORGET:
                    fs.rm(run, recursive=True)


def _seconds(when: datetime) -> float:
    """Seconds since 1970; a time without a zone is UTC, as file systems return it."""
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
