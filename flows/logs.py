"""Prefect's log of what went wrong: no traceback of Prefect's own inside around a sentence for the user."""

import logging

from flows.stage import StageFailed
from unfreeze.errors import UserError

FAILED = "Finished in state Failed"


def shorten(record: logging.LogRecord) -> bool:
    """Whether to keep a record: not Prefect's traceback of an error that is a sentence, which the state has, and the end of the run.

    The state's name stays, without the sentence in it.
    """
    if record.exc_info and isinstance(record.exc_info[1], StageFailed | UserError):
        return False
    if str(record.msg).startswith(FAILED):
        record.msg = FAILED
    return True


def log_sentences() -> None:
    """Have the logs of flow and task runs so."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(shorten)
