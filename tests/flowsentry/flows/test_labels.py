from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flowsentry.flows import labels
from flowsentry.flows.labels import derive, is_february_2022
from flowsentry.flows.schema import conform
from flowsentry.flows.sources import read


def table(rows: list[dict[str, object]]) -> pd.DataFrame:
    """Canonical flows, one report each unless `flow` is given; only what matters is written in `rows`."""
    usual: dict[str, object] = {
        "recording": "a", "file": "a.csv", "flow_id": "x", "final": True, "src_ip": "10.0.0.1", "dst_ip": "10.0.0.2",
        "src_port": 40000, "dst_port": 80, "transport": "tcp", "bytes": 500, "time": "2024-01-01T00:00:00Z",
        "duration": 1_000_000, "label": "benign",
    }  # fmt: skip
    full = [{**usual, "row": i + 1, "flow": i, **row} for i, row in enumerate(rows)]
    frame = pd.DataFrame(full)
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    return conform(frame)


@pytest.fixture(scope="module")
def february(real_flows: Path) -> pd.DataFrame:
    reports = read([real_flows]).reports
    return reports.assign(flow=np.arange(len(reports)))


@pytest.fixture(scope="module")
def february_truth(february: pd.DataFrame) -> tuple[pd.DataFrame, labels.LabelReport]:
    return derive(february)


@pytest.mark.real_data
class TestFebruary2022:
    def test_families_have_the_counts_of_the_analysis(
        self, february_truth: tuple[pd.DataFrame, labels.LabelReport]
    ) -> None:
        truth, report = february_truth
        published = truth[truth["label"] == "malicious"]
        by_port = published.groupby(["family", "dst_port"], observed=True).size().to_dict()
        assert by_port == {
            ("syn-flood", 31301): 16866,
            ("ssh-attack", 31301): 5270,
            ("ssh-attack", 22): 5413,
            ("refused-callback", 4444): 637,
            ("second-shell", 1337): 13,
        }
        (recording,) = report.recordings
        assert recording.rules == "february2022/1"
        assert recording.families == {
            "syn-flood": 16866,
            "ssh-attack": 5270 + 5413 + 764,
            "refused-callback": 637,
            "second-shell": 13 + 13 + 2,
            "staging": 4,
        }

    def test_783_labels_are_corrected(self, february_truth: tuple[pd.DataFrame, labels.LabelReport]) -> None:
        truth, report = february_truth
        assert report.recordings[0].corrections == labels.FEBRUARY_CORRECTIONS
        changed = truth[truth["label"] != truth["corrected"]]
        assert len(changed) == 764 + 13 + 2 + 4
        assert set(changed["corrected"]) == {"malicious"}
        replies = changed[changed["family"] == "ssh-attack"]
        assert replies["time"].between("2022-02-25T13:37:50Z", "2022-02-25T13:43:41Z").all()
        assert replies["src_port"].value_counts().to_dict() == {31301: 389, 22: 375}

    def test_families_and_groups_are_known_exactly_where_the_corrected_label_is_malicious(
        self, february_truth: tuple[pd.DataFrame, labels.LabelReport]
    ) -> None:
        truth, _ = february_truth
        malicious = truth["corrected"] == "malicious"
        assert truth["family"].notna().equals(malicious)
        groups = truth.groupby("group", observed=True)["family"].agg(lambda f: sorted(set(f))).to_dict()
        assert groups == {
            "flood": ["syn-flood"],
            "brute-force": ["ssh-attack"],
            "shell": ["refused-callback", "second-shell", "staging"],
        }

    def test_every_correction_but_the_replies_shares_an_exchange_with_a_shell(
        self, february_truth: tuple[pd.DataFrame, labels.LabelReport]
    ) -> None:
        truth, _ = february_truth
        both = truth.groupby("exchange")["label"].nunique() > 1
        mixed = truth[truth["exchange"].isin(both[both].index)]
        assert set(mixed["family"]) == {"second-shell"}
        assert len(mixed) == 26

    def test_the_recording_is_recognised_without_names_and_addresses(self, february: pd.DataFrame) -> None:
        def renamed(addresses: pd.Series) -> pd.Series:
            return addresses.cat.rename_categories(lambda a: f"host-{hash(a)}")

        other = february.assign(src_ip=renamed(february["src_ip"]), dst_ip=renamed(february["dst_ip"]))
        _, report = derive(other.assign(recording="else", file="z"))
        assert report.recordings[0].corrections == labels.FEBRUARY_CORRECTIONS

    def test_another_day_or_the_benign_part_is_not_the_recording(self, february: pd.DataFrame) -> None:
        assert not is_february_2022(february.assign(time=february["time"] + pd.Timedelta(days=1)))
        assert not is_february_2022(february[february["label"] == "benign"])

    def test_reports_instead_of_flows_give_the_same_flows(
        self, february: pd.DataFrame, february_truth: tuple[pd.DataFrame, labels.LabelReport]
    ) -> None:
        earlier = february.assign(bytes=february["bytes"] // 2, duration=february["duration"] // 2, final=False)
        reports = pd.concat([earlier, february], ignore_index=True)
        truth, report = derive(reports)
        expected, expected_report = february_truth
        assert report == expected_report
        for column in ("family", "group", "corrected", "exchange"):
            values = truth[column].astype(str)
            assert values.iloc[: len(february)].tolist() == expected[column].astype(str).tolist()
            assert values.iloc[len(february) :].tolist() == expected[column].astype(str).tolist()

    def test_without_labels_nothing_is_derived_but_exchanges(self, february: pd.DataFrame) -> None:
        unlabelled = february.assign(label=pd.Categorical([None] * len(february), ["benign"]))
        truth, report = derive(unlabelled)
        assert truth[["family", "group", "corrected"]].isna().all(axis=None)
        assert report.recordings[0].rules == "unlabelled"
        assert report.recordings[0].exchanges == 39227


@pytest.mark.real_data
def test_may_sample_has_no_attack(may_sample: Path) -> None:
    reports = read([may_sample]).reports
    truth, report = derive(reports.assign(flow=np.arange(len(reports))))
    assert truth["family"].isna().all()
    assert report.recordings[0].malicious == 0


def test_any_other_recording_gets_one_family() -> None:
    truth, report = derive(table([{}, {"label": "malicious", "dst_port": 31301, "src_port": 40001}]))
    assert truth["family"].tolist()[1:] == ["attack"]
    assert truth["group"].tolist()[1:] == ["attack"]
    assert truth["corrected"].tolist() == ["benign", "malicious"]
    assert truth["family"].isna().tolist() == [True, False]
    assert report.versions == {"a": "attack/1 exchanges/1"}


def test_a_source_that_knows_the_truth_is_believed() -> None:
    rows = table(
        [
            {"label": "malicious", "family": "port-scan", "group": "scan", "exchange": 7},
            {"exchange": 7},
            {"exchange": 3},
        ]
    )
    truth, report = derive(rows)
    assert truth["exchange"].tolist() == [7, 7, 3]
    assert truth["family"].tolist()[:1] == ["port-scan"]
    assert truth["group"].tolist()[:1] == ["scan"]
    assert truth["corrected"].tolist() == rows["label"].tolist()
    assert report.recordings[0].rules == "source"
    assert report.recordings[0].exchange_rule == "source"
    assert report.recordings[0].largest_exchange == 2


def test_a_family_from_the_source_outweighs_a_benign_label() -> None:
    rows = table(
        [{"family": "scan", "group": "scan", "exchange": 0}, {"label": "malicious", "exchange": 1}, {"exchange": 2}]
    )
    truth, report = derive(rows)
    assert truth["corrected"].tolist() == ["malicious", "malicious", "benign"]
    assert truth["family"].tolist()[:2] == ["scan", "attack"]
    assert report.recordings[0].corrections == {"source": 1}


def test_a_flow_is_malicious_if_any_of_its_reports_is() -> None:
    truth, report = derive(table([{"flow": 0, "label": "malicious"}, {"flow": 1, "src_port": 1}, {"flow": 0}]))
    assert truth["corrected"].tolist() == ["malicious", "benign", "malicious"]
    assert truth["family"].notna().tolist() == [True, False, True]
    assert truth["exchange"].tolist() == [0, 1, 0]
    assert report.recordings[0].flows == 2


@pytest.mark.parametrize("known", [True, False])
def test_exchange_numbers_are_unique_over_recordings(known: bool) -> None:
    exchange: Callable[[int], dict[str, object]] = lambda n: {"exchange": n} if known else {}  # noqa: E731
    rows = table([{**exchange(0)}, {"src_port": 2, **exchange(1)}, {"recording": "b", **exchange(0)}])
    truth, _ = derive(rows)
    assert truth["exchange"].nunique() == 3


def test_no_reports_give_no_truth() -> None:
    truth, report = derive(table([{}]).iloc[:0])
    assert {"family", "group", "exchange", "corrected"} <= set(truth.columns)
    assert report.recordings == ()


def test_a_source_that_knows_of_no_attack_is_believed_too() -> None:
    rows = table([{"exchange": 0}, {"exchange": 0}]).assign(family=None, group=None)
    truth, report = derive(conform(rows))
    assert truth[["family", "group"]].isna().all(axis=None)
    assert truth["corrected"].tolist() == ["benign", "benign"]
    assert report.versions == {"a": "source source"}


def test_each_recording_follows_its_own_rules() -> None:
    rows = table(
        [{"label": None}, {"recording": "b", "label": "malicious"}, {"recording": "c"}, {"label": None, "src_port": 1}]
    )
    truth, report = derive(rows)
    assert report.versions == {
        "a": "unlabelled exchanges/1",
        "b": "attack/1 exchanges/1",
        "c": "attack/1 exchanges/1",
    }
    assert truth["corrected"].astype(object).fillna("").tolist() == ["", "malicious", "benign", ""]
    assert truth["exchange"].nunique() == 4
