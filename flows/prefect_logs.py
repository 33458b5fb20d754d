"""Log filter for Prefect: errors that are complete messages for users are logged without a traceback."""

import logging
import os

from flows.stage import StageFailed
from pipeline.process.secrets import mask
from unfreeze.errors import UserError, disk_trouble

FAILED = "Finished in state Failed"
DEPLOYED = "PREFECT__FLOW_RUN_ID"
"""Environment variable with the ID of the run that a worker starts."""


def shorten(record: logging.LogRecord) -> bool:
    """Remove the traceback of a user error from a record; returns whether to log the record.

    In a deployment's log the error's message replaces the traceback. On the command line the record is dropped, because
    the message is printed last. The record of the final state is shortened, as it would repeat the message.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, StageFailed | UserError) or (isinstance(error, OSError) and disk_trouble(error)):
        if not os.environ.get(DEPLOYED):
            return False
        record.msg, record.args, record.exc_info = mask(str(error)), (), None
    if str(record.msg).startswith(FAILED):
        record.msg = FAILED
    return True


def log_sentences() -> None:
    """Install the log filter `shorten` for flow and task runs."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(shorten)
