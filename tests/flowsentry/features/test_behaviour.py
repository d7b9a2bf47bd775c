from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from flowsentry.features import behaviour, kernel

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small


def other_addresses(reports: pd.DataFrame) -> pd.DataFrame:
    """Every address another one of the same kind, ranks turned round."""

    def renamed(address: str) -> str:
        if ":" in address:
            return str(ipaddress.IPv6Address(2**128 - 1 - int(ipaddress.IPv6Address(address))))
        return str(ipaddress.IPv4Address(2**32 - 1 - int(ipaddress.IPv4Address(address))))

    return reports.assign(
        **{name: reports[name].cat.rename_categories(renamed) for name in ("src_ip", "dst_ip")},
    )


def other_ports(reports: pd.DataFrame) -> pd.DataFrame:
    """Every port another one, on its own side of the first port of clients."""
    boundary = kernel.EPHEMERAL_PORT

    def moved(ports: pd.Series) -> pd.Series:
        low = boundary - 1 - ports
        high = boundary + 65535 - ports
        return low.where(ports < boundary, high).astype("Int32")

    return reports.assign(src_port=moved(reports["src_port"]), dst_port=moved(reports["dst_port"]))


def other_ids(reports: pd.DataFrame) -> pd.DataFrame:
    ids = pd.Series([identity[::-1] + "x" for identity in reports["flow_id"]], index=reports.index)
    return reports.assign(flow_id=ids.astype("string[pyarrow]"))


def later(**by: int) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def shifted(reports: pd.DataFrame) -> pd.DataFrame:
        times = [name for name in ("time", "start", "end") if name in reports]
        return reports.assign(**{name: reports[name] + pd.Timedelta(**by) for name in times})

    return shifted


def without_truth(reports: pd.DataFrame) -> pd.DataFrame:
    truth = ["family", "group", "exchange", "episode", "role", "hard_negative"]
    return reports.drop(columns=truth).assign(label=pd.Categorical([None] * len(reports)))


def other_names(reports: pd.DataFrame) -> pd.DataFrame:
    recording = reports["recording"].cat.rename_categories(lambda name: f"z-{name}")
    return reports.assign(recording=recording, file=recording, row=reports["row"] + 10**6)


@pytest.mark.parametrize(
    "change",
    [
        other_addresses,
        other_ports,
        other_ids,
        other_names,
        without_truth,
        later(seconds=10),
        later(seconds=7 * 10),
        later(days=400),
    ],
    ids=["addresses", "ports", "ids", "names", "truth", "a tick", "seven ticks", "days"],
)
def test_no_value_knows_who_or_when(small: Small, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    changed = change(small.raw)
    assert not changed.equals(small.raw)
    before, reversed_before = behaviour.compute(small.raw)
    after, reversed_after = behaviour.compute(changed)
    assert after.to_numpy().tobytes() == before.to_numpy().tobytes()
    assert (reversed_after == reversed_before).all()


def test_the_renamings_keep_different_things_different(small: Small) -> None:
    for change, columns in ((other_addresses, ["src_ip", "dst_ip"]), (other_ports, ["src_port", "dst_port"])):
        for column in columns:
            changed = change(small.raw)[column]
            assert changed.nunique() == small.raw[column].nunique()
            assert (changed.dropna().astype(str) != small.raw[column].dropna().astype(str)).all()


def test_the_columns_are_the_kernels_in_its_order(small: Small) -> None:
    values, _ = behaviour.compute(small.raw)
    assert tuple(feature.name for feature in behaviour.FEATURES) == kernel.FEATURES == tuple(values.columns)
    assert (values.dtypes == np.float32).all()
    assert values.index.equals(small.raw.index)


@pytest.mark.parametrize("feature", behaviour.FEATURES, ids=lambda feature: feature.name)
def test_every_feature_says_what_it_is_and_which_direction_is_harmful(feature: behaviour.Feature) -> None:
    assert re.fullmatch(r"[^.\n]{10,}", feature.description)
    assert feature.harm in (-1, 1)
    assert feature.kind == "flag" or feature.unit
    assert feature.kind != "category"


def test_what_is_kept_from_the_baseline_may_also_be_flagged() -> None:
    effects = {feature.name: feature.minimum_effect for feature in behaviour.FEATURES}
    for number, limit in kernel.MARKS:
        assert effects[kernel.FEATURES[number]] == limit


def test_values_are_finite_and_never_negative_and_flags_are_0_or_1(small: Small) -> None:
    values, _ = behaviour.compute(small.raw)
    assert np.isfinite(values.to_numpy()).all()
    assert (values >= 0).all(axis=None)
    for feature in behaviour.FEATURES:
        if feature.kind == "flag":
            assert set(values[feature.name].unique()) == {0, 1}


def test_recordings_are_streams_of_their_own_even_if_mixed(small: Small) -> None:
    alone, _ = behaviour.compute(small.raw)
    other = small.raw.assign(recording=pd.Categorical(["other"] * len(small.raw)))
    both = pd.concat([small.raw, other]).sort_index(kind="stable").reset_index(drop=True)
    values, _ = behaviour.compute(both.astype({"recording": "category"}))
    assert values.iloc[::2].to_numpy().tobytes() == alone.to_numpy().tobytes()
    assert values.iloc[1::2].to_numpy().tobytes() == alone.to_numpy().tobytes()


def test_no_report_gives_no_row(small: Small) -> None:
    values, is_reversed = behaviour.compute(small.raw.head(0))
    assert values.shape == (0, len(behaviour.FEATURES))
    assert is_reversed.shape == (0,)
