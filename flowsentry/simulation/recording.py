"""A simulated recording, as the canonical table of reports."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd

from flowsentry.flows.schema import BENIGN, MALICIOUS, conform
from flowsentry.simulation import meter
from flowsentry.simulation.exchanges import TCP, join
from flowsentry.simulation.exchanges.attacks import assaults
from flowsentry.simulation.exchanges.benign import everyday
from flowsentry.simulation.exchanges.episodes import episode_names
from flowsentry.simulation.exchanges.hard_negatives import trouble
from flowsentry.simulation.flows import ROLES, pass_wires
from flowsentry.simulation.randomness import randomness
from flowsentry.simulation.settings import GROUPS, HARD_NEGATIVES, SimulationSettings
from flowsentry.simulation.world import SECOND, Integers, build

RECORDING: Final = "simulate"
FIRST_DAY: Final = pd.Timestamp("2024-01-01T08:00:00Z")
REPLY_SHARE: Final = 0.01
SWAPPED_SHARE: Final = 0.03


def simulate(settings: SimulationSettings) -> pd.DataFrame:
    """Simulate a recording.

    Args:
        settings: equal settings give equal tables, on every machine.

    Returns:
        Reports in arrival order in the canonical schema, with truth; nothing is `corrected` or given a `flow`.
    """
    end = settings.minutes * 60 * SECOND
    world = build(settings.minutes, randomness(settings.seed, "world"))
    usual = everyday(settings, world, randomness(settings.seed, "everyday"))
    benign = trouble(settings, world, usual)
    exchanges = join([benign, assaults(settings, world)])
    wires = randomness(settings.seed, "wires")
    exchanges["replied"] |= wires.random(len(exchanges)) < REPLY_SHARE
    exchanges["swapped"] = wires.random(len(exchanges)) < SWAPPED_SHARE
    flows = pass_wires(world, exchanges, end, wires)
    reports = meter.observe(world, flows, end, randomness(settings.seed, "meter"))

    of = reports["position"].to_numpy()
    began = FIRST_DAY + pd.Timedelta(days=settings.seed % 365)
    start = flows["start"].to_numpy()[of]
    families = list(GROUPS)
    columns = {name: flows[name].to_numpy()[of] for name in flows}
    table = pd.DataFrame(
        {
            "recording": _named([RECORDING], np.zeros(len(of), np.int64)),
            "file": _named([RECORDING], np.zeros(len(of), np.int64)),
            "row": np.arange(1, len(of) + 1),
            "flow_id": np.array(meter.flow_ids(world, flows), object)[of],
            "final": reports["final"],
            "src_ip": _named(world.addresses, columns["src"]),
            "dst_ip": _named(world.addresses, columns["dst"]),
            "src_port": columns["src_port"],
            "dst_port": columns["dst_port"],
            "transport": _named(["tcp", "udp"], (columns["transport"] != TCP).astype(np.int64)),
            "bytes": reports["src_bytes"] + reports["dst_bytes"],
            "time": _moment(began, reports["time"].to_numpy()),
            "duration": reports["duration"],
            "label": _named([BENIGN, MALICIOUS], (columns["family"] >= 0).astype(np.int64)),
            "packets": reports["src_packets"] + reports["dst_packets"],
            "start": _moment(began, start),
            "end": _moment(began, start + reports["duration"].to_numpy() // 1_000),
            **{f"{side}_{unit}": reports[f"{side}_{unit}"] for side in ("src", "dst") for unit in ("bytes", "packets")},
            "src_workload": _named(world.workload_names, columns["src"]),
            "dst_workload": _named(world.workload_names, columns["dst"]),
            "family": _named(families, columns["family"]),
            "group": _named(list(GROUPS.values()), columns["family"]),
            "exchange": settings.seed * 2**32 + columns["exchange"],
            "episode": _named(episode_names(settings), columns["episode"]),
            "role": _named(ROLES, columns["role"]),
            "hard_negative": _named(HARD_NEGATIVES, columns["hard_negative"]),
        }
    )
    return conform(table)


def _moment(began: pd.Timestamp, microseconds: Integers) -> pd.Series:
    base = np.datetime64(began.tz_localize(None), "us")
    moments: pd.Series = pd.Series(base + microseconds.astype("timedelta64[us]")).dt.tz_localize("UTC")
    return moments


def _named(names: Sequence[str | None], numbers: Integers) -> pd.Categorical:
    """Categories of those names that occur, sorted; a negative number or a missing name is a missing value."""
    used = {names[number] for number in np.unique(numbers) if number >= 0}
    categories = sorted(name for name in used if name is not None)
    codes = [categories.index(name) if name in categories else -1 for name in names]
    chosen = np.array([*codes, -1])[numbers]
    return pd.Categorical.from_codes(chosen, categories=pd.Index(categories))  # type: ignore[arg-type]
