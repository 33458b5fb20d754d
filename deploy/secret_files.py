"""Files of environment variables that only their owner can read. Passwords are generated once and kept."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

NAMES = (
    "POSTGRES_PASSWORD",
    "PREFECT_PASSWORD",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
)
"""Names of the secrets."""


def passwords(file: Path) -> dict[str, str]:
    """Read the passwords and keys in a file. Missing passwords and keys are generated and added."""
    known = read(file) if file.exists() else {}
    found = known | {name: secrets.token_urlsafe(24).replace("-", "x") for name in NAMES if name not in known}
    if found != known:
        write(file, found)
    return found


def read(file: Path) -> dict[str, str]:
    """Read variables from a file with lines NAME=value."""
    lines = (line.partition("=") for line in file.read_text(encoding="utf-8").splitlines() if "=" in line)
    return {name: value for name, _, value in lines if not name.startswith("#")}


def write(file: Path, variables: Mapping[str, str]) -> None:
    """Write variables for `. file` in a shell and systemd's EnvironmentFile; values must not need shell quoting."""
    write_private(file, "".join(f"{name}={value}\n" for name, value in variables.items()))


def write_private(file: Path, text: str) -> None:
    """Write a file that only its owner can read from the moment it is created."""
    new = file.with_name(f".{file.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as opened:
        opened.write(text)
    new.replace(file)
