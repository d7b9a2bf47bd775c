"""The stable address: passes requests on to the champion, and holds them while there is none to ask.

A request is taken in whole before it is passed on, and so is its answer: a slow client neither occupies the service
nor delays a switch, and a request that never reached a service can be passed on again.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from aiohttp import ClientConnectorError, ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from yarl import URL

HOLD_SECONDS: Final = 27.0
"""How long a request waits for a champion, then 503: longer than a switch takes, shorter than our client waits."""
MOST_HELD: Final = 1000
BODIES_AT_ONCE: Final = 8
"""Longest bodies that are taken in at one time."""
UPLOAD_SECONDS: Final = 30.0
ANSWER_SECONDS: Final = 60.0
HEALTH: Final = frozenset({"/livez", "/readyz", "/healthz", "/metrics"})
_READING: Final = ("GET", "HEAD")
_IDEMPOTENT: Final = frozenset({"GET", "HEAD", "DELETE"})
_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


class _Problem(Exception):
    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail

    def response(self) -> web.Response:
        title = self.code.replace("_", " ").capitalize()
        body = {"title": title, "status": self.status, "code": self.code, "detail": self.detail}
        response = web.Response(
            status=self.status, body=json.dumps(body).encode(), content_type="application/problem+json"
        )
        if self.status == 503:
            response.headers["Retry-After"] = "1"
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if self.status == 405:
            response.headers["Allow"] = ", ".join(_READING)
        return response


class Proxy:
    """Requests of one address, for one target at a time."""

    def __init__(self, token: str, *, body_bytes: int) -> None:
        """Nothing is listened to yet.

        Args:
            token: that every request to /v1 must bring.
            body_bytes: longest body of a request; the service's own limit.
        """
        self._token = token
        self._body_bytes = body_bytes
        self._target: str | None = None
        self._switching = False
        self._closing = False
        self._open = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._flying = 0
        self._held = 0
        self._taken = 0
        self._session = ClientSession(
            connector=TCPConnector(limit=256, keepalive_timeout=15),
            timeout=ClientTimeout(total=ANSWER_SECONDS),
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        )
        # Of its own: requests under way, however many, do not keep the supervisor from asking.
        self._asking = ClientSession(connector=TCPConnector(limit=0, force_close=True), cookie_jar=DummyCookieJar())
        self._runner = web.ServerRunner(
            web.Server(self._serve, auto_decompress=False, access_log=None), shutdown_timeout=5
        )
        self.url = ""

    async def listen(self, host: str, port: int) -> None:
        """Take requests.

        Raises:
            OSError: the port is taken.
        """
        await self._runner.setup()
        await web.TCPSite(self._runner, host, port).start()
        self.url = f"http://{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """Take no more requests, answer those under way, refuse those held, and end."""
        self._closing = True
        self._update()
        await self._runner.cleanup()
        await self._session.close()
        await self._asking.close()

    def point(self, target: str | None) -> None:
        """Pass requests on to this address from now on; None: hold them."""
        self._target = target
        self._update()

    @asynccontextmanager
    async def switching(self) -> AsyncIterator[None]:
        """Hold new requests meanwhile."""
        self._switching = True
        self._update()
        try:
            yield
        finally:
            self._switching = False
            self._update()

    async def become_idle(self, seconds: float) -> bool:
        """Wait until all requests under way are answered; whether they are, after so long at most."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), seconds)
        return self._idle.is_set()

    async def ask(self, target: str, method: str, path: str, seconds: float) -> int:
        """Status of the answer to a request of our own; 0 without an answer."""
        headers = {"Authorization": f"Bearer {self._token}"}
        try:
            async with self._asking.request(
                method, target + path, headers=headers, timeout=ClientTimeout(total=seconds)
            ) as response:
                await response.read()
                return response.status
        except (ClientError, TimeoutError, OSError):
            return 0

    def _update(self) -> None:
        if self._closing or (self._target is not None and not self._switching):
            self._open.set()
        else:
            self._open.clear()

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._answer(request)
        except _Problem as problem:
            return problem.response()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        path = request.rel_url.raw_path
        asks = path.startswith("/v1/")
        if not asks:
            if path not in HEALTH:
                raise _Problem(404, "not_found", "there is nothing at this path")
            if request.method not in _READING:
                raise _Problem(405, "method_not_allowed", "this path is only read")
            return await self._pass_on(request, b"", hold=False)
        if not self._authorized(request.headers.get("Authorization", "")):
            raise _Problem(401, "unauthorized", "a bearer token is needed")
        taken = [0]
        try:
            body = await self._body(request, taken)
            return await self._pass_on(request, body, hold=True)
        finally:
            self._taken -= taken[0]

    def _authorized(self, said: str) -> bool:
        scheme, _, token = said.partition(" ")
        right = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._token.encode())
        return right and scheme.lower() == "bearer"

    async def _body(self, request: web.BaseRequest, taken: list[int]) -> bytes:
        too_large = _Problem(413, "too_large", f"the body is longer than {self._body_bytes} bytes")
        if (request.content_length or 0) > self._body_bytes:
            raise too_large
        chunks = []
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                async for chunk in request.content.iter_any():
                    taken[0] += len(chunk)
                    self._taken += len(chunk)
                    if taken[0] > self._body_bytes:
                        raise too_large
                    if self._taken > BODIES_AT_ONCE * self._body_bytes:
                        raise _Problem(503, "busy", "too many large requests at one time")
                    chunks.append(chunk)
        except TimeoutError:
            raise _Problem(408, "timeout", f"the request was not whole after {UPLOAD_SECONDS:g} s") from None
        return b"".join(chunks)

    async def _pass_on(self, request: web.BaseRequest, body: bytes, *, hold: bool) -> web.Response:
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (HOLD_SECONDS if hold else 0)
        # Whoever names `seen` gets the first answer again if the request was already taken.
        may_repeat = request.method in _IDEMPOTENT or "seen" in request.rel_url.query
        while True:
            async with self._turn(deadline) as target:
                try:
                    async with self._session.request(
                        request.method,
                        URL(target + request.rel_url.raw_path_qs, encoded=True),
                        headers=headers,
                        data=io.BytesIO(body) if body else None,
                        allow_redirects=False,
                    ) as answer:
                        content = await answer.read()
                        return web.Response(status=answer.status, body=content, headers=_end_to_end(answer.headers))
                except ClientConnectorError:
                    pass  # nobody got it: it may be asked again
                except TimeoutError:
                    raise _Problem(503, "busy", f"the service took longer than {ANSWER_SECONDS:g} s") from None
                except ClientError:
                    if not may_repeat:
                        raise _Problem(503, "busy", "the service ended while it answered") from None
                    may_repeat = False
            if loop.time() >= deadline:
                raise _Problem(503, "busy", "there is no service at the moment")
            await asyncio.sleep(0.05)

    @asynccontextmanager
    async def _turn(self, deadline: float) -> AsyncIterator[str]:
        if not self._open.is_set():
            if self._held >= MOST_HELD:
                raise _Problem(503, "busy", "too many requests wait for the service")
            self._held += 1
            try:
                async with asyncio.timeout_at(deadline):
                    while not self._open.is_set():
                        await self._open.wait()
            except TimeoutError:
                raise _Problem(503, "busy", "there is no service at the moment") from None
            finally:
                self._held -= 1
        if (target := self._target) is None or self._closing:
            raise _Problem(503, "busy", "there is no service at the moment")
        self._flying += 1
        self._idle.clear()
        try:
            yield target
        finally:
            self._flying -= 1
            if not self._flying:
                self._idle.set()


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(k, v) for k, v in headers.items() if k.lower() not in _HOP_BY_HOP]
