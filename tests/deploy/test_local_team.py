"""Messages of `make team` when something is missing, and storage of its passwords.

Tests with real servers are in integration/test_team.py.
"""

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy import local_team, secret_files, servers
from deploy.processes import Part, is_free, running, wait_until
from deploy.servers import Ports, Servers
from unfreeze.errors import UserError


def test_passwords_are_made_once_and_only_their_owner_reads_them(tmp_path: Path) -> None:
    file = tmp_path / "secrets.env"
    made = secret_files.passwords(file)
    assert set(made) == set(secret_files.NAMES) and len(set(made.values())) == len(made)
    assert all(len(value) >= 12 and value.replace("_", "").isalnum() for value in made.values())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secret_files.passwords(file) == made
    file.write_text("# mine\nMLFLOW_PASSWORD=of-my-own\n")
    again = secret_files.passwords(file)
    assert again["MLFLOW_PASSWORD"] == "of-my-own" and again["PREFECT_PASSWORD"] != made["PREFECT_PASSWORD"]


def test_a_file_of_variables_is_read_by_a_shell(tmp_path: Path) -> None:
    written = Servers(tmp_path / "team", Ports()).client
    secret_files.write(tmp_path / "team.env", written)
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    command = f"set -a; . {tmp_path}/team.env; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, env={})
    assert written.items() <= json.loads(done.stdout).items()


def test_what_is_printed_has_no_password(tmp_path: Path) -> None:
    team = Servers(tmp_path / "team", Ports())
    assert not [value for value in team.passwords.values() if value in local_team.text(team)]


def test_a_missing_program_is_a_sentence_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_team, "NEEDED", ())
    monkeypatch.setattr(
        servers, "postgresql_programs", lambda: servers.program("no-such-program", "apt-get install it")
    )
    assert local_team.main(["--folder", str(tmp_path / "team")]) == 2
    assert "The program no-such-program is not installed: `apt-get install it` installs it." in capsys.readouterr().err
    monkeypatch.setattr(local_team, "NEEDED", ("no_such_module",))
    assert local_team.main(["--folder", str(tmp_path / "team")]) == 2
    assert "are not installed (no_such_module)" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(local_team, "NEEDED", ())
    for name in ("postgresql_programs", "program"):
        monkeypatch.setattr(servers, name, lambda *words: Path("/bin/true"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        assert local_team.main(["--folder", str(tmp_path / "team"), "--mlflow", str(port)]) == 2
    said = capsys.readouterr().err
    assert "already in use: choose another one with --" in said
    assert {file.name for file in (tmp_path / "team").iterdir()} == {"secrets.env", "lock"}


@pytest.mark.skipif(os.geteuid() != 0, reason="is about root")
def test_root_is_told_where_postgresql_cannot_be_reached(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(UserError, match="name another folder with --folder"):
        servers.account(closed)


def test_a_server_that_ends_is_told_with_its_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no room')"]
    with (
        running("A server", command, dict(os.environ), tmp_path) as part,
        pytest.raises(UserError, match="A server has ended .code 0.: see .*a-server.log"),
    ):
        wait_until(lambda: False, part)
    assert (tmp_path / "a-server.log").read_text() == "no room\n"


def test_a_process_that_does_not_end_is_killed_with_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.processes.GOODBYE", 0.3)
    command = ["sh", "-c", "trap '' TERM; sleep 100 & echo $! ; while :; do sleep 1; done"]
    with running("stubborn", command, dict(os.environ), tmp_path) as part:
        assert isinstance(part, Part)
        wait_until(lambda: part.log.read_text().endswith("\n"), part)
        child = psutil.Process(int(part.log.read_text()))
    _, left = psutil.wait_procs([child], timeout=10)
    assert not left
