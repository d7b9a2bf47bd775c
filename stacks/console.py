"""What of ZenML's log people see: which step runs, what was taken from the cache, warnings and errors."""

from __future__ import annotations

import logging
import os
from typing import Final

from opentelemetry.instrumentation.logging.handler import LoggingHandler

from flowsentry.errors import FlowSentryError

_STEPS: Final = "zenml.orchestrators.step_launcher"
_FIRST_USE: Final = "zenml.zen_stores.base_zen_store"
_CACHE: Final = ("Using cached version", "All steps of the pipeline run were cached")


def _worth_reading(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], FlowSentryError):
        return False  # whoever started the run prints it, in one line and once
    if not record.name.startswith("zenml"):
        return record.levelno >= logging.WARNING or record.name.startswith("flowsentry")
    if record.levelno >= logging.ERROR:
        return record.name != _STEPS  # the same error comes again, with its traceback
    if record.levelno >= logging.WARNING:
        return record.name != _FIRST_USE  # which tells of a default stack that is not used here
    return record.name == _STEPS or record.getMessage().startswith(_CACHE)


def quiet() -> None:
    """Leave on the console what a user needs; the logs that ZenML stores with each step stay complete.

    Has to be called after the import of zenml, which sets logging up, and before anything is done with it.
    """
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(_worth_reading)
    # Its flush starts a thread, which Python 3.12 refuses while it ends; ZenML flushes at the end of each step itself.
    LoggingHandler.flushOnClose = False  # type: ignore[attr-defined]
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    # these two have handlers of their own
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
