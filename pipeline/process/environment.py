"""Environment of every process of unfreeze: no telemetry, quiet libraries, one address for MLflow."""

import io
import os
import pwd
import sys
from pathlib import Path

from unfreeze.errors import UserError

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"

DEFAULTS = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The temporary server may take longer to start than Prefect waits by default: on a busy machine, and at its first
    # start in a workspace, when it creates its database.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300",
    # The temporary server may be stopped during background tasks, and would print tracebacks about it.
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "GIT_PYTHON_REFRESH": "quiet",
    # OpenMP threads spin while they wait for each other. With the default, which is ten times this count, two trainings
    # on one machine would mostly wait for threads that are not running (docs/performance.md). The variable is read
    # when torch is imported.
    "GOMP_SPINCOUNT": "30000",
    "MLFLOW_TRACKING_URI": DEFAULT_TRACKING_URI,
    "MLFLOW_EXPERIMENT_NAME": "unfreeze",
}


def start_in_utf8() -> None:
    """Restart this command in Python's UTF-8 mode if the locale has another encoding.

    Otherwise this process, DVC and the steps would decode file names, which are UTF-8, wrongly.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_environment() -> None:
    """Set the defaults of environment variables that are unset or empty, and turn off MLflow's own retries.

    Call before Prefect, DVC or MLflow are imported.
    """
    open_standard_streams()
    for name, value in DEFAULTS.items():
        os.environ[name] = os.environ.get(name) or value
    # MLflow's client would repeat a request whose answer was lost, for minutes, and so create duplicates. Our own retry
    # (pipeline/tracking/sender.py) first looks whether the object exists.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    # A notebook sets its own backend for every command that it starts, and matplotlib cannot be imported if that
    # backend is not installed. Plots are written to files.
    os.environ["MPLBACKEND"] = "agg"
    # Characters that the encoding of a terminal or log cannot represent, in class names for example, are escaped.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    name_user()


def open_standard_streams() -> None:
    """Redirect closed standard streams (`2>&-`) to /dev/null: the next opened file would get their descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def name_user() -> None:
    """Set a name and a home for a user ID without an account (`docker run --user 1234`): libraries need both."""
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        os.environ.setdefault("LOGNAME", str(os.getuid()))
        os.environ.setdefault("HOME", os.getcwd())


def set_prefect_home() -> None:
    """Let Prefect keep its files in the workspace if its folder is not writable; its profiles are still read."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    there = next(path for path in (home, *home.absolute().parents) if path.exists())
    if os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        return
    os.environ["PREFECT_HOME"] = str(Path(".unfreeze/prefect").absolute())
    os.environ.setdefault("PREFECT_PROFILES_PATH", str(home / "profiles.toml"))


def home() -> Path:
    """Folder of a worker's files that outlive its runs: `UNFREEZE_HOME`, or ``~/.unfreeze``.

    Raises:
        UserError: the path is relative, so that it would change with a run's working directory.
    """
    folder = Path(os.environ.get("UNFREEZE_HOME") or "~/.unfreeze").expanduser()
    if not folder.is_absolute():
        raise UserError(f"UNFREEZE_HOME is {folder}: it must be an absolute path.")
    return folder.resolve()
