"""Step validate: good reports go on with their flows and labels told, bad rows go to quarantine with their reason."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from zenml import log_metadata, save_artifact, step
from zenml.types import HTMLString

from flowsentry.flows import expectations, labels
from flowsentry.flows.reports import identify
from materializers import TableMaterializer


@step(output_materializers={"valid_reports": TableMaterializer, "quarantine": TableMaterializer})
def validate(
    reports: pd.DataFrame, unreadable_rows: pd.DataFrame, max_quarantine_share: float
) -> tuple[
    Annotated[pd.DataFrame, "valid_reports"],
    Annotated[pd.DataFrame, "quarantine"],
    Annotated[dict[str, str], "rules"],
    Annotated[dict[str, int], "rows"],
    Annotated[HTMLString, "validation_page"],
]:
    """Check every report, number the flows, and derive families, exchanges and corrected labels.

    Args:
        reports: canonical reports.
        unreadable_rows: rows that the source could not read: file, row, reason, raw.
        max_quarantine_share: highest share of bad rows, 0..1; above it the run fails.

    Returns:
        Valid reports with `flow` and truth columns; the quarantine; versions of the label rules by recording; the
        account of rows (read = flows + merged reports + quarantined); Great Expectations' result page.
    """
    rows_read = len(reports) + len(unreadable_rows)
    try:
        checked = expectations.validate(
            reports,
            quarantined_at_load=unreadable_rows,
            rows_read=rows_read,
            max_quarantine_share=max_quarantine_share,
        )
    except expectations.TooManyBadRows as error:
        # A failed step has no outputs; the bad rows must not be lost with it.
        save_artifact(error.validated.quarantine, "quarantine", materializer=TableMaterializer)
        save_artifact(HTMLString(error.validated.page), "validation_page")
        raise
    valid = checked.reports.assign(flow=identify(checked.reports))
    valid, told = labels.derive(valid)
    flows = int(valid["flow"].max()) + 1
    rows = {
        "read": rows_read,
        "flows": flows,
        "merged_reports": len(valid) - flows,
        "quarantined": len(checked.quarantine),
    }
    print(
        f"{rows['read']:,} rows read = {rows['flows']:,} flows + {rows['merged_reports']:,} merged reports "
        f"+ {rows['quarantined']:,} quarantined"
    )
    checks = checked.result["expectations"]
    passed = sum(check["success"] for check in checks)
    log_metadata(
        {
            "rows": dict(rows),
            "labels": told.as_dict(),
            "expectations": {"checked": len(checks), "passed": passed},
            "bad_rows_by_reason": checked.result["bad_rows_by_reason"],
        }
    )
    return valid, checked.quarantine, told.versions, rows, HTMLString(checked.page)
