"""Simulated daily life against figures of the benign flows of the real recording, service by service."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from flowsentry.flows.reports import identify
from flowsentry.simulation import SimulationSettings, simulate

MINUTES = 150
FIGURES = {  # port: flows per minute, median bytes
    8500: (41, 421),
    9099: (36, 204),
    53: (32, 547),
    80: (16, 4_000),
    3306: (9.8, 69_000),
    6379: (7.8, 1_176),
    9500: (6.0, 424),
    443: (6.0, 4_600),
    5601: (5.6, 114_000),
    10250: (1.7, 192_000),
    22: (0.7, 10_500),
}
MEDIAN_MILLISECONDS = {8500: 0.13, 53: 0.2, 3306: 303, 6379: 0.58, 9500: 0.12, 443: 2.0, 5601: 55, 80: 4_290}


@pytest.fixture(scope="module")
def benign() -> pd.DataFrame:
    tables = []
    for seed in (1, 2):
        settings = SimulationSettings(seed=seed, minutes=MINUTES, scale=1.0, attacks=(), hard_negatives=())
        reports = simulate(settings)
        flows = reports.assign(number=identify(reports)).groupby("number").tail(1)
        tables.append(flows[flows["role"].ne("reply")])
    flows = pd.concat(tables)
    port = flows["dst_port"].where(flows["dst_port"].isin(FIGURES), flows["src_port"])
    return flows.assign(service=port, minutes=2 * MINUTES)


@pytest.mark.parametrize("port", FIGURES)
def test_a_service_has_its_rate_and_size(benign: pd.DataFrame, port: int) -> None:
    flows = benign[benign["service"].eq(port)]
    per_minute, size = FIGURES[port]
    assert len(flows) / (2 * MINUTES) == pytest.approx(per_minute, rel=0.3)
    assert flows["bytes"].median() == pytest.approx(size, rel=0.25)


@pytest.mark.parametrize("port", MEDIAN_MILLISECONDS)
def test_a_service_has_its_duration(benign: pd.DataFrame, port: int) -> None:
    flows = benign[benign["service"].eq(port)]
    assert flows["duration"].median() / 1e6 == pytest.approx(MEDIAN_MILLISECONDS[port], rel=0.3)


def test_the_whole_has_its_shape(benign: pd.DataFrame) -> None:
    benign = benign[benign["service"].isin(FIGURES)]
    assert benign["transport"].eq("udp").mean() == pytest.approx(0.191, abs=0.03)
    quantiles = benign["bytes"].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).to_numpy()
    assert np.abs(np.log(quantiles / [172, 421, 547, 1_580, 118_000])).max() < 0.5
    assert len(benign) / (2 * MINUTES) == pytest.approx(168, rel=0.15)
    refused_probes = benign["src_ip"].eq("::") & benign["bytes"].eq(172)
    assert refused_probes.mean() == pytest.approx(1_967 / 18_385, abs=0.02)


def test_busy_services_come_in_bursts_and_probes_do_not(benign: pd.DataFrame) -> None:
    first = benign[benign["exchange"] < benign["exchange"].median()]
    minute = ((first["start"] - first["start"].min()).dt.total_seconds() // 60).astype(int)

    def dispersion(port: int) -> float:
        counts = minute[first["service"].eq(port)].value_counts().reindex(range(MINUTES), fill_value=0)
        return float(counts.var() / counts.mean())

    assert dispersion(53) > 10
    assert dispersion(80) > 5
    assert dispersion(9500) < 1.5


def test_new_edges_keep_appearing(benign: pd.DataFrame) -> None:
    first = benign[benign["exchange"] < benign["exchange"].median()]
    seen = first.drop_duplicates(["src_ip", "dst_ip", "service"])["start"]
    later = (seen - first["start"].min()).dt.total_seconds() > 30 * 60
    assert later.sum() / (MINUTES - 30) > 0.5
