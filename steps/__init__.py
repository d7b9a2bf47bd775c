"""ZenML steps: each turns configuration and artifacts into calls of `flowsentry`."""

from __future__ import annotations

import os
import sys
from types import TracebackType

from flowsentry.errors import FlowSentryError


def _end_for_good(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Tell a mistake, which stays one, from what another attempt may get over, such as a lost connection.

    A pod that ends with the status FLOWSENTRY_FINAL_EXIT is not started again.
    """
    sys.__excepthook__(kind, error, traceback)
    if isinstance(error, FlowSentryError):
        raise SystemExit(int(os.environ["FLOWSENTRY_FINAL_EXIT"]))


if "FLOWSENTRY_FINAL_EXIT" in os.environ:
    sys.excepthook = _end_for_good
