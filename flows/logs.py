"""Prefect's log of what went wrong: none of its tracebacks around what is said in a sentence."""

import logging
from pathlib import Path

from flows.stage import StageFailed
from tasks.files import disk_trouble
from unfreeze.errors import UserError

FAILED = "Finished in state Failed"


def shorten(record: logging.LogRecord) -> bool:
    """Whether to keep a record: not the traceback of an error that a run's state and its last words tell in a sentence.

    What says how a run ended loses that sentence, which it has on one long line.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, StageFailed | UserError) or (isinstance(error, OSError) and disk_trouble(error, Path())):
        return False
    if str(record.msg).startswith(FAILED):
        record.msg = FAILED
    return True


def log_sentences() -> None:
    """Have the logs of flow and task runs so."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(shorten)
