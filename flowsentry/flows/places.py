"""Where benign flows happen, as seen from the attacks: the false positive rate differs by place.

A victim's counters make its benign flows look guilty, an attack window loads the meters, and benign trouble looks like
an attack; one rate over all benign flows hides each of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flowsentry.flows.schema import BENIGN, is_malicious

HARD_NEGATIVE: Final = "hard negative"
VICTIM: Final = "victim"
ATTACK_WINDOW: Final = "attack window"
ELSEWHERE: Final = "elsewhere"
PLACES: Final = (HARD_NEGATIVE, VICTIM, ATTACK_WINDOW, ELSEWHERE)

WINDOW_MARGIN_SECONDS: Final = 60
"""Added on both sides of a family's flows where the source knows no episodes."""
QUIET_SECONDS: Final = 600
"""A family silent for longer, where the source knows no episodes, is between two attack windows."""
_MICROSECONDS: Final = 1_000_000

Bools = NDArray[np.bool_]


def places(flows: pd.DataFrame) -> pd.Series:
    """The place of every benign flow (corrected label); the first that fits of:

    - `hard negative`: the source says that it is benign trouble;
    - `victim`: it touches, at any time of the recording, a *service endpoint* (address, port) of malicious flows of the
      recording: their destination, or of a reversed flow the source, whichever is in more malicious flows;
    - `attack window`: its recording was under attack when it was reported. A window is the span of an episode's
      malicious flows, first to last; without episodes that of a family's flows while none is `QUIET_SECONDS` from the
      next, and `WINDOW_MARGIN_SECONDS` around it;
    - `elsewhere`.

    Args:
        flows: flow table with recording, src_ip, dst_ip, src_port, dst_port, time and label; corrected, family,
            episode, hard_negative and first_time where known.

    Returns:
        Category series of `PLACES`, same index; missing for malicious flows and those without a label.
    """
    corrected = flows["corrected"] if "corrected" in flows else flows["label"]
    malicious = is_malicious(corrected)
    found = np.full(len(flows), ELSEWHERE, object)
    found[_in_attack_window(flows, malicious)] = ATTACK_WINDOW
    found[_at_victim(flows, malicious)] = VICTIM
    if "hard_negative" in flows:
        found[flows["hard_negative"].notna().to_numpy(bool)] = HARD_NEGATIVE
    found[~corrected.eq(BENIGN).fillna(False).to_numpy(bool)] = None
    return pd.Series(pd.Categorical(found, categories=list(PLACES)), index=flows.index, name="place")


def _at_victim(flows: pd.DataFrame, malicious: Bools) -> Bools:
    count = len(flows)
    keys = [np.tile(pd.factorize(flows["recording"])[0], 2)]
    keys.append(pd.factorize(pd.concat([flows["src_ip"].astype(str), flows["dst_ip"].astype(str)]))[0])
    keys.append(pd.concat([flows["src_port"], flows["dst_port"]]).fillna(-1).to_numpy(np.int64))
    endpoint = pd.DataFrame(dict(enumerate(keys))).groupby([0, 1, 2], sort=False).ngroup().to_numpy()
    source, destination = endpoint[:count], endpoint[count:]
    popularity = np.bincount(np.concatenate([source[malicious], destination[malicious]]), minlength=2 * count + 1)
    reversed_ = popularity[source] > popularity[destination]
    victims = np.unique(np.where(reversed_, source, destination)[malicious])
    return np.asarray(np.isin(source, victims) | np.isin(destination, victims))


def _in_attack_window(flows: pd.DataFrame, malicious: Bools) -> Bools:
    time = flows["time"].dt.as_unit("us").astype("int64").to_numpy()
    first = flows["first_time"].dt.as_unit("us").astype("int64").to_numpy() if "first_time" in flows else time
    recording = flows["recording"].astype(str).to_numpy(object)
    inside = np.zeros(len(flows), bool)
    for name in pd.unique(recording[malicious]):
        here = recording == name
        for begin, end in _windows(flows[here & malicious], first[here & malicious], time[here & malicious]):
            inside |= here & (first <= end) & (time >= begin)
    return inside


def _windows(attacks: pd.DataFrame, first: NDArray[np.int64], last: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Begin and end (us) of the attack windows of one recording."""
    spans = pd.DataFrame({"first": first, "last": last})
    if "episode" in attacks and attacks["episode"].notna().any():
        ends = spans.groupby(attacks["episode"].astype(object).to_numpy()).agg({"first": "min", "last": "max"})
        return [(int(begin), int(end)) for begin, end in ends.to_numpy()]
    family = attacks["family"].astype(object).fillna("").to_numpy() if "family" in attacks else np.zeros(len(attacks))
    margin = WINDOW_MARGIN_SECONDS * _MICROSECONDS
    windows = []
    for _, of_family in spans.groupby(family):
        span = of_family.sort_values("first")
        new = span["first"] - span["last"].cummax().shift() > QUIET_SECONDS * _MICROSECONDS
        ends = span.groupby(new.cumsum()).agg({"first": "min", "last": "max"})
        windows += [(int(begin) - margin, int(end) + margin) for begin, end in ends.to_numpy()]
    return windows
