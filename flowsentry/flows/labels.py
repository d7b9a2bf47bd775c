"""Families, groups, exchanges and corrected labels, where the source does not say them itself.

A source that knows the attacks (simulation) is believed, also where its label contradicts its family. The AssureMOSS
recording of February 2022 is recognised by its content and gets the rule set `FEBRUARY_RULES`. Any other recording gets
one family, `attack`. Rules are written for flows: every report of a flow gets the flow's value.

The rule set `february2022/1`. The published labels name no attack and have mistakes. The *victim* (destination of
malicious flows to the NodePort 31301), the *pod* (destination of malicious flows to 22: the same SSH server after
translation), the *node* (source of the latter) and the *shell hosts* (destinations of malicious flows to 4444 and 1337)
are found by content, never by address.

syn-flood (group flood)
    Malicious, to 31301, from a source none of whose flows to it passes 136 bytes. One source: 68 bytes (15,700
    flows) or 136 (1,166), never answered, four batches.
ssh-attack (group brute-force)
    Malicious, to 31301 from any other source, or to 22: the same connections before and after translation, 95% with
    equal bytes and duration in the same tick. *Corrected, 764*: victim:31301 to such a source and pod:22 to the
    node: replies that the meter saw first; there is no such flow outside the attack.
refused-callback (group shell)
    Malicious, to 4444: a SYN and a RST, each seen before and after translation.
second-shell (group shell)
    Malicious, to 1337. *Corrected, 13*: to 1337 of the same hosts, the view before translation, same tick and bytes.
    *Corrected, 2*: from port 1337 of a shell host, the shell that worked at last, seen in reverse.
staging (group shell)
    *Corrected, 4*: to port 8081 of a host of 4444, from a client of that callback, before the first callback.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flowsentry.flows import exchanges
from flowsentry.flows.schema import MALICIOUS, is_malicious

SOURCE: Final = "source"
"""The source says the truth itself."""
FEBRUARY_RULES: Final = "february2022/1"
GENERIC_RULES: Final = "attack/1"
UNLABELLED: Final = "unlabelled"

GENERIC_FAMILY: Final = "attack"
FEBRUARY_GROUPS: Final = {
    "syn-flood": "flood",
    "ssh-attack": "brute-force",
    "refused-callback": "shell",
    "second-shell": "shell",
    "staging": "shell",
}
FEBRUARY_CORRECTIONS: Final = {"ssh replies": 764, "shell twins": 13, "reversed shell": 2, "staging": 4}
"""Flows of the whole recording that each correction makes malicious."""

_NODE_PORT, _SSH, _CALLBACK, _SECOND_SHELL, _STAGING = 31301, 22, 4444, 1337, 8081
_UNANSWERED_BYTES: Final = 136
_FEBRUARY_FROM: Final = pd.Timestamp("2022-02-25T12:00:00Z")
_FEBRUARY_UNTIL: Final = pd.Timestamp("2022-02-25T14:30:00Z")
_FEBRUARY_SERVICES: Final = (8500, 9099, 53)
"""Ports of the recording's busiest benign services: the probe endpoint, the node agent, DNS."""

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class RecordingLabels:
    """What is known about the labels of one recording, in flows."""

    recording: str
    rules: str
    """`source`, `february2022/1`, `attack/1` or `unlabelled`."""
    exchange_rule: str
    """`source` or the version of the rule that found the exchanges."""
    flows: int
    exchanges: int
    largest_exchange: int
    """Flows of the largest exchange."""
    malicious: int
    """As published."""
    corrected_malicious: int
    families: dict[str, int]
    """Malicious flows, corrected, per family."""
    corrections: dict[str, int]
    """Flows whose label was changed, per correction."""


@dataclass(frozen=True)
class LabelReport:
    """How families, exchanges and corrected labels were obtained, per recording."""

    recordings: tuple[RecordingLabels, ...]

    @property
    def versions(self) -> dict[str, str]:
        """Rule versions per recording, for lineage: `{"february": "february2022/1 exchanges/1"}`."""
        return {r.recording: f"{r.rules} {r.exchange_rule}" for r in self.recordings}

    def as_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"recordings": [asdict(r) for r in self.recordings]}


def derive(reports: pd.DataFrame) -> tuple[pd.DataFrame, LabelReport]:
    """Add the columns family, group, exchange and corrected.

    Args:
        reports: canonical reports with a `flow` column, any number of recordings.

    Returns:
        The reports with those columns added or set, same rows in the same order, and how they were obtained.

    Raises:
        KeyError: there is no `flow` column.
    """
    flow_code, numbers = pd.factorize(reports["flow"])
    flows = _last_reports(reports, flow_code, len(numbers))
    names: list[str] = list(dict.fromkeys(flows["recording"].astype(str)))
    derived = []
    numbered_so_far: set[int] = set()
    for name in names:
        part = flows.loc[flows["recording"].astype(str) == name]
        truth, labels = _derive_recording(name, part)
        truth["exchange"] = _distinct(truth["exchange"].to_numpy(np.int64), numbered_so_far)
        derived.append((truth, labels))
    if not derived:
        return reports.assign(**{n: pd.Series(dtype=d) for n, d in _DTYPES.items()}), LabelReport(())
    truth = pd.concat([t for t, _ in derived]).sort_index()
    values = {
        column: truth[column].astype(dtype).take(flow_code).set_axis(reports.index) for column, dtype in _DTYPES.items()
    }
    return reports.assign(**values), LabelReport(tuple(labels for _, labels in derived))


_DTYPES: Final[dict[str, Any]] = {
    "family": "category",
    "group": "category",
    "exchange": "int64",
    "corrected": "category",
}


def _last_reports(reports: pd.DataFrame, flow_code: NDArray[np.int64], count: int) -> pd.DataFrame:
    """One row per flow, its last report; malicious if any of its reports is."""
    last = np.zeros(count, np.int64)
    last[flow_code] = np.arange(len(reports))
    flows = reports.iloc[last].reset_index(drop=True)
    malicious = np.bincount(flow_code, weights=is_malicious(reports["label"]), minlength=count) > 0
    label = flows["label"].astype(object).mask(malicious, MALICIOUS)
    return flows.assign(label=label)


def _derive_recording(name: str, flows: pd.DataFrame) -> tuple[pd.DataFrame, RecordingLabels]:
    published = is_malicious(flows["label"])
    malicious = published
    corrections: dict[str, int] = {}
    knows_exchanges = "exchange" in flows and bool((flows["exchange"].fillna(-1) >= 0).all())
    knows_families = "family" in flows and (knows_exchanges or bool(flows["family"].notna().any()))
    if knows_families:
        rules = SOURCE
        malicious = published | flows["family"].notna().to_numpy(bool)
        if (malicious & ~published).any():
            corrections = {"source": int((malicious & ~published).sum())}
        family = flows["family"].astype(object).mask(malicious & flows["family"].isna(), GENERIC_FAMILY)
        group = family
        if "group" in flows:
            group = flows["group"].astype(object).where(flows["group"].notna(), family).where(malicious)
    elif flows["label"].isna().all():
        rules = UNLABELLED
        family = group = pd.Series(None, index=flows.index, dtype=object)
    elif is_february_2022(flows):
        rules = FEBRUARY_RULES
        family, corrected = _february_2022(flows)
        corrections = {what: int(rows.sum()) for what, rows in corrected.items()}
        malicious = published | np.logical_or.reduce(list(corrected.values()))
        group = family.map(FEBRUARY_GROUPS)
    else:
        rules = GENERIC_RULES
        family = group = pd.Series(None, index=flows.index, dtype=object).mask(malicious, GENERIC_FAMILY)
    exchange = flows["exchange"].to_numpy(np.int64) if knows_exchanges else exchanges.find(flows)
    truth = pd.DataFrame(
        {
            "family": family,
            "group": group,
            "exchange": exchange,
            "corrected": flows["label"].astype(object).mask(malicious, MALICIOUS),
        },
        index=flows.index,
    )
    sizes = np.unique(exchange, return_counts=True)[1]
    labels = RecordingLabels(
        recording=name,
        rules=rules,
        exchange_rule=SOURCE if knows_exchanges else exchanges.EXCHANGE_RULE,
        flows=len(flows),
        exchanges=sizes.size,
        largest_exchange=int(sizes.max()),
        malicious=int(published.sum()),
        corrected_malicious=int(malicious.sum()),
        families={str(f): int(n) for f, n in family.value_counts().items()},
        corrections=corrections,
    )
    return truth, labels


def _distinct(exchange: NDArray[np.int64], taken: set[int]) -> NDArray[np.int64]:
    """Shift the exchange numbers of a recording if an earlier recording has one of them."""
    numbers = set(np.unique(exchange).tolist())
    if taken and min(numbers) <= max(taken):
        shift = max(taken) + 1 - min(numbers)
        exchange = exchange + shift
        numbers = {max(numbers) + shift}
    taken.add(max(numbers))
    return exchange


def is_february_2022(flows: pd.DataFrame) -> bool:
    """Whether flows (or reports) of one recording are from the AssureMOSS recording of February 2022.

    By content: all of that afternoon (12:00 to 14:30 UTC), the probe endpoint, the node agent and DNS among the
    services of benign flows, and malicious flows to 31301, 22 and 4444, to no port but these and 1337.
    """
    if flows.empty or flows["time"].min() < _FEBRUARY_FROM or flows["time"].max() > _FEBRUARY_UNTIL:
        return False
    malicious = is_malicious(flows["label"])
    attacked = set(flows["dst_port"][malicious].dropna().unique())
    used = set(flows["dst_port"][~malicious].dropna().unique())
    needed = {_NODE_PORT, _SSH, _CALLBACK}
    return needed <= attacked <= needed | {_SECOND_SHELL} and set(_FEBRUARY_SERVICES) <= used


def _february_2022(flows: pd.DataFrame) -> tuple[pd.Series, dict[str, Bools]]:
    """Family per flow (missing for benign) and, per correction, which flows it makes malicious."""
    malicious = is_malicious(flows["label"])
    source, destination = flows["src_ip"].astype(str), flows["dst_ip"].astype(str)
    from_port, to_port = flows["src_port"].fillna(-1), flows["dst_port"].fillna(-1)

    def attack_on(port: int) -> Bools:
        return malicious & to_port.eq(port).to_numpy(bool)

    host_side, pod_side = attack_on(_NODE_PORT), attack_on(_SSH)
    callback, second_shell = attack_on(_CALLBACK), attack_on(_SECOND_SHELL)
    answered = set(source[host_side & flows["bytes"].gt(_UNANSWERED_BYTES).to_numpy(bool)])
    ssh_host_side = host_side & source.isin(answered).to_numpy(bool)
    shell_hosts = set(destination[callback | second_shell])
    first_callback = flows["time"][callback].min()

    def benign(*conditions: pd.Series) -> Bools:
        return np.asarray(np.logical_and.reduce([~malicious, *(c.to_numpy(bool) for c in conditions)]))

    corrections = {
        "ssh replies": benign(
            from_port.eq(_NODE_PORT), source.isin(set(destination[host_side])), destination.isin(answered)
        )
        | benign(
            from_port.eq(_SSH),
            source.isin(set(destination[pod_side])),
            destination.isin(set(source[pod_side])),
        ),
        "shell twins": benign(to_port.eq(_SECOND_SHELL), destination.isin(shell_hosts)),
        "reversed shell": benign(from_port.eq(_SECOND_SHELL), source.isin(shell_hosts)),
        "staging": benign(
            to_port.eq(_STAGING),
            destination.isin(set(destination[callback])),
            source.isin(set(source[callback])),
            flows["time"].lt(first_callback),
        ),
    }
    family = pd.Series(None, index=flows.index, dtype=object)
    family[host_side & ~ssh_host_side] = "syn-flood"
    family[ssh_host_side | pod_side | corrections["ssh replies"]] = "ssh-attack"
    family[callback] = "refused-callback"
    family[second_shell | corrections["shell twins"] | corrections["reversed shell"]] = "second-shell"
    family[corrections["staging"]] = "staging"
    return family, corrections
