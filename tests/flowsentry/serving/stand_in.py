"""Serves a bundle in place of BentoML's worker, in a tenth of the time: `stand_in.py BUNDLE --fd N ...`.

Streams are counters, kept in the state folder as the service keeps its own. The model version decides how it behaves.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

from aiohttp import web

about = json.loads(Path(sys.argv[1], "src", "bundle.json").read_text())
version = about["model_version"]
token = Path(os.environ["FLOWSENTRY_SERVICE_TOKEN_FILE"]).read_text().strip()
state = Path(os.environ["FLOWSENTRY_SERVICE_STATE"]) / "seen.json"
seen: dict[str, int] | None = None

if version == "dies-at-once":
    print("no such feature: flag_count", flush=True)
    sys.exit(3)


def streams() -> dict[str, int]:
    global seen  # noqa: PLW0603
    if seen is None:
        seen = json.loads(state.read_text()) if state.exists() else {}
    return seen


def store() -> None:
    global seen  # noqa: PLW0603
    if seen is not None:
        state.write_text(json.dumps(seen))
    seen = None


async def verdicts(request: web.Request) -> web.Response:
    assert request.headers["Authorization"] == f"Bearer {token}"
    if version == "dies-of-a-flow" and b"poison" in await request.read():
        print("division by zero", flush=True)
        os._exit(9)
    await asyncio.sleep(float(request.query.get("slow", "0")))
    name = request.query.get("stream", "default")
    streams()[name] = streams().get(name, 0) + 1
    answer = {"model_version": version, "seen": streams()[name], "body": len(await request.read()), "pid": os.getpid()}
    return web.json_response(answer, headers={"FlowSentry-Seen": str(answer["seen"])})


async def release(request: web.Request) -> web.Response:
    if version == "does-not-release":
        return web.Response(status=500)
    store()
    return web.json_response({"streams": 1})


async def ready(request: web.Request) -> web.Response:
    return web.Response(status=503 if version == "never-ready" else 200)


async def ended(app: web.Application) -> None:
    store()


app = web.Application(client_max_size=1 << 30)
app.router.add_post("/v1/verdicts", verdicts)
app.router.add_post("/v1/release", release)
app.router.add_get("/readyz", ready)
app.on_shutdown.append(ended)
if version == "ignores-sigterm":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"serving {version}", flush=True)
listener = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
web.run_app(app, sock=listener, print=None, handle_signals=version != "ignores-sigterm")
