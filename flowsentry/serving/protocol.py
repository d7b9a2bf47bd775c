"""What both ends of the stream protocol say: the service (`streams`, `app`) and its clients (`client`)."""

from __future__ import annotations

from typing import Final

from flowsentry.errors import ServiceError

STREAM_HEADER: Final = "FlowSentry-Stream"
SEEN_HEADER: Final = "FlowSentry-Seen"
DURABLE_HEADER: Final = "FlowSentry-Durable"

JSON: Final = "application/json"
NDJSON: Final = "application/x-ndjson"
ARROW: Final = "application/vnd.apache.arrow.stream"


class SeenMismatch(ServiceError):
    """The client believes that the service has seen another number of flows of the stream."""

    def __init__(self, seen: int, durable: int) -> None:
        super().__init__(f"the stream has seen {seen} flows: send again from there")
        self.seen = seen
        """Where the service is."""
        self.durable = durable
        """What it will remember after a restart."""
