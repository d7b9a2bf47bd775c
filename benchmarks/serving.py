"""The service under `bentoml serve`: what it answers in a second, how late, and whether always the same.

    make bench ONLY=serving
    PYTHONPATH=. python benchmarks/serving.py single paced batches tick start hostile equal

Each part in one run against a named alternative:

    single   one flow a request, 16 connections on 16 streams, against the same route in FastAPI with Pydantic
    paced    500 requests a second, due at fixed times: how late the answers are, ours and FastAPI's
    batches  1,000 flows a request: JSON, NDJSON and Arrow against each other, by CPU seconds of the service
    tick     the worst reporting tick in one request
    start    from the command to ready, against a service with nothing in it
    hostile  100,000 malformed requests, then the longest bodies with the most values: no answer 5xx but 503, bounded
             memory, and other streams go on meanwhile
    equal    offline, one by one, by tick and all at once through HTTP: differing verdicts

The load generator is a process of its own on the same cores. Detectors are trained on a simulated hour.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
import psutil
from _data import DEFAULT, recording
from _load import Load, drive, request

from flowsentry import detector as detectors
from flowsentry import telemetry
from flowsentry.detector import Detector
from flowsentry.features.build import build
from flowsentry.features.splits import make_splits
from flowsentry.flows import labels
from flowsentry.flows.places import places
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.schema import is_malicious
from flowsentry.learning.families import FAMILIES
from flowsentry.serving import bundle as bundles
from flowsentry.serving.client import Client, as_rows, encode
from flowsentry.serving.protocol import ARROW, JSON, NDJSON
from flowsentry.simulation import SimulationSettings, simulate

CONNECTIONS = 16
HERE = Path(__file__).resolve().parent
EMPTY_SERVICE = """
import bentoml


@bentoml.service
class Empty:
    @bentoml.api
    def nothing(self) -> str:
        return ""
"""


def trained(family: str = "logistic_regression") -> Detector:
    """A detector of the view `behaviour`, fitted on a simulated hour without a search."""
    raw = simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1))
    reports, _ = labels.derive(raw.assign(flow=identify(raw)))
    flows = collapse(reports)
    flows["place"] = places(flows)
    view = build("behaviour", reports, flows, {})
    splits = make_splits(flows, seed=0, warm_up_seconds=view.manifest.warm_up_seconds, rotations=1)
    part, of_row = splits.parts["random"], view.rows["flow"].to_numpy()
    malicious = is_malicious(flows["label"])
    fit = part.eq("fit").to_numpy()[of_row]
    calibration = (part.eq("calibration").to_numpy() & ~malicious)[of_row]
    return detectors.fit(
        FAMILIES[family],
        {name: values[0] for name, values in FAMILIES[family].grid.items()},
        view.manifest,
        view.rows[fit],
        malicious[of_row][fit],
        flows["exchange"].to_numpy()[of_row][fit],
        view.rows[calibration],
        target_fpr=0.001,
        needs_effect=True,
        seed=0,
    )


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    process: psutil.Process
    seconds: float
    """From the command to ready."""

    @property
    def worker(self) -> psutil.Process:
        """The process that answers."""
        everything = [self.process, *self.process.children(recursive=True)]
        return max(everything, key=lambda process: sum(process.cpu_times()[:2]))

    def cpu(self) -> float:
        """CPU seconds so far."""
        return float(sum(self.worker.cpu_times()[:2]))

    def measure(self, connections: Sequence[Sequence[bytes]], rate: float = 0.0) -> tuple[Load, float]:
        """Send requests; the load and the CPU seconds that they cost."""
        before = self.cpu()
        load = drive(self.port, connections, rate)
        return load, self.cpu() - before


@contextmanager
def serving(command: Sequence[str], folder: Path, ready: str, **environment: str) -> Iterator[Server]:
    """Run a server until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    begin = time.perf_counter()
    log = (folder / "log").open("wb")
    process = psutil.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder,
        env=dict(os.environ) | environment,
        stdout=log,
        stderr=log,
    )
    try:
        while not _answers(port, ready):
            if process.poll() is not None or time.perf_counter() - begin > 120:
                sys.exit((folder / "log").read_text())
            time.sleep(0.01)
        yield Server(port, psutil.Process(process.pid), time.perf_counter() - begin)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        log.close()


def _answers(port: int, path: str) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Bench:
    """What the parts share: one bundle, its detector, and flows."""

    def __init__(self, folder: Path, flows: Path) -> None:
        self.folder = folder
        self.detector = trained()
        self.detector.save(folder / "detector")
        self.bundle = bundles.build(self.detector, "1", folder / "bundle").path
        bundles.warm(self.bundle)
        self.reports = recording(flows)
        self.rows = as_rows(self.reports)

    def ours(self) -> AbstractContextManager[Server]:
        """The bundle under `bentoml serve`, with an empty state."""
        state = tempfile.mkdtemp(dir=self.folder)
        command = (sys.executable, "-m", "bentoml", "serve", ".")
        places = {"FLOWSENTRY_SERVICE_STATE": state, "BENTOML_HOME": str(self.folder / "home"), "PYTHONPATH": ""}
        return serving(command, self.bundle, "/readyz", **places)

    def fastapi(self) -> AbstractContextManager[Server]:
        """The same route in FastAPI under uvicorn."""
        command = (sys.executable, "-m", "uvicorn", "_fastapi:app", "--no-access-log", "--log-level", "warning")
        path = os.pathsep.join((str(HERE), str(HERE.parent)))
        places = {"FLOWSENTRY_BENCH_DETECTOR": str(self.folder / "detector"), "PYTHONPATH": path}
        return serving(command, self.folder, "/openapi.json", **places)

    def single(self, count: int, prefix: str) -> list[list[bytes]]:
        """`count` requests with one flow each, on 16 streams."""
        share = count // CONNECTIONS
        connections = []
        for number in range(CONNECTIONS):
            begin = number * share
            taken = [self.rows[(begin + place) % len(self.rows)] for place in range(share)]
            path = f"/v1/verdicts?stream={prefix}{number}"
            connections.append([request(path, encode([row], JSON), JSON) for row in taken])
        return connections


def single(bench: Bench) -> None:
    """One flow a request."""
    print(f"{'one flow a request, 16 connections':44s}{'requests/s':>12s}{'p50 ms':>9s}{'p99 ms':>9s}{'CPU us':>9s}")
    rates: dict[str, list[float]] = {"ours, bentoml serve": [], "FastAPI + Pydantic, uvicorn": []}
    with bench.ours() as ours, bench.fastapi() as fastapi:
        for turn in range(3):
            for name, server in zip(rates, (ours, fastapi), strict=True):
                server.measure(bench.single(800, f"warm{turn}-"))
                load, cpu = server.measure(bench.single(8_000, f"turn{turn}-"))
                assert set(load.statuses) == {200}, load.statuses
                rates[name].append(load.rate)
                line = f"{name:44s}{load.rate:12,.0f}{1e3 * load.percentile(50):9.2f}{1e3 * load.percentile(99):9.2f}"
                print(f"{line}{1e6 * cpu / len(load.latency):9.0f}")
    first, second = (statistics.median(found) for found in rates.values())
    print(f"ours answers {first / second:.2f} times as many (medians of three turns)")


def paced(bench: Bench) -> None:
    """500 requests a second."""
    print(f"{'500 requests/s, one flow each, 20 s':44s}{'p50 ms':>9s}{'p99 ms':>9s}{'worst ms':>10s}{'CPU':>7s}")
    for name, start in (("ours, bentoml serve", bench.ours), ("FastAPI + Pydantic, uvicorn", bench.fastapi)):
        with start() as server:
            server.measure(bench.single(800, "warm-"))
            load, cpu = server.measure(bench.single(10_000, "paced-"), rate=500)
        assert set(load.statuses) == {200}, load.statuses
        numbers = [1e3 * value for value in (load.percentile(50), load.percentile(99), load.latency.max())]
        print(f"{name:44s}{numbers[0]:9.2f}{numbers[1]:9.2f}{numbers[2]:10.1f}{cpu / load.seconds:7.0%}")


def batches(bench: Bench) -> None:
    """1,000 flows a request."""
    count = 1000
    parts = [bench.reports.iloc[begin : begin + count] for begin in range(0, len(bench.reports) - count + 1, count)]
    parts = (parts * (200 // len(parts) + 1))[:200]
    print(f"{'1,000 flows a request, one stream':44s}{'flows/s':>12s}{'per core':>12s}{'MiB in':>8s}{'MiB out':>9s}")
    per_core = {}
    with bench.ours() as server:
        for media_type in (JSON, NDJSON, ARROW):
            bodies = [encode(part, media_type) for part in parts]
            results = []
            for turn in range(3):
                path = f"/v1/verdicts?stream=batches{MEDIA[media_type]}{turn}"
                load, cpu = server.measure([[request(path, body, media_type) for body in bodies]])
                assert load.statuses == {200: len(bodies)}, load.statuses
                results.append((len(bodies) * count / load.seconds, len(bodies) * count / cpu, load.answered_bytes))
            wall, core, out = (statistics.median(column) for column in zip(*results, strict=True))
            per_core[media_type] = core
            sent = sum(map(len, bodies))
            print(f"{media_type:44s}{wall:12,.0f}{core:12,.0f}{sent / 2**20:8.1f}{out / 2**20:9.1f}")
        with bench.fastapi() as other:
            bodies = [encode(part, JSON) for part in parts[:40]]
            load, cpu = other.measure([[request("/v1/verdicts?stream=b", body, JSON) for body in bodies]])
            assert load.statuses == {200: len(bodies)}, load.statuses
            flows = len(bodies) * count
            print(f"{'FastAPI + Pydantic, JSON':44s}{flows / load.seconds:12,.0f}{flows / cpu:12,.0f}")
    print(f"Arrow is {per_core[ARROW] / per_core[JSON]:.2f} times JSON per core")


MEDIA = {JSON: "json", NDJSON: "ndjson", ARROW: "arrow"}


def tick(bench: Bench) -> None:
    """The worst tick."""
    of_tick = bench.reports["time"].dt.floor("10s")
    worst = bench.reports[of_tick == of_tick.value_counts().idxmax()]
    before = bench.reports.iloc[: worst.index[0]]
    print(f"{f'the worst tick, {len(worst):,} flows in one request':44s}{'seconds':>12s}{'flows/s':>12s}")
    with bench.ours() as server, Client(f"http://127.0.0.1:{server.port}") as client:
        for media_type in (JSON, NDJSON, ARROW):
            stream = MEDIA[media_type]
            for part in np.array_split(np.arange(len(before)), len(before) // 20_000 + 1):
                body = encode(before.iloc[part], ARROW)
                client.post_verdicts(body, media_type=ARROW, stream=stream, absorb=True)
            load, _ = server.measure(
                [[request(f"/v1/verdicts?stream={stream}", encode(worst, media_type), media_type)]]
            )
            assert load.statuses == {200: 1}, load.statuses
            print(f"{media_type:44s}{load.seconds:12.3f}{len(worst) / load.seconds:12,.0f}")


def start(bench: Bench) -> None:
    """From the command to ready."""
    (bench.folder / "empty").mkdir(exist_ok=True)
    (bench.folder / "empty" / "empty.py").write_text(EMPTY_SERVICE)
    command = (sys.executable, "-m", "bentoml", "serve", "empty:Empty")
    print(f"{'from the command to ready, best of 3':44s}{'seconds':>12s}{'CPU seconds':>13s}")
    for name, run in (
        ("ours, machine code cached", bench.ours),
        ("a BentoML service with nothing in it", lambda: serving(command, bench.folder / "empty", "/readyz")),
    ):
        results = []
        for _ in range(3):
            with run() as server:
                tree = [server.process, *server.process.children(recursive=True)]
                results.append((server.seconds, sum(sum(process.cpu_times()[:2]) for process in tree)))
        seconds, cpu = min(results)
        print(f"{name:44s}{seconds:12.2f}{cpu:13.2f}")


def hostile(bench: Bench) -> None:
    """Malformed requests."""
    statuses: Counter[int] = Counter()
    with bench.ours() as server:
        generator = random.Random(0)
        valid = [encode(bench.rows[place : place + 3], kind) for place in range(0, 60, 3) for kind in (JSON, NDJSON)]
        valid += [encode(bench.reports.iloc[place : place + 3], ARROW) for place in range(0, 60, 3)]

        def some(count: int) -> None:
            connections = [[_malformed(generator, valid) for _ in range(count // 8)] for _ in range(8)]
            statuses.update(drive(server.port, connections).statuses)

        some(4_000)
        before = server.worker.memory_info().rss
        fuzzed = _fuzz(server.port, bench.folder)
        for _ in range(12):
            some(8_000)
        for _ in range(2_000):
            _garbage(server.port, generator)
        after = server.worker.memory_info().rss
        long, beside, peak = _long_bodies(server, bench)
        assert _answers(server.port, "/readyz")
        with Client(f"http://127.0.0.1:{server.port}") as client:
            client.post_verdicts(valid[0], media_type=JSON, stream="alive")
    total = sum(statuses.values()) + 2_000
    print(f"{total:,} malformed requests by hand: " + ", ".join(f"{n:,} x {s}" for s, n in sorted(statuses.items())))
    print(f"schemathesis, from /v1/openapi.json: {fuzzed}")
    print(f"memory {before / 2**20:.0f} MiB before, {after / 2**20:.0f} MiB after")
    print(f"{sum(long.values())} bodies of up to 32 MiB: " + ", ".join(f"{n} x {s}" for s, n in sorted(long.items())))
    line = f"{1e3 * beside.percentile(50):.1f} ms p50, {1e3 * beside.latency.max():.0f} ms worst"
    print(f"memory {peak / 2**20:.0f} MiB at the peak; another stream meanwhile: {line}")
    everything = statuses + long + Counter(beside.statuses)
    errors = {status: n for status, n in everything.items() if status >= 500 and status != 503}
    print(f"answers 5xx but 503: {sum(errors.values()):,}, 503: {everything[503]:,}")
    assert not errors, errors
    assert set(beside.statuses) == {200}, beside.statuses
    assert after - before < 64 << 20, "memory grows with requests"
    assert peak - after < MOST_GROWTH, "long bodies take too much memory"


LONGEST = 32 << 20
MOST_GROWTH = 24 * LONGEST
"""Of the service's memory under long bodies: eight are held at once, each twice while it is put together; one is
parsed; the streams keep their last answers."""


def _long_bodies(server: Server, bench: Bench) -> tuple[Counter[int], Load, int]:
    """Bodies of the longest kind on 12 connections: their statuses, one stream beside them, memory at the peak."""
    bodies = [
        b'{"flows":[%s]}' % (unit * (LONGEST // len(unit) - 1))[:-1] for unit in (b"{},", b"[],", b"999,", b'"ab",')
    ]
    bodies += [b'{"flows":[{%s}]}' % b",".join(b'"%x":0' % number for number in range(2_000_000))]
    bodies += [encode((bench.rows * (50_000 // len(bench.rows) + 1))[:50_000], JSON)]
    Path(f"/proc/{server.worker.pid}/clear_refs").write_text("5")
    with ThreadPoolExecutor(13) as pool:
        beside = pool.submit(server.measure, [bench.single(6_400, "beside")[0]], 20.0)
        long = Counter(pool.map(lambda number: _post(server.port, f"long{number}", bodies[number % 6]), range(48)))
        load, _ = beside.result()
    status = Path(f"/proc/{server.worker.pid}/status").read_text().splitlines()
    return long, load, next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))


def _post(port: int, stream: str, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused before all of it was sent
            connection.request("POST", f"/v1/verdicts?stream={stream}", body, {"Content-Type": JSON})
        return connection.getresponse().status
    finally:
        connection.close()


def _malformed(generator: random.Random, valid: Sequence[bytes]) -> bytes:
    """A request that HTTP allows, with something wrong in it."""
    body = bytearray(generator.choice(valid))
    for _ in range(generator.randint(0, 6)):
        place = generator.randrange(len(body))
        match generator.randrange(4):
            case 0:
                body[place] = generator.randrange(256)
            case 1:
                del body[place : place + generator.randint(1, 40)]
            case 2:
                body[place:place] = generator.choice(
                    (b"[" * 500, b"null", b"1e999", b"-1", b"\xff", b'"', b"NaN", b"{}")
                )
            case _:
                body[place:place] = body[place : place + 100]
        body = body or bytearray(b"\0")
    stream = generator.choice(("a", "b", "c", "default", "x" * 64, "x" * 65, "", "../../etc", "é", "a\0"))
    parameters = [
        ("stream", stream),
        ("seen", generator.choice(("0", "1", "-1", "1e9", "9" * 15, "9" * 40, ""))),
        ("absorb", generator.choice(("true", "false", "yes"))),
        ("on_bad", generator.choice(("reject_rows", "reject_batch", "x"))),
        ("x" * generator.randint(1, 9), "1"),
    ]
    chosen = generator.sample(parameters[:4], generator.randint(0, 3))
    if generator.random() < 0.1:
        chosen.append(parameters[4])
    query = "&".join(f"{name}={quote(value)}" for name, value in chosen)
    kind = generator.choice((JSON, NDJSON, ARROW, JSON, NDJSON, ARROW, "text/plain", "application/json; x=y", "*"))
    accept = generator.choice(("", "Accept: */*\r\n", f"Accept: {ARROW}\r\n", "Accept: ,;,q=\r\n"))
    path = generator.choice(("/v1/verdicts",) * 9 + ("/v1/streams/%00", "/v1/verdicts/../model", "/v1/%ff", "//"))
    return request(f"{path}?{query}", bytes(body), kind, accept)


def _garbage(port: int, generator: random.Random) -> None:
    """Bytes that are no HTTP, and a connection that ends in the middle."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        begin = generator.choice((b"", b"POST /v1/verdicts HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n", b"POST /v1/verdicts"))
        client.sendall(begin + generator.randbytes(generator.randint(1, 2000)))


def _fuzz(port: int, folder: Path) -> str:
    """Let schemathesis send what the published interface allows and forbids; what it says of the answers."""
    url = f"http://127.0.0.1:{port}/v1/openapi.json"
    options = ("--checks", "not_a_server_error", "--max-examples", "150", "--seed", "1", "--no-color")
    command = (sys.executable, "-m", "schemathesis.cli", "run", url, *options)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    told = [line for line in lines if "generated" in line or "issues" in line.lower() or "unique failures" in line]
    return f"exit status {done.returncode}; " + "; ".join(told[-3:] or lines[-3:])


def equal(bench: Bench) -> None:
    """Offline against online, cut in three ways."""
    offline = bench.detector.verdicts(bench.reports)
    expected = {
        "label": offline["label"].tolist(),
        "anomaly_score": offline["anomaly_score"].tolist(),
        "warm": offline["warm"].tolist(),
        "first_alarm": offline["first_alarm"].tolist(),
        "anomaly_type": [value if isinstance(value, str) else None for value in offline["anomaly_type"]],
    }
    ticks = bench.reports["time"].dt.floor("10s").to_numpy()
    count = len(bench.reports)
    most = 50_000
    cuts = {
        "one by one": np.arange(count),
        "by tick": np.flatnonzero(np.r_[True, ticks[1:] != ticks[:-1]]),
        "all at once": np.arange(0, count, most),
    }
    malicious = sum(label == "malicious" for label in expected["label"])
    print(f"{f'{count:,} reports, {malicious:,} malicious':44s}{'requests':>10s}{'seconds':>10s}{'differing':>11s}")
    with bench.ours() as server, Client(f"http://127.0.0.1:{server.port}") as client:
        for name, begins in cuts.items():
            differing, begin = 0, time.perf_counter()
            for first, last in zip(begins, [*begins[1:], count], strict=True):
                body = encode(bench.rows[first:last], NDJSON)
                reply = client.post_verdicts(body, media_type=NDJSON, stream=name.replace(" ", "-"), seen=int(first))
                rows = [json.loads(line) for line in reply.body.splitlines()]
                differing += sum(_differs(row, expected, first + place) for place, row in enumerate(rows)) + abs(
                    last - first - len(rows)
                )
            print(f"{name:44s}{len(begins):10,}{time.perf_counter() - begin:10.1f}{differing:11,}")


def _differs(row: dict[str, object], expected: dict[str, list[object]], place: int) -> bool:
    alarm = row.get("first_alarm")
    found = {**row, "first_alarm": pd.NaT if alarm is None else pd.Timestamp(str(alarm))}
    return any(
        found.get(name) != values[place] and not (found.get(name) is pd.NaT and values[place] is pd.NaT)
        for name, values in expected.items()
    )


PARTS: dict[str, Callable[[Bench], None]] = {
    part.__name__: part for part in (single, paced, batches, tick, start, hostile, equal)
}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default all")
    parser.add_argument("--flows", type=Path, default=DEFAULT)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    telemetry.disable()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory(prefix="flowsentry-bench-") as folder:
        bench = Bench(Path(folder), arguments.flows)
        for name in arguments.parts or PARTS:
            PARTS[name](bench)
            print()


if __name__ == "__main__":
    main()
