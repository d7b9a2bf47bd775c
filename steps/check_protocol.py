"""Step check_protocol: ends a run whose selection could not be made, before anything is trained."""

from __future__ import annotations

import pandas as pd
from zenml import step

from flowsentry.features.splits import Protocol, Splits, require
from flowsentry.flows.schema import is_malicious


@step
def check_protocol(flows: pd.DataFrame, splits: Splits, protocol: Protocol) -> None:
    """Demand that the flows allow the protocol that decides.

    A step of its own: as a setting of `engineer`, another protocol would make and train everything again.

    Args:
        flows: flow table.
        splits: folds of all protocols.
        protocol: of the selection.

    Raises:
        ProtocolError: it is impossible.
    """
    malicious = is_malicious(flows["corrected"])
    # Flows of one class allow no training at all, which training says better.
    if malicious.any() and not malicious.all():
        require(splits, protocol)
