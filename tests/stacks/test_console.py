from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest
from opentelemetry.instrumentation.logging.handler import LoggingHandler

from flowsentry.errors import SourceError
from stacks.console import quiet

STEPS = "zenml.orchestrators.step_launcher"


@pytest.fixture
def console() -> Iterator[io.StringIO]:
    """What reaches a console whose log was made quiet."""
    written = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers = [logging.StreamHandler(written)]
    root.setLevel(logging.INFO)
    quiet()
    yield written
    root.handlers = before
    root.setLevel(level)


def fail(name: str, message: str, error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger(name).exception(message)


def test_steps_are_shown_and_the_rest_of_zenml_is_not(console: io.StringIO) -> None:
    logging.getLogger(STEPS).info("Step `load` has started.")
    logging.getLogger("zenml.orchestrators.step_run_utils").info("Using cached version of step `%s`.", "load")
    logging.getLogger("zenml.pipelines.pipeline_definition").info("Using user: `default`")
    logging.getLogger("zenml.zen_stores.base_zen_store").warning("Setting the global active stack to default.")
    assert console.getvalue().splitlines() == ["Step `load` has started.", "Using cached version of step `load`."]


def test_warnings_and_our_own_words_are_shown(console: io.StringIO) -> None:
    logging.getLogger("zenml.orchestrators").warning("careful")
    logging.getLogger("flowsentry.flows").info("47,367 rows")
    logging.getLogger("matplotlib.font_manager").info("generated new fontManager")
    assert console.getvalue().splitlines() == ["careful", "47,367 rows"]


def test_an_error_for_the_user_is_left_to_whoever_started_the_run(console: io.StringIO) -> None:
    logging.getLogger(STEPS).error("Failed to run step `load`: flows.csv is empty")
    fail("zenml.orchestrators.local.local_orchestrator", "Step load failed.", SourceError("flows.csv is empty"))
    assert console.getvalue() == ""


def test_an_error_nobody_foresaw_keeps_its_traceback(console: io.StringIO) -> None:
    fail("zenml.orchestrators.local.local_orchestrator", "Step load failed.", ZeroDivisionError("by zero"))
    assert "Step load failed." in console.getvalue()
    assert "ZeroDivisionError: by zero" in console.getvalue()


def test_no_handler_starts_a_thread_while_the_interpreter_ends() -> None:
    quiet()
    assert not getattr(LoggingHandler(), "flushOnClose", True)
