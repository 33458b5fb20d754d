"""DVC's remote as a file system, with DVC's credentials. S3 with a real server: integration/test_team.py."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.dvc_remote import open_remote
from pipeline.mirror import Mirror, shared_place
from tests.pipeline.test_mirror import STEP, reached, saved
from unfreeze.training.checkpoints import Checkpoint


def dvc(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *words, "-q"], check=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a DVC project."""
    monkeypatch.chdir(tmp_path)
    dvc("init", "--no-scm")
    return tmp_path


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[int]:
    """Port of an SSH file server with the user `ann` and the password `swordfish`."""
    asyncssh = pytest.importorskip("asyncssh")
    port: list[int] = []

    class Accounts(asyncssh.SSHServer):  # type: ignore[misc, name-defined]
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("ann", "swordfish")

    async def serve() -> Any:
        key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.listen(
            "127.0.0.1", 0, server_factory=Accounts, server_host_keys=[key], sftp_factory=True
        )
        port.append(server.get_port())

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    yield port[0]
    loop.call_soon_threadsafe(loop.stop)


def test_checkpoints_are_shared_beside_a_remote_on_ssh(project: Path, ssh: int) -> None:
    pytest.importorskip("dvc_ssh")
    dvc("remote", "add", "--default", "team", f"ssh://ann@127.0.0.1:{ssh}{project}/srv/dvc")
    dvc("remote", "modify", "--local", "team", "password", "swordfish")
    (project / "srv").mkdir()
    place = shared_place(None)
    assert place == f"ssh://ann@127.0.0.1:{ssh}{project}/srv/dvc.checkpoints"
    saved(5, place)
    file = project / "srv/dvc.checkpoints/train_full/word/training.safetensors"
    until = time.monotonic() + 60
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.1)
    (STEP / "training.safetensors").unlink()
    assert Mirror(STEP, place).fetch(Checkpoint(STEP / "training.safetensors", "word", 60)) and reached() == 5
    assert [path.name for path in file.parent.iterdir() if path.is_file()] == ["training.safetensors"]


def test_a_remote_on_s3_has_dvcs_keys_and_is_not_asked(project: Path) -> None:
    pytest.importorskip("dvc_s3")
    dvc("remote", "add", "--default", "team", "s3://bucket/dvc")
    dvc("remote", "modify", "team", "endpointurl", "http://127.0.0.1:1")
    dvc("remote", "modify", "--local", "team", "access_key_id", "ann")
    dvc("remote", "modify", "--local", "team", "secret_access_key", "swordfish")
    fs, path = open_remote("s3://bucket/dvc")
    assert path == "bucket/dvc" and fs.secret == "swordfish"
    assert fs.client_kwargs["endpoint_url"] == "http://127.0.0.1:1"


def test_what_dvc_says_against_a_remote_is_told(project: Path) -> None:
    (project / ".dvc/config").write_text(
        "[core]\n    remote = team\n['remote \"team\"']\n    url = nothing://host/dvc\n"
    )
    with pytest.raises(OSError, match="nothing"):
        open_remote("nothing://host/dvc")
