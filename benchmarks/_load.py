"""A cheap HTTP/1.1 load generator: keep-alive connections, requests encoded beforehand, in a process of its own."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import cast

import numpy as np
import uvloop


@dataclass(frozen=True)
class Load:
    """What one run of the generator saw."""

    seconds: float
    latency: np.ndarray
    """Seconds from the time a request was due (paced) or sent (not paced) to its whole answer, in order of answers."""
    statuses: dict[int, int]
    answered_bytes: int

    @property
    def rate(self) -> float:
        return len(self.latency) / self.seconds

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.latency, q))


def request(path: str, body: bytes, media_type: str, headers: str = "") -> bytes:
    """One POST as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n"
    return (head + headers + "\r\n").encode() + body


class _Connection(asyncio.Protocol):
    """Sends its requests one after the other; the next when the answer is whole, or when it is due."""

    def __init__(self, requests: Sequence[bytes], every: float, first: float, run: _Run) -> None:
        self.requests, self.every, self.first, self.run = requests, every, first, run
        self.sent, self.buffer, self.need, self.due = 0, bytearray(), -1, 0.0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def start(self, begin: float) -> None:
        self.begin = begin + self.first
        self._next()

    def _next(self) -> None:
        now = time.perf_counter()
        self.due = self.begin + self.sent * self.every if self.every else now
        if self.due > now:
            asyncio.get_running_loop().call_later(self.due - now, self._send)
        else:
            self._send()

    def _send(self) -> None:
        self.transport.write(self.requests[self.sent])
        self.sent += 1

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.need < 0:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self.buffer[:end]).lower()
            place = head.find(b"content-length:")
            length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
            self.need = end + 4 + length
        if len(self.buffer) < self.need:
            return
        self.run.latency.append(time.perf_counter() - self.due)
        status = int(self.buffer[9:12])
        self.run.statuses[status] = self.run.statuses.get(status, 0) + 1
        self.run.answered_bytes += self.need
        del self.buffer[: self.need]
        self.need = -1
        if self.sent < len(self.requests):
            self._next()
        else:
            self.transport.close()
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the service closed a connection ({exc})"))


class _Run:
    def __init__(self) -> None:
        self.latency: list[float] = []
        self.statuses: dict[int, int] = {}
        self.answered_bytes = 0


async def _drive(port: int, connections: Sequence[Sequence[bytes]], rate: float) -> Load:
    loop, run = asyncio.get_running_loop(), _Run()
    every = len(connections) / rate if rate else 0.0
    opened = []
    for number, requests in enumerate(connections):
        first = number / rate if rate else 0.0
        made = await loop.create_connection(
            lambda r=requests, f=first: _Connection(r, every, f, run), "127.0.0.1", port
        )
        opened.append(made[1])
    begin = time.perf_counter()
    for connection in opened:
        connection.start(begin)
    await asyncio.gather(*(connection.done for connection in opened))
    return Load(time.perf_counter() - begin, np.array(run.latency), run.statuses, run.answered_bytes)


def drive(port: int, connections: Sequence[Sequence[bytes]], rate: float = 0.0) -> Load:
    """Send every connection's requests in a process of its own.

    Args:
        port: of the service on this machine.
        connections: of each connection its requests.
        rate: requests per second over all connections, due at fixed times (an answer that is late is late from the
            time its request was due); 0: the next request follows the answer.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as child:
        return child.submit(_run, port, connections, rate).result()


def _run(port: int, connections: Sequence[Sequence[bytes]], rate: float) -> Load:
    return uvloop.run(_drive(port, connections, rate))
