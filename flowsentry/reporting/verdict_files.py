"""Verdicts of a batch as files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import duckdb
import pandas as pd
import pyarrow as pa

from flowsentry.serving.ocsf import findings

_ROWS: Final = 100_000
_TIME: Final = "%Y-%m-%dT%H:%M:%S.%gZ"
_LINE: Final = f"""
SELECT to_json({{
    'file': file, 'row': "row", 'flow_id': flow_id, 'label': label, 'anomaly_score': anomaly_score,
    'threshold': threshold, 'anomaly_type': anomaly_type, 'baseline_window': baseline_window, 'warm': warm,
    'first_alarm': strftime(first_alarm, '{_TIME}'), 'model_version': model_version, 'view_version': view_version,
    'reasons': coalesce(reasons, '[]')::JSON
}}) FROM judged
"""


def write_ndjson(verdicts: pd.DataFrame, path: Path) -> None:
    """One line per report: a verdict of the service (docs/verdicts.md) with `file` and `row` in place of `index`.

    Args:
        verdicts: of `verdict_summary.verdict_table`.
        path: overwritten.
    """
    # DuckDB would want an extension for times with a zone.
    clock = verdicts["first_alarm"].dt.tz_localize(None)
    table = pa.Table.from_pandas(verdicts.assign(first_alarm=clock), preserve_index=False)
    with (
        duckdb.connect(config={"autoinstall_known_extensions": "false", "enable_external_access": "false"}) as db,
        path.open("w", encoding="utf-8") as file,
    ):
        db.register("judged", table)
        for batch in db.sql(_LINE).to_arrow_reader(_ROWS):
            file.writelines(f"{line}\n" for line in batch.column(0).to_pylist())


def write_findings(verdicts: pd.DataFrame, reports: pd.DataFrame, path: Path) -> None:
    """One OCSF Detection Finding per malicious report, for a SIEM (docs/verdicts.md).

    Args:
        verdicts: of `verdict_summary.verdict_table`.
        reports: the same reports.
        path: overwritten.
    """
    with path.open("wb") as file:
        file.writelines(findings(verdicts, reports))
