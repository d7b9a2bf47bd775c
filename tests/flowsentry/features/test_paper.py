from __future__ import annotations

import hashlib

import numpy as np
import pandas as pd
import pytest

from flowsentry.features import paper
from flowsentry.features.transform import Transform
from flowsentry.flows.reports import collapse, identify
from tests.flowsentry.tables import START, make_reports


def computed(*rows: dict[str, object]) -> pd.DataFrame:
    reports = make_reports(rows)
    return paper.compute(collapse(reports.assign(flow=identify(reports))))


def test_the_ten_columns_of_the_study_in_its_order() -> None:
    (row,) = computed(
        {"at": 25, "flow_id": "EQQA", "final": True, "src_ip": "10.0.0.1", "dst_ip": "192.168.1.9", "bytes": 123,
         "transport": "udp", "duration": 5_000_000_000, "src_port": 40000, "dst_port": 53}
    ).to_dict("records")  # fmt: skip
    assert row == {
        "flow_id": "EQQA",
        "final": 1.0,
        "src_ip": 10 * 2**24 + 1,
        "dst_ip": 192 * 2**24 + 168 * 2**16 + 256 + 9,
        "bytes": 123.0,
        "transport": "udp",
        "time": START.timestamp() + 25,
        "duration": 5e9,
        "dst_port": 53.0,
        "src_port": 40000.0,
    }
    assert list(row) == [feature.name for feature in paper.FEATURES]


def test_an_ipv6_address_is_64_bits_of_its_hash() -> None:
    (row,) = computed({"src_ip": "fe80::1"}).to_dict("records")
    assert row["src_ip"] == float(int(hashlib.sha256(b"fe80::1").hexdigest()[:16], 16))


def test_missing_ports_are_zero_and_a_missing_transport_ranks_before_all() -> None:
    rows = computed(
        {"transport": "icmp", "src_port": None, "dst_port": None, "flow_id": "a"},
        {"transport": None, "flow_id": "b"},
    )
    assert rows[["src_port", "dst_port"]].to_numpy()[0].tolist() == [0, 0]
    done = Transform.fit(rows.head(1), paper.FEATURES, "linear").apply(rows)
    place = [feature.name for feature in paper.FEATURES].index("transport")
    assert done[:, place].tolist() == [0, -1]
    assert np.isfinite(done).all()


def test_a_flow_is_its_last_report() -> None:
    flow = {"flow_id": "a"}
    rows = computed(
        {**flow, "at": 0, "bytes": 10, "duration": 1}, {"at": 5}, {**flow, "at": 10, "bytes": 20, "duration": 2}
    )
    assert rows["bytes"].tolist() == [20, 1000]
    assert rows["time"].tolist() == [START.timestamp() + 10, START.timestamp() + 5]


@pytest.mark.parametrize("feature", paper.FEATURES, ids=lambda feature: feature.name)
def test_every_column_is_described_and_claims_no_direction_of_harm(feature: paper.Feature) -> None:
    assert feature.description
    assert feature.harm == 0
    assert feature.minimum_effect is None
