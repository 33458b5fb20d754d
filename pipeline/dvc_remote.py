"""DVC's default remote: its address, and its file system with the credentials that DVC has for it.

The address is read from DVC's configuration files, which takes no time. DVC describes the fsspec file system
in a separate process, only when it is to be read or written.
"""

import configparser
import json
import os
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

PATIENCE = 60.0
"""Timeout in seconds for DVC to describe the file system, which needs no network."""
DESCRIBE = """
import json
from dvc.config import Config
from dvc.fs import get_cloud_fs
config = Config(".dvc")
kind, options, path = get_cloud_fs(config, name=config["core"]["remote"])
fs = kind(**options)
known = {"s3": "s3fs.core.S3FileSystem", "ssh": "sshfs.spec.SSHFileSystem"}.get(kind.protocol)
if known:
    described = {"cls": known, "protocol": kind.protocol, "args": [], **fs.fs_args}
    described.pop("client_factory", None)
else:
    described = json.loads(fs.fs.to_json(include_password=True))
print(json.dumps([described, path]))
"""
"""S3 and SSH file systems are only described: creating one takes seconds, connects (SSH), and prompts for passwords."""


def default_remote() -> str | None:
    """The address of DVC's default remote, or the absolute path of its folder; None if there is no remote."""
    name, found = "", {}
    for file in _files():
        config = configparser.ConfigParser(interpolation=None, strict=False)
        with suppress(configparser.Error, UnicodeError):
            config.read(file, encoding="utf-8")
        name = config.get("core", "remote", fallback=name)
        for section in config.sections():
            if url := config.get(section, "url", fallback=""):
                found[section.lower()] = url if "://" in url else str((file.parent / url).resolve())
    return found.get(f"'remote \"{name.lower()}\"'")


def _files() -> list[Path]:
    """DVC's configuration files, each of which overrules those before it."""
    folders = [
        os.environ.get("DVC_SYSTEM_CONFIG_DIR") or "/etc/xdg/dvc",
        os.environ.get("DVC_GLOBAL_CONFIG_DIR") or f"{os.environ.get('XDG_CONFIG_HOME') or '~/.config'}/dvc",
    ]
    return [
        *(Path(folder).expanduser() / "config" for folder in folders),
        Path(".dvc/config"),
        Path(".dvc/config.local"),
    ]


@cache
def open_remote(url: str) -> tuple[Any, str]:
    """The fsspec file system of the default remote, and the remote's path there.

    Args:
        url: address of the remote, as `default_remote` returns it. It is only the key of the cached result: DVC reads
            the remote from its own configuration.

    Raises:
        OSError: DVC cannot describe the file system; the message is DVC's.
        subprocess.TimeoutExpired: DVC takes longer than `PATIENCE`.
    """
    import fsspec  # here, as most steps need no remote

    done = subprocess.run([sys.executable, "-c", DESCRIBE], capture_output=True, text=True, timeout=PATIENCE)
    if done.returncode:
        raise OSError((done.stderr.strip().splitlines() or ["DVC does not say why"])[-1])
    described, path = json.loads(done.stdout)
    return fsspec.AbstractFileSystem.from_json(json.dumps(described)), str(path).rstrip("/")
