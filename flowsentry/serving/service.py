"""The service of a bundle: `bentoml serve` starts it, with the detector that lies beside this code.

BentoML's layers (tracing, metrics, timeouts, routing) cost more than the verdict of a flow, and its timeouts would
leave an entry in memory for a minute after every request. So our application stands in front of them and answers all
but the health checks itself. Importing this module loads nothing.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import orjson

from flowsentry import telemetry

telemetry.disable()

import bentoml  # noqa: E402

from flowsentry.errors import ConfigError, FlowSentryError  # noqa: E402
from flowsentry.serving.settings import Settings  # noqa: E402

if TYPE_CHECKING:
    from flowsentry.serving.app import App

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# `bentoml serve` has asked before it imported this, and remembers the answer
if usage_stats := sys.modules.get("bentoml._internal.utils.analytics.usage_stats"):
    usage_stats.do_not_track.cache_clear()

HEALTH: Final = frozenset({"/livez", "/readyz", "/healthz"})
_log: Final = logging.getLogger("flowsentry.service")


class JsonLines(logging.Formatter):
    """One JSON object a line; errors without their texts, except our own, which never hold input."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            line["error"] = str(error) if isinstance(error, FlowSentryError) else type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            line["traceback"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        return orjson.dumps(line, default=str).decode()


def log_as_json() -> None:
    """Write the logs of the service, BentoML and uvicorn as JSON lines to the standard output."""
    ours = logging.getLogger("flowsentry")
    ours.handlers = [logging.StreamHandler(sys.stdout)]
    ours.setLevel(logging.INFO)
    ours.propagate = False
    logging.getLogger("uvicorn.error").propagate = False  # it would write every line twice
    for name in ("", "bentoml", "uvicorn.error", "flowsentry"):
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(JsonLines())


class Front:
    """Middleware of the service that steps in front of all others when the service starts."""

    app: ClassVar[App | None] = None

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self._next = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._next(scope, receive, send)
            return
        whole = scope["app"]
        behind = whole.middleware_stack

        async def answer(scope: Message, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in HEALTH or Front.app is None:
                await behind(scope, receive, send)
            else:
                await Front.app(scope, receive, send)

        async def report(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                message = {**message, "message": "the service could not be started"}
            await send(message)

        whole.middleware_stack = answer
        await self._next(scope, receive, report)


@bentoml.service(workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class FlowSentry:
    """Flows in, verdicts out."""

    def __init__(self) -> None:
        log_as_json()
        # the command line of BentoML imports this module too, and serves nothing
        from flowsentry.serving import schema
        from flowsentry.serving.app import App, Model, rehearse
        from flowsentry.serving.store import open_store
        from flowsentry.serving.streams import Limits, Streams

        settings = Settings.read()
        model = Model.load(Path(__file__).resolve().parents[2])
        rehearse(model)
        gc.freeze()  # what is here now stays: the collector need not look at it again with every few requests
        limits = Limits(settings.streams, settings.memory_bytes, settings.checkpoint_flows, settings.checkpoint_seconds)
        self._streams = Streams(model.detector, open_store(settings.state), limits)
        self._app = App(model, self._streams, settings, orjson.dumps(schema.openapi()))
        Front.app = self._app
        named = {"model_version": model.version, "digest": model.digest, "view": model.detector.manifest.name}
        _log.info("ready", extra={"fields": named})

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def check() -> None:
        """Stop BentoML's command line before it starts a process that would only die."""
        try:
            Settings.read()
        except ConfigError as error:
            raise SystemExit(f"error: {error}") from None

    def __is_ready__(self) -> bool:
        return Front.app is self._app

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Write every stream."""
        self._app.close()
        self._streams.close()
        _log.info("stopped")


FlowSentry.add_asgi_middleware(Front)  # type: ignore[attr-defined]
