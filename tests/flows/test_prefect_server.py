"""The check of PREFECT_API_URL before a run, and the database of the temporary Prefect server."""

import http.server
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import prefect
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows import prefect_server
from flows.cli import main
from tests.flows.test_checks import workspace  # noqa: F401
from unfreeze.errors import UserError

ROOT = Path(__file__).parent.parent.parent


class Pages(http.server.BaseHTTPRequestHandler):
    """Answers like Prefect's server: API below /api, pages everywhere else."""

    def do_GET(self) -> None:
        answers = {"/api/health": (200, b"true"), "/ill/health": (503, b""), "/closed/health": (401, b"")}
        code, content = answers.get(self.path, (200, b"<html>"))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.mark.parametrize("place", ["/api", "/api/", "/ill", "/closed"])
def test_an_api_is_fine_and_so_is_one_that_does_not_say(server: str, place: str) -> None:
    with temporary_settings({PREFECT_API_URL: server + place}):
        prefect_server.check_api()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("{server}", "where Prefect's pages are. Its API is at {server}/api"),
        ("{server}/other", "where something answers that is not Prefect's API"),
        ("127.0.0.1:4200/api", "must begin with http://"),
    ],
)
def test_what_is_no_api_is_refused_with_what_to_write(server: str, url: str, said: str) -> None:
    with temporary_settings({PREFECT_API_URL: url.format(server=server)}), pytest.raises(UserError) as caught:
        prefect_server.check_api()
    assert said.format(server=server) in str(caught.value)


def test_a_server_that_is_away_is_no_reason_to_refuse() -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        prefect_server.check_api()


@pytest.mark.parametrize("command", ["check", "run"])
def test_the_command_line_refuses_it_before_it_writes(
    workspace: Path,  # noqa: F811
    server: str,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = Path("params.yaml").read_bytes()
    with temporary_settings({PREFECT_API_URL: server}):
        assert main([command, "-S", "data.valid=0.3"]) == 2
    assert f"Its API is at {server}/api" in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before and not Path("artifacts").exists()


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of the temporary server's database."""
    monkeypatch.chdir(tmp_path)
    for name in prefect_server.DATABASES:
        monkeypatch.setenv(name, "")
    return Path(f".unfreeze/prefect-{prefect.__version__}.db")


def test_the_temporary_server_has_a_database_of_its_own(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefect_server.prepare_database()
    assert prefect_server.os.environ[prefect_server.DATABASES[0]] == f"sqlite+aiosqlite:///{database}"
    with sqlite3.connect(database) as connection:
        connection.execute("create table kept (x)")
    monkeypatch.setenv(prefect_server.DATABASES[0], "")
    prefect_server.prepare_database()
    assert sqlite3.connect(database).execute("select * from kept").fetchall() == []


def test_a_damaged_one_and_another_versions_make_room(database: Path) -> None:
    database.parent.mkdir()
    beside = [database.with_name(f"{database.name}-wal"), database.with_name("prefect-2.0.0.db")]
    for file in (database, *beside):
        file.write_bytes(b"this is no database\n" * 100)
    prefect_server.prepare_database()
    assert not database.exists() and not any(file.exists() for file in beside)


def test_a_database_that_is_named_stays(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(prefect_server.DATABASES[1], "sqlite+aiosqlite:///mine.db")
    prefect_server.prepare_database()
    assert not prefect_server.os.environ[prefect_server.DATABASES[0]] and not database.parent.exists()


@pytest.mark.long
def test_the_temporary_server_starts_for_any_home_and_ends_after_the_flow_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database in Prefect's own folder is damaged. SQLAlchemy used to print a traceback now and then."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/prefect.db").write_bytes(b"this is no database\n" * 100)
    code = (
        "import flows, prefect\n"
        "from flows.prefect_server import prefect_server\n"
        "@prefect.flow\n"
        "def one(): prefect.get_run_logger().info('at work')\n"
        "with prefect_server(): one()\n"
        "print('over')\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("over\n"), done.stderr
    said = done.stdout + done.stderr
    assert "Traceback" not in said and "WARNING" not in said and "ERROR" not in said
    assert "Stopping temporary server" in said.strip().splitlines()[-1]
