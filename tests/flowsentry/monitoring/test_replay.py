from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from flowsentry.__main__ import main
from flowsentry.detector import Detector
from flowsentry.errors import ConfigError, ServiceError
from flowsentry.monitoring import replay as replays
from flowsentry.monitoring.journal import Announced, Journal, Reader, to_table
from flowsentry.monitoring.pace import BATCH, Pace
from flowsentry.monitoring.replay import begin, prepare, replay
from flowsentry.serving.client import Client
from flowsentry.serving.deployer import Endpoint
from flowsentry.simulation.files import write
from tests.flowsentry.monitoring.conftest import ROOT, Service

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

MAX = Pace(None)


@pytest.fixture(scope="module")
def reports(small: Small) -> pd.DataFrame:
    """The last 900 reports of the small recording, with attacks in them."""
    return prepare(small.raw.iloc[-900:].reset_index(drop=True))


def journal_of(reports: pd.DataFrame, endpoint: Endpoint, path: Path, pace: Pace = MAX) -> Journal:
    return begin(reports, source="flows", endpoint=endpoint, pace=pace, path=path)


def assert_as_offline(path: Path, detector: Detector, reports: pd.DataFrame) -> None:
    """Every report has exactly one verdict, and it is the offline one."""
    table, offline = to_table(path), detector.verdicts(reports)
    assert table["position"].tolist() == list(range(len(reports)))
    assert table["verdict"].tolist() == offline["label"].tolist()
    np.testing.assert_array_equal(table["anomaly_score"], offline["anomaly_score"])
    assert table["warm"].tolist() == offline["warm"].tolist()


def test_a_replay_leaves_the_offline_verdicts_beside_the_truth(
    shared_service: Service, detector: Detector, reports: pd.DataFrame, tmp_path: Path
) -> None:
    path = tmp_path / "a.replay"
    with journal_of(reports, shared_service.endpoint, path) as journal:
        summary = replay(reports, shared_service.endpoint, journal=journal)
    assert_as_offline(path, detector, reports)
    table = to_table(path)
    assert table["expected"].tolist() == reports["corrected"].tolist()
    assert table["family"].fillna("").tolist() == reports["family"].astype("string").fillna("").tolist()
    assert table["flow"].tolist() == reports["flow"].tolist()
    alarms = table[table["verdict"] == "malicious"]
    assert len(alarms)
    assert alarms["reason"].str.len().gt(5).all()
    assert table.loc[table["verdict"] == "benign", "reason"].isna().all()
    assert summary.reports == 900
    assert (summary.rejected, summary.resent) == (0, 0)
    latest = table.groupby("flow").last()
    assert summary.standing.tp == int((latest["verdict"].eq("malicious") & latest["expected"].eq("malicious")).sum())
    with Reader(path) as reader:
        assert reader.finished is not None
        assert [(m.position, m.version) for m in reader.models] == [(0, "7")]
        assert reader.models[0].description["view"] == "behaviour"


def test_its_stream_is_its_own_and_gone_afterwards(
    shared_service: Service, reports: pd.DataFrame, tmp_path: Path
) -> None:
    few = reports.iloc[:30]
    with Client(shared_service.endpoint.url) as client:
        for keep in (False, True):
            with journal_of(few, shared_service.endpoint, tmp_path / f"{keep}.replay") as journal:
                assert journal.header.stream.startswith("replay-")
                replay(few, shared_service.endpoint, journal=journal, keep_stream=keep)
            status = client.stream_status(journal.header.stream)
            assert (status is None or status["seen"] == 0) is not keep
        live = client.stream_status("default")
        assert live is None or live["seen"] == 0


def test_every_recording_is_a_stream_of_its_own(
    shared_service: Service, detector: Detector, small: Small, tmp_path: Path
) -> None:
    part = small.raw.iloc[-300:]
    both = pd.concat([part.assign(recording="a"), part.assign(recording="b")], ignore_index=True)
    both = prepare(both.assign(recording=both["recording"].astype("category")))
    with journal_of(both, shared_service.endpoint, tmp_path / "a.replay") as journal:
        replay(both, shared_service.endpoint, journal=journal)
    assert_as_offline(tmp_path / "a.replay", detector, both)


def test_rejected_flows_are_noted_and_keep_their_place(
    shared_service: Service, reports: pd.DataFrame, tmp_path: Path
) -> None:
    few = reports.iloc[:20].reset_index(drop=True)
    few.loc[3, "bytes"] = -1
    with journal_of(few, shared_service.endpoint, tmp_path / "a.replay") as journal:
        summary = replay(few, shared_service.endpoint, journal=journal)
    table = to_table(tmp_path / "a.replay")
    assert table["rejected"].notna().tolist() == [i == 3 for i in range(20)]
    assert table["verdict"].isna().tolist() == [i == 3 for i in range(20)]
    assert summary.rejected == 1
    assert [finding.code for finding in summary.findings] == ["lost", "untested"]


@pytest.mark.parametrize(("text", "flows", "seconds"), [("1x", 1, 0.35), ("10x", 1, 0.035), ("0.5x", 1, 0.7)])
def test_a_pace_is_that_of_the_study_times_a_factor(text: str, flows: int, seconds: float) -> None:
    pace = Pace.parse(text)
    assert (pace.flows, str(pace)) == (flows, text)
    assert pace.seconds == pytest.approx(seconds)


def test_fast_paces_put_flows_together_and_keep_the_rate() -> None:
    fast = Pace.parse("1000x")
    assert fast.flows == 29
    assert fast.flows / fast.seconds == pytest.approx(1000 / 0.35)
    assert (Pace.parse("max").flows, Pace.parse("max").seconds) == (BATCH, 0)


@pytest.mark.parametrize("text", ["", "x", "0x", "-1x", "10", "nanx", "infx", "fast"])
def test_an_impossible_pace_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="is no pace"):
        Pace.parse(text)


def test_a_replay_keeps_its_pace(shared_service: Service, reports: pd.DataFrame, tmp_path: Path) -> None:
    few = reports.iloc[:12]
    began = time.monotonic()
    with journal_of(few, shared_service.endpoint, tmp_path / "a.replay", Pace(7.0)) as journal:
        replay(few, shared_service.endpoint, journal=journal)
    sent = to_table(tmp_path / "a.replay")["sent"].diff().dt.total_seconds().dropna()
    assert 11 * 0.05 <= time.monotonic() - began < 3
    assert sent.median() == pytest.approx(0.05, abs=0.01)
    assert to_table(tmp_path / "a.replay")["request"].tolist() == list(range(12))


@pytest.mark.slow
def test_killing_the_service_in_the_middle_loses_and_doubles_nothing(
    new_service: Callable[[], Service], detector: Detector, reports: pd.DataFrame, tmp_path: Path
) -> None:
    service = new_service()
    path = tmp_path / "a.replay"

    def kill_and_start() -> None:
        with Reader(path) as reader:
            while reader.count < 500:
                time.sleep(0.005)
        service.kill()
        service.start()

    with journal_of(reports, service.endpoint, path, Pace(300.0)) as journal:
        thread = threading.Thread(target=kill_and_start)
        thread.start()
        summary = replay(reports, service.endpoint, journal=journal)
        thread.join()
    assert summary.resent > 0
    assert_as_offline(path, detector, reports)


PROGRAM = "from flowsentry.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_a_killed_replay_goes_on_where_it_stopped(
    shared_service: Service, detector: Detector, small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flows, path = tmp_path / "flows.parquet", tmp_path / "a.replay"
    raw = small.raw.iloc[-600:].reset_index(drop=True)
    write(raw, flows)
    command = ["replay", str(flows), "--endpoint", shared_service.endpoint.url, "--journal", str(path)]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *command, "--speed", "60x"], cwd=ROOT)
    try:
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        with Reader(path) as reader:
            while reader.count < 100:
                time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    with Reader(path) as reader:
        assert 100 <= reader.count < 600
        assert reader.finished is None
    assert main([*command, "--resume", "--speed", "max"]) == 0
    assert_as_offline(path, detector, raw)
    told = capsys.readouterr().out
    assert "600 reports answered" in told
    assert "balanced accuracy" in told


@pytest.mark.parametrize("known", ["first answer again", "answer forgotten", "stream forgotten"])
def test_a_replay_goes_on_whatever_the_service_still_knows(
    shared_service: Service, detector: Detector, reports: pd.DataFrame, tmp_path: Path, known: str
) -> None:
    """It was killed after the service took a request, before its journal had the answers."""
    path = tmp_path / "a.replay"
    with Client(shared_service.endpoint.url) as client, journal_of(reports, shared_service.endpoint, path) as journal:
        stream = journal.header.stream
        feed = replays.Feed(reports, client, stream)
        part = reports.iloc[:400]
        with journal_of(part, shared_service.endpoint, tmp_path / "part.replay") as other:
            object.__setattr__(other.header, "stream", stream)
            replay(part, shared_service.endpoint, journal=other, keep_stream=True)
        rows = to_table(tmp_path / "part.replay").astype(object)
        rows["sent"] = rows["time"] = 0
        journal.add(rows.where(rows.notna(), None).to_dict("records"))
        feed = replays.Feed(reports, client, stream, position=400)
        journal.announce(Announced(400, 150))
        feed.send(150)
        if known == "answer forgotten":
            feed.send(50)
        if known == "stream forgotten":
            client.delete_stream(stream)
        summary = replay(reports, shared_service.endpoint, journal=journal)
    assert_as_offline(path, detector, reports)
    assert summary.resent == {"first answer again": 0, "answer forgotten": 400, "stream forgotten": 400}[known]
    requests = to_table(path)["request"]
    assert (requests.iloc[400:550] == 400).all()
    assert requests.iloc[550] == 550


def test_other_flows_than_the_journals_are_refused(
    shared_service: Service, reports: pd.DataFrame, tmp_path: Path
) -> None:
    with journal_of(reports, shared_service.endpoint, tmp_path / "a.replay") as journal:
        changed = reports.copy()
        changed.loc[5, "bytes"] += 1
        with pytest.raises(ConfigError, match="other flows"):
            replay(changed, shared_service.endpoint, journal=journal)
        relabelled = reports.assign(corrected=reports["corrected"].cat.rename_categories(str.upper))
        with pytest.raises(ConfigError, match="other flows"):
            replay(relabelled, shared_service.endpoint, journal=journal)


def test_flows_without_labels_are_refused(reports: pd.DataFrame, tmp_path: Path) -> None:
    unlabelled = reports.assign(corrected=pd.Categorical([None] * len(reports)))
    with pytest.raises(ConfigError, match="no flow is labelled"):
        journal_of(unlabelled, Endpoint(url="http://127.0.0.1:1", token=None), tmp_path / "a.replay")


def test_a_service_that_stays_away_is_told_and_the_journal_stays(reports: pd.DataFrame, tmp_path: Path) -> None:
    nobody = Endpoint(url="http://127.0.0.1:9", token=None)
    path = tmp_path / "a.replay"
    with journal_of(reports, nobody, path) as journal, pytest.raises(ServiceError, match="does not answer"):
        replay(reports, nobody, journal=journal, patience=0.2)
    with Journal.resume(path) as journal:
        assert journal.announced == Announced(0, 900)


def test_mistakes_on_the_command_line_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWSENTRY_HOME", str(tmp_path / "home"))
    for arguments, words in (
        (["replay", "simulate", "--speed", "fast"], "--speed: fast is no pace"),
        (["replay", "simulate", "--resume"], "every replay was finished"),
        (["replay", "simulate", "--token-file", "x"], "belongs to --endpoint"),
        (["replay", "simulate"], "no model has been deployed yet"),
        (["replay", "none.csv", "--endpoint", "http://127.0.0.1:9"], "none.csv"),
        (["live", "--journal", "none.replay"], "none.replay"),
        (["live", "--port", "0"], "--port 0"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error
