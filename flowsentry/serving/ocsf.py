"""Verdicts as OCSF Detection Findings (class 2004) for a SIEM, one JSON object per line.

Written for version 1.3.0 of the Open Cybersecurity Schema Framework, https://schema.ocsf.io; every attribute used is
there since 1.1.0, when the class came. What has no place in the schema is below `unmapped`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Final

import orjson
import pandas as pd

from flowsentry import __version__
from flowsentry.flows.columns import TRANSPORT_NUMBERS
from flowsentry.flows.schema import MALICIOUS

VERSION: Final = "1.3.0"
CATEGORY, CLASS = 2, 2004
CREATE, UPDATE = 1, 2
INFORMATIONAL, LOW, MEDIUM, HIGH = 1, 2, 3, 4
SEVERITIES: Final = {INFORMATIONAL: "Informational", LOW: "Low", MEDIUM: "Medium", HIGH: "High"}
_ACTIVITIES: Final = {CREATE: "Create", UPDATE: "Update"}


def severity(score: float, threshold: float, warm: bool) -> int:
    """OCSF severity_id of a malicious verdict.

    A score is -log10 of how rare a flow is among benign ones, so one more is ten times rarer. Less than ten times
    rarer than the threshold is low, from a thousand times on it is high. Never critical: a flow does not tell what is
    at stake. While the stream is not warm it is informational.
    """
    if not warm:
        return INFORMATIONAL
    beyond = score - threshold
    return LOW if beyond < 1 else MEDIUM if beyond < 3 else HIGH


def findings(verdicts: pd.DataFrame, flows: pd.DataFrame) -> Iterator[bytes]:
    """Findings of the malicious verdicts, in their order, each a line with its end.

    A flow's first malicious report creates its finding, later ones update it under the same `finding_info.uid`.

    Args:
        verdicts: with the columns of a verdict of the service: anomaly_score, threshold, label, anomaly_type,
            baseline_window, warm, first_alarm, model_version, view_version, reasons (a list, or its JSON text).
        flows: the canonical reports that they are of, row by row.
    """
    known: set[str] = set()
    chosen = (verdicts["label"] == MALICIOUS).to_numpy()
    rows = flows.loc[chosen, [name for name in _FLOW_COLUMNS if name in flows]]
    for verdict, values in zip(verdicts[chosen].to_dict("records"), rows.to_dict("records"), strict=True):
        flow = {name: None if pd.isna(value) else value for name, value in values.items()}
        finding = _finding(verdict, flow)
        uid = finding["finding_info"]["uid"]
        activity = UPDATE if uid in known else CREATE
        known.add(uid)
        finding |= {
            "activity_id": activity,
            "activity_name": _ACTIVITIES[activity],
            "type_uid": CLASS * 100 + activity,
            "type_name": f"Detection Finding: {_ACTIVITIES[activity]}",
        }
        yield orjson.dumps(finding, option=orjson.OPT_APPEND_NEWLINE)


_FLOW_COLUMNS: Final = (
    *("flow_id", "src_ip", "dst_ip", "src_port", "dst_port", "transport", "bytes", "packets", "duration", "time"),
)


def _finding(verdict: Mapping[Hashable, Any], flow: Mapping[Hashable, Any]) -> dict[str, Any]:
    time = pd.Timestamp(flow["time"])
    alarm = _milliseconds(pd.Timestamp(verdict["first_alarm"]))
    given = verdict["reasons"]
    reasons = orjson.loads(given) if isinstance(given, str) else given
    level = severity(verdict["anomaly_score"], verdict["threshold"], verdict["warm"])
    ends = " to ".join(_shown(flow[f"{end}_ip"], flow[f"{end}_port"]) for end in ("src", "dst"))
    transport = flow["transport"]
    return {
        "category_uid": CATEGORY,
        "category_name": "Findings",
        "class_uid": CLASS,
        "class_name": "Detection Finding",
        "severity_id": level,
        "severity": SEVERITIES[level],
        "status_id": 1,
        "status": "New",
        "time": alarm,
        "start_time": _milliseconds(time - pd.Timedelta(int(flow["duration"]), "ns")),
        "end_time": _milliseconds(time),
        "message": f"{verdict['anomaly_type']}: {transport or 'flow'} from {ends}",
        "metadata": {
            "version": VERSION,
            "product": {"name": "FlowSentry", "vendor_name": "FlowSentry", "version": __version__},
        },
        "finding_info": {
            "uid": f"{flow['flow_id']}@{alarm}",
            "title": f"Malicious network flow: {verdict['anomaly_type']}",
            "desc": "; ".join(reason["text"] for reason in reasons),
            "types": [verdict["anomaly_type"]],
            "created_time": alarm,
            "first_seen_time": alarm,
            "last_seen_time": _milliseconds(time),
            "analytic": {
                "type_id": 4,
                "type": "Learning (ML/DL)",
                "name": "FlowSentry",
                "version": str(verdict["model_version"]),
            },
            "data_sources": ["network flows"],
        },
        "evidences": [
            {
                "src_endpoint": _endpoint(flow["src_ip"], flow["src_port"]),
                "dst_endpoint": _endpoint(flow["dst_ip"], flow["dst_port"]),
                "connection_info": {
                    "uid": flow["flow_id"],
                    "direction_id": 0,
                    "direction": "Unknown",
                    "protocol_ver_id": 6 if ":" in flow["src_ip"] else 4,
                    **({"protocol_name": transport} if transport else {}),
                    **({"protocol_num": TRANSPORT_NUMBERS[transport]} if transport in TRANSPORT_NUMBERS else {}),
                },
                "data": {
                    name: int(flow[name]) for name in ("bytes", "packets", "duration") if flow.get(name) is not None
                },
            }
        ],
        "unmapped": {
            "anomaly_score": verdict["anomaly_score"],
            "threshold": verdict["threshold"],
            "anomaly_type": verdict["anomaly_type"],
            "baseline_window": verdict["baseline_window"],
            "warm": bool(verdict["warm"]),
            "view_version": str(verdict["view_version"]),
            "reasons": reasons,
        },
    }


def _milliseconds(time: pd.Timestamp) -> int:
    return int(time.value // 1_000_000)


def _endpoint(address: str, port: int | None) -> dict[str, Any]:
    return {"ip": address} if port is None else {"ip": address, "port": int(port)}


def _shown(address: str, port: int | None) -> str:
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
