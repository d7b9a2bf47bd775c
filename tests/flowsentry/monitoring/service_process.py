"""A service in a process of its own, without BentoML: started with the folder of a detector, one of states, a port."""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

from flowsentry.detector import Detector
from flowsentry.serving.app import App, Model
from flowsentry.serving.settings import Settings
from flowsentry.serving.store import FolderStore
from flowsentry.serving.streams import Limits, Streams


def main(detector: str, state: str, port: str) -> None:
    model = Model(Detector.load(Path(detector)), "7", "")
    streams = Streams(model.detector, FolderStore(Path(state)), Limits(checkpoint_flows=300))
    app = App(model, streams, Settings(state=state), b"")

    async def answer(scope, receive, send):  # type: ignore[no-untyped-def]
        if scope["path"] == "/readyz":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        else:
            await app(scope, receive, send)

    uvicorn.run(answer, host="127.0.0.1", port=int(port), lifespan="off", log_level="error", ws="none")


if __name__ == "__main__":
    main(*sys.argv[1:])
