"""Step replay: labelled flows to the live service."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from zenml import log_metadata, step
from zenml.types import HTMLString

from flowsentry.monitoring import replay as replays
from flowsentry.monitoring.journal import to_table
from flowsentry.monitoring.pace import Pace
from flowsentry.reporting.replay_summary import ReplayReport, report
from materializers import ModelMaterializer, TableMaterializer
from steps.stages import deployer


@step(
    enable_cache=False,  # what the service answers is not known before
    output_materializers={"answers": TableMaterializer, "replay_report": ModelMaterializer},
)
def replay(
    reports: pd.DataFrame, source: str, speed: str
) -> tuple[
    Annotated[pd.DataFrame, "answers"],
    Annotated[ReplayReport, "replay_report"],
    Annotated[HTMLString, "replay_page"],
]:
    """Send the reports to the champion's address, in a stream of their own, and compare its answers with the labels.

    The journal stays in the user's folder of replays: `python -m flowsentry live` shows it, also meanwhile.

    Args:
        reports: validated, with flow numbers and derived labels.
        source: for people: which flows.
        speed: see `Pace.parse`.

    Returns:
        A row per report with truth, verdict and latency; scores and findings; the same as a page.
    """
    endpoint, pace = deployer().endpoint(), Pace.parse(speed)
    with replays.begin(reports, source=source, endpoint=endpoint, pace=pace) as journal:
        print(f"replay to {endpoint.url}: `python -m flowsentry live` shows it as it goes")
        sent = replays.replay(reports, endpoint, journal=journal, pace=pace, on_progress=print)
    found, page = report(sent)
    log_metadata(
        {
            "journal": found.journal,
            "model_versions": list(found.models),
            "flows": found.flows,
            "wrong": found.answers[0].counts.fp + found.answers[0].counts.fn,
            "findings": {finding.code: finding.text for finding in found.findings},
        }
    )
    return to_table(sent.journal), found, HTMLString(page)
