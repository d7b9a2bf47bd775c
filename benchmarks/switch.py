"""Requests that fail, and the longest wait, while champions change; beside a restart with the new version, in one run.

    make bench ONLY=switch

Two real bundles of a small detector. 16 streams send one flow per request, together 200 requests/s, to the stable
address, while (1) a challenger is promoted, (2) the deployer rolls back, and (3) the services are stopped and started
instead, as without a second process beside the champion. The flows that a stream has seen have to be as many as were
answered.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import aiohttp

from flowsentry.detector import Detector
from flowsentry.features.build import build
from flowsentry.features.splits import make_splits
from flowsentry.flows import labels
from flowsentry.flows.reports import collapse, identify
from flowsentry.learning.candidates import Recipe, train
from flowsentry.learning.families import FAMILIES
from flowsentry.serving import bundle
from flowsentry.serving.deployer import Endpoint
from flowsentry.serving.local import LocalDeployer
from flowsentry.simulation import SimulationSettings, simulate

STREAMS = 16
FLOW = {
    "flow_id": "a",
    "src_ip": "192.0.2.1",
    "dst_ip": "192.0.2.2",
    "src_port": 40_000,
    "dst_port": 80,
    "transport": "tcp",
    "bytes": 600,
    "duration": 0,
    "time": "2026-01-01T00:00:00Z",
}


class Load:
    """Requests at a steady rate from the start to the end of a block."""

    def __init__(self, endpoint: Endpoint, rate: int, name: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.longest = 0.0
        self.lost = 0
        self._endpoint, self._rate, self._name = endpoint, rate, name
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()))

    def __enter__(self) -> Load:
        self._thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(1)
        self._end.set()
        self._thread.join()

    async def _send(self) -> None:
        headers = {"Authorization": f"Bearer {self._endpoint.token}"}
        async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(self._stream(session, number))

    async def _stream(self, session: aiohttp.ClientSession, number: int) -> None:
        pause = STREAMS / self._rate
        due = time.perf_counter() + pause * number / STREAMS
        answered = seen = 0
        while not self._end.is_set():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            begin, due = time.perf_counter(), due + pause
            query = {"stream": f"{self._name}-{number}", "seen": str(seen)}
            try:
                url = f"{self._endpoint.url}/v1/verdicts"
                async with session.post(url, params=query, json={"flows": [FLOW]}) as answer:
                    body = await answer.json(content_type=None)
                    self.statuses[answer.status] += 1
                    if answer.status == 200:
                        answered += 1
                        seen = body["seen"]
            except aiohttp.ClientError:
                self.statuses[0] += 1
            self.longest = max(self.longest, time.perf_counter() - begin)
        self.lost += answered - seen


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        detector = small_detector()
        built = [bundle.build(detector, version, Path(scratch, version)) for version in ("1", "2")]
        deployer = LocalDeployer(Path(scratch, "home"), port=0)
        try:
            deployer.start_challenger(built[0].path, "1", built[0].digest)
            deployer.promote(built[0].digest, None)
            begin = time.perf_counter()
            deployer.start_challenger(built[1].path, "2", built[1].digest)
            print(f"challenger ready after {time.perf_counter() - begin:.1f} s, beside an idle champion")
            measure(deployer, arguments.rate, "switch", lambda: deployer.promote(built[1].digest, built[0].digest))
            measure(deployer, arguments.rate, "rollback", deployer.rollback)
            deployer.stop()
            port = int(deployer.start().url.rpartition(":")[2])
            deployer.stop()
            deployer = LocalDeployer(Path(scratch, "home"), port=port)
            measure(deployer, arguments.rate, "restart", lambda: (deployer.stop(), deployer.start()))
        finally:
            deployer.stop()


def small_detector() -> Detector:
    """Of a simulated hour."""
    raw = simulate(SimulationSettings(minutes=60, scale=0.1, episodes=1))
    reports, _ = labels.derive(raw.assign(flow=identify(raw)))
    flows = collapse(reports)
    features = build("behaviour", reports, flows, {})
    splits = make_splits(flows, warm_up_seconds=features.manifest.warm_up_seconds, rotations=1)
    recipe = Recipe(labels="corrected", metric="accuracy", inner_folds=2, target_fpr=0.001, needs_effect=True, seed=0)
    return train(FAMILIES["effects"], features, flows, splits, recipe).detector


def measure(deployer: LocalDeployer, rate: int, name: str, act: Callable[[], object]) -> None:
    """Do something under load, and print what the load has seen."""
    with Load(deployer.endpoint(), rate, name.replace(" ", "")) as load:
        begin = time.perf_counter()
        act()
        seconds = time.perf_counter() - begin
    total = load.statuses.total()
    failed = total - load.statuses[200]
    other = {status: count for status, count in load.statuses.items() if status != 200}
    print(
        f"{name:9s} {seconds:5.1f} s  {total:6,} requests  {failed:5,} failed {other or ''}  "
        f"longest wait {1000 * load.longest:7,.0f} ms  answered but not seen {load.lost}"
    )


if __name__ == "__main__":
    main()
