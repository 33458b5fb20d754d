"""A disk of its own, whose power can be cut: a file system in a file, of which a copy is what the disk had at that moment."""

import filecmp
import shutil
import subprocess
from pathlib import Path


class Disk:
    """A file system (ext4) in a file, mounted.

    What programs write stays in memory for a while before it gets into the file, as with any disk; only what they wait for
    (fsync) is there for certain.
    """

    def __init__(self, base: Path, megabytes: int, options: str = "") -> None:
        """Make it in a folder. Raises OSError where that may not be done, or cannot."""
        self.folder, self._file, self._options = (
            base / "disk",
            base / "disk.img",
            ",".join(filter(None, ["loop", options])),
        )
        self.folder.mkdir(parents=True)
        with self._file.open("wb") as file:
            file.truncate(megabytes << 20)
        if shutil.which("mkfs.ext4") is None:
            raise FileNotFoundError("mkfs.ext4")
        _run("mkfs.ext4", "-q", "-F", str(self._file))
        self._mount()

    def cut(self) -> None:
        """Cut the power and switch it on again: of what was written, the disk has what it had at this moment."""
        saved, again = self._file.with_suffix(".cut"), self._file.with_suffix(".again")
        _run("cp", "--sparse=always", str(self._file), str(saved))
        while _run("cp", "--sparse=always", str(self._file), str(again)) or not filecmp.cmp(
            saved, again, shallow=False
        ):
            again.replace(saved)  # the system wrote while it was copied: of no moment at all
        again.unlink()
        self.remove()
        saved.replace(self._file)
        self._mount()

    def remove(self) -> None:
        """Unmount it."""
        _run("umount", "-l", str(self.folder))

    def _mount(self) -> None:
        _run("mount", "-o", self._options, str(self._file), str(self.folder))


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
