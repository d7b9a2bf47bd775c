"""Step load: from files or the simulator to a table of reports."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from zenml import log_metadata, step

from flowsentry.errors import SourceError
from flowsentry.flows import sources
from flowsentry.simulation import SimulationSettings, simulate
from materializers import TableMaterializer
from steps.uploads import at_hand


@step(output_materializers={"reports": TableMaterializer, "unreadable_rows": TableMaterializer})
def load(
    data: list[str], digests: dict[str, str], simulation: SimulationSettings
) -> tuple[
    Annotated[pd.DataFrame, "reports"],
    Annotated[pd.DataFrame, "unreadable_rows"],
    Annotated[dict[str, str], "files"],
]:
    """Read recordings, or simulate one if no data are given.

    Args:
        data: files, folders and globs, or places of uploaded ones, one recording each; empty: simulate.
        digests: SHA-256 (hex) of every file when the run began, so that other content is another run.
        simulation: of the simulated recording.

    Returns:
        Reports (canonical schema), rows that are no reports (file, row, reason, raw), and digests by file.
    """
    if not data:
        reports = simulate(simulation)
        log_metadata({"rows_read": len(reports), "layouts": {"simulate": "simulated"}})
        return reports, pd.DataFrame(columns=list(sources.QUARANTINE), dtype=str), {"simulate": repr(simulation)}
    with at_hand(data) as files:
        loaded = sources.read(files, print)
    changed = sorted(set(loaded.files.values()) ^ set(digests.values()))
    if changed:
        raise SourceError(f"the files of {', '.join(data)} changed while the run began; run it again")
    log_metadata({"rows_read": loaded.rows_read, "layouts": loaded.layouts})
    return loaded.reports, loaded.quarantine, loaded.files
