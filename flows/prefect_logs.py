"""Prefect's log of what went wrong: none of its tracebacks around what is said in a sentence."""

import logging
import os

from flows.stage import StageFailed
from pipeline.process.secrets import mask
from unfreeze.errors import UserError, disk_trouble

FAILED = "Finished in state Failed"
DEPLOYED = "PREFECT__FLOW_RUN_ID"
"""Environment variable by which a worker says which run it starts."""


def shorten(record: logging.LogRecord) -> bool:
    """Whether to keep a record: not the traceback of an error that is a sentence, which a deployment's log gets in its
    place, and the command line says last.

    What says how a run ended loses that sentence, which it has on one long line.
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
    """Have the logs of flow and task runs so."""
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(shorten)
