from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from zenml.enums import VisualizationType

from flowsentry.flows import labels
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.sources import QUARANTINE
from flowsentry.simulation import SimulationSettings, simulate
from materializers import TableMaterializer
from tests.flowsentry.tables import make_reports
from tests.materializers.conftest import RoundTrip


def simulated() -> pd.DataFrame:
    raw = simulate(SimulationSettings(minutes=40, scale=0.05, episodes=1))
    return labels.derive(raw.assign(flow=identify(raw)))[0]


TABLES = {
    "simulated reports": simulated,
    "flows": lambda: collapse(simulated()),
    "unlabelled reports": lambda: make_reports([{"label": None}, {"label": None, "transport": None}]),
    "icmp only": lambda: make_reports([{"src_port": None, "dst_port": None, "transport": "icmp"}]),
    "no report": lambda: make_reports([{}]).head(0),
    "quarantine": lambda: pd.DataFrame(
        {"file": ["a.csv"], "row": [7], "reason": ["é < 0"], "raw": ["a,\x00,b\n"]}, columns=list(QUARANTINE)
    ),
    "nothing in quarantine": lambda: pd.DataFrame(columns=list(QUARANTINE), dtype=str),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_the_same_again(round_trip: RoundTrip, name: str) -> None:
    table = TABLES[name]()
    loaded, folder = round_trip(TableMaterializer, table)
    pd.testing.assert_frame_equal(loaded, table, check_categorical=False)
    assert loaded.dtypes.astype(str).to_dict() == table.dtypes.astype(str).to_dict()
    assert sorted(path.name for path in folder.iterdir()) == ["first_rows.csv", "table.parquet"]


def test_the_dashboard_shows_a_few_rows_only(round_trip: RoundTrip) -> None:
    _, folder = round_trip(TableMaterializer, simulated())
    assert len(pd.read_csv(folder / "first_rows.csv")) == 50


def test_the_rows_are_shown_as_a_table_and_counted(tmp_path: Path, isolated_zenml: Path) -> None:
    from zenml.client import Client

    store = Client().active_stack.artifact_store
    folder = Path(store.path) / tmp_path.name
    folder.mkdir(parents=True)
    kind = TableMaterializer(uri=str(folder), artifact_store=store)
    assert kind.save_visualizations(make_reports([{}])) == {f"{folder}/first_rows.csv": VisualizationType.CSV}
    assert kind.extract_metadata(make_reports([{}, {}]))["rows"] == 2
