"""Send the journals to MLflow: every record exactly once, despite server outages.

A request whose answer was lost is repeated, so every request must be idempotent: before a run is created, an existing
one is searched for by its tag; points keep their original timestamps (MLflow drops duplicate points); files, tags and
states overwrite themselves.
"""

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.artifacts import write_json
from pipeline.process.secrets import mask
from pipeline.tracking.journal import (
    Journal,
    Record,
    forget_old_passes,
    is_being_written,
    pass_folder,
    read,
    read_json,
    remove,
    sending,
    waiting,
)
from pipeline.tracking.local_store import adopt_files, files_of, tracking_uri

logger = logging.getLogger("unfreeze")

PASS_TAG, EXECUTION_TAG, STAGE_TAG = "unfreeze.pass", "unfreeze.execution", "unfreeze.stage"
SWEEP_TAG, OWNER_TAG = "unfreeze.sweep", "unfreeze.owner"
PATIENCE = 5.0
"""Timeout of a request, in seconds."""
SPEED = 1e6
"""Expected upload speed in bytes per second, by which the timeout of a file is extended."""
REFUSALS = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"}
REFUSED_BY_DATABASE = "BAD_REQUEST"
"""MLflow's error code for a database error, such as a value that is too long for its column."""
REFUSING = {400, 413, 415, 422}
"""HTTP status codes of MLflow or a proxy for requests that will never succeed; `REFUSALS` has MLflow's error codes."""
DELETED = (
    "MLflow's experiment {} was deleted: its records stay queued until it is restored "
    "(`mlflow experiments restore --experiment-id {}`)."
)
OTHER_SCHEMA = "out-of-date database schema"
"""MLflow's message about a database of another MLflow version."""
BATCH = 1000
"""Largest number of metrics in a request to MLflow; for parameters it is a tenth of this."""


class Unreachable(Exception):
    """The tracking server does not answer; the message is complete for users."""


def address() -> str:
    """Address of the environment's tracking server, with secrets masked."""
    return mask(os.environ["MLFLOW_TRACKING_URI"])


def meant_for(folder: Path) -> str:
    """Address of the tracking server that a journal was written for, with secrets masked."""
    return str(read_json(folder / "head.json").get("address"))


def waiting_here() -> list[Path]:
    """The journals queued for the environment's tracking server, the oldest first."""
    return [folder for folder in waiting() if meant_for(folder) == address()]


def client() -> Any:
    """An MLflow client for the tracking server of the environment."""
    # MLflow's database migrations log each of their dozens of steps, and its HTTP client each attempt.
    for name, level in (("alembic", logging.WARNING), ("urllib3.connectionpool", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    # On import, urllib3 warns that SOCKS is not supported, which is not used here.
    warnings.filterwarnings("ignore", message="SOCKS support in urllib3")
    from mlflow import MlflowClient

    adopt_files()
    return MlflowClient(tracking_uri())


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Convert errors of an unreachable MLflow server in the block to `Unreachable`.

    Raises:
        Unreachable: the server does not answer, or has an internal error.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("mlflow", "requests", "urllib3", "sqlalchemy")) or _is_refusal(error):
            raise
        if OTHER_SCHEMA in str(error):
            raise Unreachable(f"MLflow at {address()}: {reason(error)}.") from None
        raise Unreachable(f"MLflow at {address()} does not answer ({reason(error)}).") from None


def reason(error: Exception) -> str:
    """Short text of an error, with secrets masked."""
    if isinstance(error, Unreachable):
        return str(error)
    text = (str(error).splitlines() or [""])[0]
    if OTHER_SCHEMA in text:
        return (
            "its database is of another MLflow version; make a copy of it, then run "
            f"`mlflow db upgrade {address()}` with the newer one of the two"
        )
    for known in ("Connection refused", "timed out", "Connection aborted", "Name or service not known"):
        if known in text:
            return known.lower()
    return mask(f"{type(error).__name__}: {text[:200]}")


def send(
    client: Any,
    own: Journal | None = None,
    anyway: bool = False,
) -> Iterator[float]:
    """Send the queued journals, the oldest first, and remove those that are completely sent.

    Args:
        client: an MLflow client.
        own: the journal that this process writes; those of other processes are sent when these have ended.
        anyway: send also journals for another server than that of the environment.

    Yields:
        before each request, its timeout in seconds.

    Raises:
        Busy: another process is sending.
        Exception: an error of MLflow's client for a server that does not answer, or answers with an error; unsent
            records stay queued. With `own`, an error that affects only another journal is not raised.
    """
    yield PATIENCE
    trouble: Exception | None = None
    with sending(PATIENCE / 2):
        for folder in waiting():
            mine = own is not None and folder == own.folder
            elsewhere = meant_for(folder) != address()
            if not mine and ((elsewhere and not anyway) or is_being_written(folder)):
                continue
            try:
                yield from _send(client, folder, mine)
            except _OfOne as error:
                if mine or own is None:
                    trouble = trouble or error.trouble
        forget_old_passes()
    if trouble:
        raise trouble


class _OfOne(Exception):
    """An error that affects one journal only; the others can still be sent."""

    def __init__(self, trouble: Exception) -> None:
        super().__init__(str(trouble))
        self.trouble = trouble


def _send(client: Any, folder: Path, is_written: bool) -> Iterator[float]:
    """Send a journal's unsent records; `is_written` says whether it is this process's own journal."""
    head, sent = read_json(folder / "head.json"), read_json(folder / "sent.json")
    yield PATIENCE
    experiment = client.get_experiment_by_name(head["experiment"])
    if experiment and experiment.lifecycle_stage != "active":  # it refuses records until it is restored
        raise _OfOne(Unreachable(DELETED.format(mask(head["experiment"]), experiment.experiment_id)))
    if "runs" not in sent:
        try:
            sent = {"offset": 0, "runs": (yield from _open(client, head, experiment))}
        except Exception as error:
            if not _is_refusal(error) and getattr(error, "error_code", None) != REFUSED_BY_DATABASE:
                raise
            text = (
                f"MLflow at {address()} does not accept the run {head['name']!r} ({reason(error)}); "
                f"its records are kept in {folder}."
            )
            raise _OfOne(Unreachable(mask(text))) from error
        _note(folder, sent)
    ended = sent.get("ended", False)  # True if a power loss has undone the removal of a sent journal
    taken: bool | None = None
    for record, end in _batches(read(folder, sent["offset"])):
        run = sent["runs"].get(record.get("run"))
        if record.get("run") == "parent" and taken is None:
            yield PATIENCE
            taken = is_taken(client, head, run)
        if record.get("run") == "parent" and taken:
            pass  # only the new owner writes to the parent run
        elif "metrics" in record:
            yield PATIENCE
            _ask("metrics", client.log_batch, run, metrics=_metrics(record["metrics"]))
        elif "tag" in record:
            yield PATIENCE
            _ask("a tag", client.set_tag, run, *record["tag"])
        elif "file" in record and (copy := folder / record["file"]).exists():
            yield PATIENCE + copy.stat().st_size / SPEED
            try:
                _ask(copy.name, client.log_artifact, run, str(copy), record["to"])
            except Exception as error:  # the artifact store may be unavailable
                raise _OfOne(error) from error
        elif "status" in record:
            yield PATIENCE
            _ask("a state", client.set_terminated, run, record["status"], record["when"])
        ended = "closed" in record
        sent |= {"offset": end, "ended": ended}
        _note(folder, sent)
    if not ended and not is_written:
        yield from _kill(client, folder, head, sent["runs"])
        ended = True
    if ended:
        remove(folder)


def _note(folder: Path, sent: Mapping[str, Any]) -> None:
    """Record which part of a journal is sent. No flush to disk: requests are idempotent and can be repeated."""
    partial = folder / "sent.partial"
    partial.write_text(json.dumps(sent), encoding="utf-8")
    partial.replace(folder / "sent.json")


def _open(client: Any, head: Mapping[str, Any], experiment: Any) -> Generator[float, None, dict[str, str]]:
    """Find or create the runs of a journal, and its experiment if it does not exist; returns the run IDs."""
    yield PATIENCE
    name = head["experiment"]
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, files_of(name))
    source = head.get("source", {}) | ({OWNER_TAG: head["owner"]} if "owner" in head else {})
    tags = {PASS_TAG: head["pass"], "unfreeze.door": head["door"], **source}
    if sweep := head.get("sweep"):
        tags[SWEEP_TAG] = sweep
    if description := head.get("description"):
        tags["mlflow.note.content"] = description
    parent = yield from _run(client, experiment_id, (PASS_TAG, head["pass"]), head, "parent", tags)
    folder = pass_folder(head["pass"])
    write_json(folder / "parent.json", {"experiment": experiment_id, "run": parent})
    runs = {"parent": parent}
    if head["stage"]:
        tags = {
            "mlflow.parentRunId": parent,
            STAGE_TAG: head["stage"],
            EXECUTION_TAG: head["execution"],
            **source,
        }
        runs["child"] = yield from _run(client, experiment_id, (EXECUTION_TAG, head["execution"]), head, "child", tags)
    return runs


def _run(
    client: Any, experiment: str, tag: tuple[str, str], head: Mapping[str, Any], kind: str, tags: dict[str, str]
) -> Generator[float, None, str]:
    """Find a run by its tag, or create it, with its parameters; returns its id.

    The journal of a step sets an existing run to RUNNING. The closing journal of a pass does not: if the process were
    killed while sending the journal, a finished run would be left RUNNING.
    """
    from mlflow.entities import Param

    yield PATIENCE
    found = client.search_runs([experiment], f"tags.`{tag[0]}` = '{tag[1]}'", max_results=10)
    noted = read_json(pass_folder(head["pass"]) / "parent.json").get("run")
    found.sort(key=lambda run: (run.info.run_id != noted, not run.data.params, run.info.run_id))
    for extra in found[1:]:  # duplicates, from a request that a hanging server processed late
        if not extra.data.params and not extra.data.metrics:
            client.delete_run(extra.info.run_id)
    yield PATIENCE
    if found:
        run, known = found[0], found[0].data.params
        before, now = attempt(run.data.tags.get(OWNER_TAG)), attempt(head.get("owner"))
        if before < now:
            yield from _take(client, experiment, run.info.run_id, head["owner"])
        if head["stage"] and run.info.status != "RUNNING" and before <= now:
            client.update_run(run.info.run_id, status="RUNNING")
    else:
        name = head["name"] if kind == "parent" else head["stage"]
        run, known = client.create_run(experiment, start_time=head["when"], tags=tags, run_name=name), {}
    new = [Param(key, value) for key, value in head["params"][kind].items() if key not in known]
    for i in range(0, len(new), BATCH // 10):
        yield PATIENCE
        _ask("parameters", client.log_batch, run.info.run_id, params=new[i : i + BATCH // 10])
    return str(run.info.run_id)


def attempt(owner: str | None) -> int:
    """The attempt number of an owner, ``<attempt>@<host>``; it is higher for the worker that replaces a lost one."""
    return int((owner or "").partition("@")[0] or 0)


def is_taken(client: Any, head: Mapping[str, Any], run: str) -> bool:
    """Whether a pass's parent run belongs to a later attempt than the attempt that wrote a journal with this head."""
    return attempt(client.get_run(run).data.tags.get(OWNER_TAG)) > attempt(head.get("owner"))


def _take(client: Any, experiment: str, run: str, owner: str) -> Iterator[float]:
    """Set the owner of a pass's parent run, after ending the runs of steps that a lost worker has left RUNNING."""
    yield PATIENCE
    left = f"tags.`mlflow.parentRunId` = '{run}' and attributes.status = 'RUNNING'"
    for child in client.search_runs([experiment], left):
        if attempt(child.data.tags.get(OWNER_TAG)) < attempt(owner):
            yield PATIENCE
            client.set_terminated(child.info.run_id, "KILLED")
    yield PATIENCE
    client.set_tag(run, OWNER_TAG, owner)


def _kill(client: Any, folder: Path, head: Mapping[str, Any], runs: Mapping[str, str]) -> Iterator[float]:
    """End the run of a killed step, and the parent run unless a later journal or another worker continues the pass."""
    when = int((folder / "records.jsonl").stat().st_mtime * 1000)
    later = [other for other in waiting() if other.parent == folder.parent and other.name > folder.name]
    for kind, run in runs.items():
        yield 2 * PATIENCE
        if kind == "child" or not (later or is_taken(client, head, run)):
            _ask("a state", client.set_terminated, run, "KILLED", when)


def _batches(records: Iterator[tuple[Record, int]]) -> Iterator[tuple[Record, int]]:
    """The records, with consecutive metrics of a run joined up to the limit of a request."""
    batch: Record | None = None
    end = 0
    for record, after in records:
        points = [(k, v, record["when"], record["at"]) for k, v in record.get("metrics", {}).items()]
        if batch and (not points or batch["run"] != record["run"] or len(batch["metrics"]) + len(points) > BATCH):
            yield batch, end
            batch = None
        if not points:
            yield record, after
        elif batch:
            batch["metrics"] += points
        else:
            batch = {"run": record["run"], "metrics": points}
        end = after
    if batch:
        yield batch, end


def metrics(run: str, values: Mapping[str, float], at: int, when: float) -> Iterator[Record]:
    """Records of values that were measured at the same time.

    Args:
        run: ``child`` or ``parent``.
        values: name -> value; None is left out.
        at: iteration or epoch.
        when: seconds since 1970.
    """
    items = iter([(key, float(value)) for key, value in values.items() if value is not None])
    while some := dict(islice(items, BATCH)):
        yield {"run": run, "metrics": some, "at": at, "when": int(when * 1000)}


def _metrics(points: list[tuple[str, float, int, int]]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(*point) for point in points]


def _ask(what: str, request: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    """Make a request; if the server will never accept it, log this and skip it, so that it does not block the rest."""
    try:
        request(*arguments, **named)
    except Exception as error:
        if not _is_refusal(error):
            raise
        logger.warning("MLflow does not accept %s: %s", what, reason(error))


def _is_refusal(error: Exception) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return getattr(error, "error_code", None) in REFUSALS or status in REFUSING
