"""A separate disk for power-loss tests: a file system in an image file.

A copy of the image file has the data that was on the disk when it was copied.
"""

import filecmp
import shutil
import subprocess
from pathlib import Path


class Disk:
    """A mounted file system (ext4) in an image file.

    As with any disk, written data stays in memory for a while before it reaches the image file. Only data that a
    program flushes (fsync) is certain to be there.
    """

    def __init__(self, base: Path, megabytes: int, options: str = "") -> None:
        """Create and mount it in a folder. Raises OSError if that is not allowed or not possible."""
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
        """Cut the power and switch it on again: the disk keeps only the data that has reached it at this moment."""
        saved, again = self._file.with_suffix(".cut"), self._file.with_suffix(".again")
        _run("cp", "--sparse=always", str(self._file), str(saved))
        while _run("cp", "--sparse=always", str(self._file), str(again)) or not filecmp.cmp(
            saved, again, shallow=False
        ):
            again.replace(saved)  # the file changed during the copy: copy it again
        again.unlink()
        self.remove()
        saved.replace(self._file)
        self._mount()

    def remove(self) -> None:
        """Unmount the file system."""
        _run("umount", "-l", str(self.folder))

    def _mount(self) -> None:
        _run("mount", "-o", self._options, str(self._file), str(self.folder))


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
