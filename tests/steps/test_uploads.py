from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from flowsentry.errors import SourceError
from flowsentry.flows import sources
from steps import uploads

HEADER = (
    "_source_flow_id,_source_flow_final,_source_source_ip,_source_destination_ip,_source_network_bytes,"
    "_source_network_transport,_source_@timestamp,_source_event_duration,_source_destination_port,"
    "_source_source_port,label\n"
)
ROW = "{},True,10.0.0.1,10.0.0.2,421,tcp,2022-02-25T12:19:30.013Z,126359,8500.0,43226.0,benign\n"


@pytest.fixture
def flows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two recordings: a file, and a folder with two files and one without flows."""
    folder = tmp_path / "here"
    (folder / "may").mkdir(parents=True)
    (folder / "one.csv").write_text(HEADER + ROW.format("a"))
    (folder / "may" / "x.csv").write_text(HEADER + ROW.format("b"))
    (folder / "may" / "y.csv").write_text(HEADER + ROW.format("c"))
    (folder / "may" / "README.md").write_text("about these flows\n")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("data", [["one.csv"], ["may"], ["may/*.csv"], ["one.csv", "may/"]])
@pytest.mark.usefixtures("flows")
def test_uploaded_flows_are_read_as_the_same(data: list[str], tmp_path: Path) -> None:
    places = [uploads._upload(entry, str(tmp_path / "store")) for entry in data]
    here, there = sources.read(data), sources.read(places)
    pd.testing.assert_frame_equal(there.reports, here.reports)
    assert there.files == here.files == sources.digests(data)


def test_the_same_content_is_uploaded_once_and_other_content_elsewhere(
    flows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(tmp_path / "store")
    first = uploads._upload("one.csv", store)
    assert "uploading one.csv" in capsys.readouterr().out
    assert uploads._upload(str(flows / "one.csv"), store) == first
    assert capsys.readouterr().out == ""
    (flows / "one.csv").write_text(HEADER + ROW.format("other"))
    assert uploads._upload("one.csv", store) != first


@pytest.mark.usefixtures("flows")
def test_what_is_on_this_machine_is_read_in_place() -> None:
    with uploads.at_hand(["one.csv", "may/*.csv"]) as files:
        assert files == ["one.csv", "may/*.csv"]


def test_a_file_that_changes_while_it_is_uploaded_leaves_nothing_behind(
    flows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = uploads.fileio.copy

    def late(source: str, target: str) -> None:
        Path(source).write_text(HEADER + ROW.format("later"))
        copy(source, target)

    before = (flows / "one.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(uploads.fileio, "copy", late)
        with pytest.raises(SourceError, match=r"one\.csv changed while it was uploaded; run it again"):
            uploads._upload("one.csv", str(tmp_path / "store"))
    (flows / "one.csv").write_bytes(before)
    place = uploads._upload("one.csv", str(tmp_path / "store"))
    assert Path(place).read_bytes() == before
