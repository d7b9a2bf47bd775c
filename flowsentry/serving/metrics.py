"""What the service counts, as Prometheus reads it.

Plain numbers that one event loop changes; prometheus_client only writes them out when they are asked for. Its own
counters would be files shared between processes here, because BentoML prepares for several workers.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from flowsentry.detector import Judged
from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.serving.streams import Streams

MEDIA_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
SCORES: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
"""Upper bounds of the score's histogram: -log10 of the share of benign flows that score as high."""
SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the latency's histogram."""
_FEW: Final = 16


class _Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self._array = np.array(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: np.ndarray) -> None:
        if len(values) <= _FEW:
            for value in values.tolist():
                self.add(value)
            return
        places = np.bincount(np.searchsorted(self._array, values), minlength=len(self.counts))
        self.counts = [a + b for a, b in zip(self.counts, places.tolist(), strict=True)]
        self.sum += float(values.sum())

    def buckets(self) -> list[tuple[str, float]]:
        total, cumulated = 0, []
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            cumulated.append((str(bound), float(total)))
        return cumulated


class Metrics:
    """Totals since the start."""

    def __init__(self, model_version: str, view: str, view_version: str, digest: str) -> None:
        self.flows = 0
        """Judged or rejected; not those sent again."""
        self.verdicts = {BENIGN: 0, MALICIOUS: 0}
        self.rejected: defaultdict[str, int] = defaultdict(int)
        """By reason; reasons are a fixed set of texts."""
        self.requests: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        """By method, path template and status."""
        self.scores = _Histogram(SCORES)
        self.latency = _Histogram(SECONDS)
        self._model = {"model_version": model_version, "view": view, "view_version": view_version, "digest": digest}
        self._begin = time.time()

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count a request; only those for verdicts are in the latency."""
        self.requests[method, path, status] += 1
        if path == "/v1/verdicts":
            self.latency.add(seconds)

    def judged(self, count: int, judged: Judged, rejected: Iterable[tuple[int, str]]) -> None:
        """Count the flows of an answered request, rejected ones included in `count`."""
        self.flows += count
        malicious = int(np.count_nonzero(judged.malicious))
        self.verdicts[MALICIOUS] += malicious
        self.verdicts[BENIGN] += len(judged.malicious) - malicious
        self.scores.add_all(judged.score)
        self.refused(rejected)

    def refused(self, rejected: Iterable[tuple[int, str]]) -> None:
        """Count rejected flows by reason."""
        for _, reason in rejected:
            self.rejected[reason] += 1

    def text(self, streams: Streams) -> bytes:
        """All of it in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(_Collector(self._families(streams)))
        return generate_latest(registry)

    def _families(self, streams: Streams) -> Iterator[Metric]:
        counters = streams.counters
        yield _counter("flows", "Flows taken, rejected ones too, resent ones not.", self.flows)
        verdicts = CounterMetricFamily("flowsentry_verdicts", "Verdicts.", labels=["label"])
        for label, count in self.verdicts.items():
            verdicts.add_metric([label], count)
        yield verdicts
        rejected = CounterMetricFamily("flowsentry_rejected_flows", "Flows that are no flows.", labels=["reason"])
        for reason, count in sorted(self.rejected.items()):
            rejected.add_metric([reason], count)
        yield rejected
        requests = CounterMetricFamily("flowsentry_requests", "Requests.", labels=["method", "path", "status"])
        for (method, path, status), count in sorted(self.requests.items()):
            requests.add_metric([method, path, str(status)], count)
        yield requests
        yield _histogram("score", "Anomaly scores of flows.", self.scores)
        yield _histogram("request_seconds", "From a request for verdicts to its answer.", self.latency)
        yield _counter("resent_flows", "Flows taken again without a verdict.", counters.resent_flows)
        yield _counter("repeated_requests", "Requests that got their first answer again.", counters.repeated_requests)
        yield _gauge("streams_open", "Streams in memory.", len(streams))
        yield _gauge("streams_bytes", "Memory of the streams.", streams.nbytes)
        yield _counter("streams_evicted", "Streams written and dropped to make room.", counters.evictions)
        yield _counter("streams_fenced", "Streams dropped because another service went on.", counters.fenced)
        yield _counter("checkpoints", "Checkpoints written.", counters.checkpoints)
        yield _counter("checkpoint_seconds", "Time spent on checkpoints.", counters.checkpoint_seconds)
        yield _counter("checkpoint_failures", "Checkpoints that could not be written.", counters.checkpoint_failures)
        yield _counter("checkpoints_set_aside", "Checkpoints that could not be used.", counters.set_aside)
        model = GaugeMetricFamily("flowsentry_model_info", "The model that answers.", labels=list(self._model))
        model.add_metric(list(self._model.values()), 1)
        yield model
        yield _gauge("start_time_seconds", "When the service started, since 1970.", self._begin)


class _Collector(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _counter(name: str, purpose: str, value: float) -> Metric:
    return CounterMetricFamily(f"flowsentry_{name}", purpose, value=value)


def _gauge(name: str, purpose: str, value: float) -> Metric:
    return GaugeMetricFamily(f"flowsentry_{name}", purpose, value=value)


def _histogram(name: str, purpose: str, histogram: _Histogram) -> Metric:
    return HistogramMetricFamily(f"flowsentry_{name}", purpose, buckets=histogram.buckets(), sum_value=histogram.sum)
