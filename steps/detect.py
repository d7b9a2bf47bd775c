"""Step detect: from reports to verdicts."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from zenml import log_metadata, step
from zenml.types import HTMLString

from flowsentry.detector import Detector
from flowsentry.reporting.verdict_summary import VerdictSummary, summarise, verdict_table, verdicts_html
from materializers import ModelMaterializer, TableMaterializer


@step(output_materializers={"verdicts": TableMaterializer, "verdict_summary": ModelMaterializer})
def detect(
    reports: pd.DataFrame, quarantine: pd.DataFrame, rows: dict[str, int], detector: Detector, model_version: str
) -> tuple[
    Annotated[pd.DataFrame, "verdicts"],
    Annotated[VerdictSummary, "verdict_summary"],
    Annotated[HTMLString, "verdicts_page"],
]:
    """Judge every report as the service would, each recording as a stream of its own.

    Args:
        reports: validated; labels are not needed, and do not change a verdict.
        quarantine: rows that get no verdict.
        rows: the account of rows.
        detector: what judges.
        model_version: its version.

    Returns:
        A verdict per report; what they say together, with scores where labels are known; the same as a page.
    """
    verdicts = verdict_table(reports, detector, model_version)
    summary = summarise(verdicts, reports, quarantine, rows, detector, model_version)
    log_metadata(
        {
            "model_version": model_version,
            "flows": summary.flows,
            "alerts": summary.alerts,
            "warm_up_alerts": summary.warm_up_alerts,
            "labelled": summary.labelled,
        }
    )
    return verdicts, summary, HTMLString(verdicts_html(summary, verdicts))
