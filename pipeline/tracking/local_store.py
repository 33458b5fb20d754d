"""MLflow's address, and the paths of artifacts in its local database.

MLflow stores absolute paths. They are rewritten when the workspace has been moved or copied. Otherwise a copied
workspace would write its files into the original, and a moved workspace would not find its own.
"""

import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit
from urllib.request import url2pathname

from pipeline.process.environment import set_environment
from pipeline.process.secrets import mask
from pipeline.process.workspace import workspace
from unfreeze.errors import UserError

SQLITE = "sqlite:///"

DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""Schemes of the databases that MLflow supports."""

FILES = "mlruns"
"""MLflow's name for its folder of files."""

NOTED = (
    ("experiments", "experiment_id", "artifact_location"),
    ("runs", "run_uuid", "artifact_uri"),
    ("logged_models", "model_id", "artifact_location"),
    ("model_versions", "name || '/' || version", "storage_location"),
)
"""Columns of MLflow's database that contain folders: table, key, column."""

FOLDER = re.compile(rf"(?P<workspace>.*)/{FILES}/(?P<place>[^/]+(?P<of_run>/(?:models/)?[^/]+/artifacts)?)")


def tracking_uri() -> str:
    """MLflow's tracking URI, with an SQLite database's path resolved against the workspace."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    return f"{SQLITE}{workspace() / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


def check_tracking_uri() -> None:
    """Check the form of MLflow's address in the environment, without connecting to it.

    Raises:
        UserError: it is not a valid address of a server or a database, or the database's driver is missing.
    """
    uri = os.environ["MLFLOW_TRACKING_URI"]
    scheme, _, rest = uri.partition("://")
    if uri == "databricks" or (scheme.startswith("databricks") and rest):
        return
    try:
        if scheme in ("http", "https"):
            if not urlsplit(uri).hostname or urlsplit(uri).port == 0:
                raise ValueError("it has no host")
            return
        if scheme.partition("+")[0] in DATABASES and rest:
            from sqlalchemy.engine import make_url

            make_url(uri).get_dialect().import_dbapi()
            if uri.startswith("sqlite") and not uri.startswith(SQLITE):
                raise ValueError("the file must follow three slashes")
            return
    except Exception as error:
        why = f" ({error})"
    else:
        why = "; MLflow no longer stores runs in a folder" if _is_folder(uri) else ""
    near = f"http://{uri}" if re.fullmatch(r"[\w.-]+:\d+(/.*)?", uri) else "http://localhost:5000"
    raise UserError(
        f"MLFLOW_TRACKING_URI is {mask(uri)}, which is not a valid MLflow address{why}. Write {mask(near)} for a "
        f"server, sqlite:///mlflow.db for a file, or nothing for the latter."
    )


def _is_folder(uri: str) -> bool:
    return uri.startswith("file:") or "/" in uri.partition("://")[0] or os.path.isdir(uri)


def database() -> Path | None:
    """The file of MLflow's database, or None if it is on a server."""
    uri = tracking_uri()
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def files_of(experiment: str) -> str | None:
    """Artifact location of a new experiment; None if MLflow's server chooses it.

    It is a URI, because MLflow would decode a stored path: a folder named ``a%20b`` would become ``a b``.
    """
    if os.environ["MLFLOW_TRACKING_URI"].startswith(("http", "databricks")):
        return None
    file = database()
    inside = file is None or workspace().resolve() in file.resolve().parents
    # For a database outside of the workspace, beside the database: the workspace may be removed before it.
    root = _root() if inside or file is None else file.resolve().parent / FILES
    return (root / quote(experiment, safe="")).as_uri()


def adopt_files() -> None:
    """Rewrite the paths in the database of a moved or copied workspace to this workspace's folder of files.

    Paths of files that exist only in the original workspace are kept. A database outside of the workspace may be
    shared by several workspaces, and is not changed.
    """
    file = database()
    if file is None or not file.is_file() or workspace().resolve() not in file.resolve().parents:
        return
    with suppress(sqlite3.Error), closing(sqlite3.connect(file, timeout=30)) as connection:  # MLflow reports errors
        moved = [change for place in NOTED for change in _moved(connection, *place)]
        with connection:
            for statement, values in moved:
                connection.execute(statement, values)


def _moved(connection: sqlite3.Connection, table: str, key: str, column: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """The changes to a table, as SQL statements with their values."""
    for row, noted in connection.execute(f"SELECT {key}, {column} FROM {table}").fetchall():
        if noted and (here := _here(noted)) != noted:
            yield f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (here, row)


def _here(noted: str) -> str:
    """A folder that MLflow stores as a path or URI, rewritten as a URI in this workspace.

    It is returned unchanged if it is already there, is not in a folder of this kind, or belongs to a run or model whose
    files exist only at the stored place.
    """
    parts = urlsplit(noted)
    found = FOLDER.fullmatch(parts.path if parts.scheme else noted)
    if parts.scheme not in ("", "file") or not found:
        return noted
    before = Path(url2pathname(found[0]))  # MLflow decodes paths as well
    here = _root() / url2pathname(found["place"])
    if here == before or (found["of_run"] and before.exists() and not here.exists()):
        return noted
    return here.as_uri()


def _root() -> Path:
    return workspace().resolve() / FILES


if __name__ == "__main__":  # for `make ui`
    set_environment()
    adopt_files()
