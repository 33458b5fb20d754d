"""Files that an interrupted process leaves for the next one: valid up to some point, and identical when finished."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unfreeze.persistence import resumable
from unfreeze.persistence.resumable import ResumableFile

PIECES = [bytes([n]) * (n * 37 % 11) for n in range(12)]


def write(path: Path, count: int = len(PIECES), key: str = "a", seconds: float = 0.0) -> list[int]:
    """Continue a file up to a number of pieces; returns the notes that it already had."""
    with ResumableFile(path, key, seconds) as file:
        there = file.notes
        assert there == list(range(len(there)))
        assert file.size == sum(map(len, PIECES[: len(there)]))
        for n in range(len(there), count):
            file.append(PIECES[n], n)
        if count == len(PIECES):
            file.put(path.with_name("whole"))
    return there


def whole(path: Path) -> bool:
    there = path.read_bytes() == path.with_name("whole").read_bytes() == b"".join(PIECES)
    return there and set(os.listdir(path.parent)) == {"file", "file.notes", "whole"}


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_what_was_written_is_gone_on_with(tmp_path: Path, count: int, seconds: float) -> None:
    path = tmp_path / "more/file"
    write(path, count, seconds=seconds)
    assert write(path, seconds=seconds) == list(range(count))
    assert whole(path)


@pytest.mark.parametrize("what", ["file", "file.notes"])
def test_cut_off_anywhere_it_is_sound_up_to_there(tmp_path: Path, what: str) -> None:
    size = None
    for end in range(10_000):
        path = tmp_path / f"{end}/file"
        write(path, 8)
        damaged = path.with_name(what)
        size = damaged.stat().st_size
        if end >= size:
            break
        os.truncate(damaged, end)
        write(path, 9)
        write(path)
        assert whole(path)
    assert size and end == size


@pytest.mark.parametrize("what", ["file", "file.notes"])
def test_a_damaged_one_is_used_as_far_as_it_is_sound(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "file"
    write(path, 8)
    content = bytearray(path.with_name(what).read_bytes())
    content[len(content) // 2] ^= 1
    path.with_name(what).write_bytes(content)
    with caplog.at_level(logging.WARNING, "unfreeze"):
        assert 0 < len(write(path)) < 8
    assert whole(path) and "damaged" in caplog.text


def test_another_key_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, 8)
    assert write(path, key="b") == []
    assert whole(path)


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_going_back(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "file"
    write(path, 8)
    with ResumableFile(path, "a", seconds) as file:
        file.cut(3)
        assert file.notes == [0, 1, 2] and file.size == sum(map(len, PIECES[:3])) == path.stat().st_size
    assert write(path, 5, seconds=seconds) == [0, 1, 2]
    assert write(path) == [0, 1, 2, 3, 4]
    assert whole(path)


@pytest.mark.parametrize("space", [True, False])
def test_moved_to_another_disk_it_is_there_whole_or_what_was_before(
    tmp_path: Path, mounted: Callable[..., None], space: bool
) -> None:
    mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=256k", "none")
    target = tmp_path / "disk/whole"
    target.write_bytes(b"before")
    with ResumableFile(tmp_path / "file", "a", 0.0) as file:
        file.append(bytes(10_000 if space else 1_000_000), 0)
        if space:
            file.put(target)
            assert target.read_bytes() == bytes(10_000) and os.listdir(target.parent) == ["whole"]
        else:
            with pytest.raises(OSError) as caught:
                file.put(target)
            assert caught.value.errno == errno.ENOSPC
            assert os.listdir(target.parent) == ["whole"] and target.read_bytes() == b"before"
            with ResumableFile(tmp_path / "file", "a", 0.0) as again:
                assert again.notes == [0]


@pytest.mark.parametrize("key", ["a", "b"])
def test_whoever_begins_again_finds_it_whole_and_changes_no_output(tmp_path: Path, key: str) -> None:
    path, cached = tmp_path / "work/file", tmp_path / "cached"
    write(path)
    path.with_name("whole").replace(cached)  # as DVC may do: it removes outputs before it runs a step again
    cached.chmod(0o444)
    there = write(path, key=key)
    assert there == (list(range(len(PIECES))) if key == "a" else [])
    assert whole(path)
    with ResumableFile(path, "another", 0.0) as file:
        file.append(b"something else", 0)
    assert cached.read_bytes() == path.with_name("whole").read_bytes() == b"".join(PIECES)


@pytest.mark.parametrize("trouble", ["no second names", "no room"])
def test_where_it_cannot_have_two_names_it_has_the_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if trouble == "no room":
        monkeypatch.setattr(resumable, "COPIES", 1e30)
    else:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "file"
    write(path)
    assert os.listdir(tmp_path) == ["whole"] and (tmp_path / "whole").read_bytes() == b"".join(PIECES)


ENDLESS = """
import signal, sys, time
from pathlib import Path
from unfreeze.persistence.resumable import ResumableFile
signal.signal(signal.SIGINT, signal.default_int_handler)  # which what runs in the background of a shell has ignored
with ResumableFile(Path(sys.argv[1]), "a", 0.0) as file:
    n = len(file.notes)
    while True:
        file.append(n.to_bytes(4, "big") * 100, n)
        n += 1
        if n % 50 == 0:
            print(n, flush=True)
            time.sleep(0.001)  # or else what is read back is most of a gigabyte
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_it_is_sound(tmp_path: Path, number: int) -> None:
    path, least = tmp_path / "file", 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", ENDLESS, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(1)  # the interval between flushes is about fifty times as long as a flush
            process.send_signal(number)
            process.stdout.read()
        with ResumableFile(path, "a", 0.0) as file:
            assert file.notes == list(range(len(file.notes))) and len(file.notes) > least
            least = len(file.notes)
        assert path.read_bytes() == b"".join(n.to_bytes(4, "big") * 100 for n in range(least))
