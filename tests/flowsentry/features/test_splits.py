from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowsentry.errors import ProtocolError, StoreError
from flowsentry.features.splits import PARTS, Splits, make_splits, require
from flowsentry.flows.labels import derive
from flowsentry.flows.reports import collapse, identify
from flowsentry.flows.sources import read

SIDES = ("fit", "calibration", "test", "validation")
START = pd.Timestamp("2024-05-01T10:00:00Z")


def flow_table(
    seconds: list[float],
    groups: list[str | None],
    exchanges: list[int] | None = None,
    recording: list[str] | None = None,
) -> pd.DataFrame:
    """One flow per element; group None is benign, "" unlabelled."""
    label = [None if g == "" else "malicious" if g else "benign" for g in groups]
    return pd.DataFrame(
        {
            "recording": pd.Categorical(recording or ["r"] * len(seconds)),
            "time": (START + pd.to_timedelta(seconds, unit="s")).as_unit("us"),
            "label": pd.Categorical(label, ["benign", "malicious"]),
            "group": pd.Categorical([g or None for g in groups], ["attack", "flood", "scan"]),
            "exchange": exchanges if exchanges is not None else range(len(seconds)),
        }
    )


def busy_hour(recording: str = "r", start: int = 0, groups: tuple[str, ...] = ("flood", "scan")) -> pd.DataFrame:
    """One benign flow a second for an hour, a malicious one of each group every 30 s from minute 30 on."""
    attacks = [(s, group) for s in range(1800, 3590, 30) for group in groups]
    seconds = [*range(3600), *(s for s, _ in attacks)]
    kinds = [None] * 3600 + [group for _, group in attacks]
    table = flow_table(seconds, kinds, recording=[recording] * len(seconds))
    return table.assign(exchange=np.arange(len(table)) // 2 + start).sort_values("time", ignore_index=True)


def parts_by_class(flows: pd.DataFrame, splits: Splits, fold: str) -> dict[tuple[str, str], int]:
    kind = flows["group"].astype(object).fillna("benign")
    return {(part, k): n for (part, k), n in splits.parts.groupby([fold, kind], observed=True).size().items()}


@st.composite
def recordings(draw: st.DrawFn) -> pd.DataFrame:
    count = draw(st.integers(1, 60))
    seconds = draw(st.lists(st.integers(0, 900), min_size=count, max_size=count))
    groups = draw(st.lists(st.sampled_from([None, None, "flood", "scan", ""]), min_size=count, max_size=count))
    exchanges = draw(st.lists(st.integers(0, 40), min_size=count, max_size=count))
    names = draw(st.lists(st.sampled_from(["a", "b"]), min_size=count, max_size=count))
    return flow_table(seconds, groups, [2 * e + (n == "b") for e, n in zip(exchanges, names, strict=True)], names)


class TestAnyFlows:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(recordings(), st.sampled_from([0, 60, 300]), st.integers(1, 3))
    def test_invariants(self, flows: pd.DataFrame, warm_up: int, rotations: int) -> None:
        splits = make_splits(flows, seed=1, warm_up_seconds=warm_up, rotations=rotations)
        assert splits.parts.index.equals(flows.index)
        assert list(splits.parts.columns) == [fold.name for fold in splits.folds]
        protocols = {fold.protocol for fold in splits.folds}
        assert protocols.isdisjoint(splits.impossible)
        assert protocols | set(splits.impossible) == {"random", "time", "family", "recording"}
        malicious = flows["label"].eq("malicious")
        for fold in splits.folds:
            part = splits.parts[fold.name]
            assert part.notna().all()
            assert tuple(part.cat.categories) == PARTS
            sided = part.isin(SIDES)
            assert part[sided].astype(str).groupby(flows["exchange"][sided]).nunique().max() == 1
            assert not (sided & flows["label"].isna()).any()
            for needed in ("fit", "calibration"):
                assert (part.eq(needed) & ~malicious).any()
            if fold.protocol == "time":
                for side in (part.isin(["fit", "calibration"]), part.eq("test")):
                    assert (side & malicious).any()
                    assert (side & ~malicious).any()
            if fold.protocol == "family":
                held_out = malicious & flows["group"].eq(fold.held_out)
                assert not part[held_out].isin(["fit", "calibration"]).any()
            if fold.protocol == "recording":
                training = flows["recording"][part.isin(["fit", "calibration"])]
                assert not training.eq(fold.held_out).any()

    @settings(max_examples=50, deadline=None)
    @given(recordings())
    def test_the_same_seed_gives_the_same_splits(self, flows: pd.DataFrame) -> None:
        one, other = (make_splits(flows, seed=5, warm_up_seconds=60) for _ in range(2))
        pd.testing.assert_frame_equal(one.parts, other.parts)
        assert one.folds == other.folds

    @settings(max_examples=50, deadline=None)
    @given(recordings(), st.randoms(use_true_random=False))
    def test_order_and_names_of_recordings_decide_nothing_but_the_draw(self, flows: pd.DataFrame, random) -> None:  # type: ignore[no-untyped-def]
        order = list(range(len(flows)))
        random.shuffle(order)
        names = {"a": "zz/.. ü", "b": "aa"}
        other = flows.iloc[order].assign(recording=flows["recording"].astype(str).map(names).iloc[order])
        before, after = (make_splits(table, warm_up_seconds=0) for table in (flows, other))
        assert set(before.impossible) - {"random"} == set(after.impossible) - {"random"}
        for fold in before.of("time"):
            tested, again = (splits.parts[fold.name].eq("test") for splits in (before, after))
            assert tested.equals(again.reindex(flows.index))


class TestEveryFold:
    def test_warm_up_and_last_tick_are_apart_in_all_folds(self) -> None:
        flows = busy_hour()
        splits = make_splits(flows, warm_up_seconds=600)
        seconds = (flows["time"] - START).dt.total_seconds()
        for fold in splits.folds:
            part = splits.parts[fold.name]
            assert (part.eq("warm-up") == (seconds < 600)).all()
            assert (part.eq("last-tick") == (seconds >= 3590)).all()

    def test_a_recording_of_few_ticks_has_no_last_tick(self) -> None:
        splits = make_splits(flow_table([*range(100)], [None] * 100), warm_up_seconds=0)
        assert not splits.parts["random"].eq("last-tick").any()

    def test_an_exchange_across_the_end_of_the_warm_up_stays_whole_and_counts(self) -> None:
        flows = flow_table([float(i) for i in range(200)], [None] * 200, [i // 2 for i in range(1, 201)])
        part = make_splits(flows, warm_up_seconds=52).parts["random"]
        assert flows["exchange"][51] == flows["exchange"][52]
        assert part[50] == "warm-up"
        assert part[51] == part[52] != "warm-up"

    def test_malicious_flows_of_the_warm_up_are_not_scored(self) -> None:
        flows = busy_hour()
        splits = make_splits(flows, warm_up_seconds=2400)
        early = flows["group"].notna() & ((flows["time"] - START).dt.total_seconds() < 2400)
        assert early.any()
        assert splits.parts[early.to_numpy()].eq("warm-up").all(axis=None)

    def test_the_first_report_decides_where_it_is_known(self) -> None:
        flows = busy_hour()
        late = flows.assign(
            first_time=flows["time"], time=flows["time"].where(flows.index % 2 == 0, flows["time"].max())
        )
        expected = make_splits(flows, warm_up_seconds=600).parts
        got = make_splits(late, warm_up_seconds=600).parts
        pd.testing.assert_frame_equal(got, expected)


class TestRandom:
    def test_shares_hold_within_benign_and_within_each_group(self) -> None:
        flows = pd.concat([busy_hour(start=5000 * i) for i in range(3)], ignore_index=True)
        flows["exchange"] = np.arange(len(flows))
        splits = make_splits(flows, warm_up_seconds=0)
        counts = pd.Series(parts_by_class(flows, splits, "random")).unstack(0)[list(SIDES)]
        shares = counts.div(counts.sum(axis=1), axis=0)
        assert set(shares.index) == {"benign", "flood", "scan"}
        for side, share in {"fit": 0.595, "calibration": 0.105, "test": 0.2, "validation": 0.1}.items():
            assert shares[side].to_numpy() == pytest.approx(share, abs=0.006)

    def test_another_seed_draws_other_flows(self) -> None:
        flows = busy_hour()
        one, other = (make_splits(flows, seed=s, warm_up_seconds=0).rows("random", "test") for s in (0, 1))
        assert len(np.intersect1d(one, other)) < 0.5 * len(one)

    def test_is_possible_without_attacks_and_says_so(self) -> None:
        splits = make_splits(flow_table([float(i) for i in range(500)], [None] * 500), warm_up_seconds=0)
        (fold,) = require(splits, "random")
        assert "nothing is malicious" in fold.note
        assert splits.impossible["time"] == "nothing is malicious"


class TestTime:
    def test_training_is_earlier_and_the_cut_is_told(self) -> None:
        flows = busy_hour()
        splits = make_splits(flows, warm_up_seconds=0)
        (fold,) = splits.of("time")
        part, first = splits.parts["time"], flows.groupby("exchange")["time"].transform("min")
        cut = pd.Timestamp(fold.note.removeprefix("cut at ").split(" UTC")[0], tz="UTC")
        assert (part.isin(["fit", "calibration"]) == ((first < cut) & part.ne("last-tick"))).all()
        assert part.isin(["fit", "calibration"]).sum() / part.isin(SIDES).sum() == pytest.approx(0.7, abs=0.01)
        assert "benign and" in fold.note

    def test_every_fourth_block_of_five_minutes_is_calibration(self) -> None:
        flows = busy_hour()
        splits = make_splits(flows, warm_up_seconds=0)
        calibration = flows.loc[splits.rows("time", "calibration")]
        minutes = (calibration["time"] - START).dt.total_seconds() // 60
        assert calibration["group"].isna().all()
        assert set(minutes // 5) <= {3, 4, 7, 8}
        assert (minutes // 5).isin([3, 7]).mean() > 0.99

    def test_attacks_in_one_tick_allow_no_cut(self) -> None:
        groups: list[str | None] = [None] * 1000
        groups[500:509] = ["flood"] * 9
        splits = make_splits(flow_table([float(i) for i in range(1000)], groups), warm_up_seconds=0)
        assert "no cut leaves 5%" in splits.impossible["time"]
        told = (
            "time cannot be carried out on these flows: no cut .*; set select.protocol to random, or give other flows"
        )
        with pytest.raises(ProtocolError, match=told):
            require(splits, "time")


class TestFamily:
    def test_the_held_out_group_is_tested_whole_and_the_others_are_fitted(self) -> None:
        flows = busy_hour(groups=("flood", "scan"))
        flows["exchange"] = np.arange(len(flows))
        splits = make_splits(flows, warm_up_seconds=0)
        assert [fold.name for fold in splits.of("family")] == [
            f"family/{group}/{rotation}" for group in ("flood", "scan") for rotation in range(3)
        ]
        for fold in splits.of("family"):
            counts = parts_by_class(flows, splits, fold.name)
            other = "scan" if fold.held_out == "flood" else "flood"
            assert {part for part, kind in counts if kind == fold.held_out} == {"test"}
            assert {part for part, kind in counts if kind == other} == {"fit"}
            assert {part for part, kind in counts if kind == "benign"} == {"fit", "calibration", "test", "last-tick"}

    def test_rotations_test_every_benign_flow_once(self) -> None:
        flows = busy_hour()
        splits = make_splits(flows, warm_up_seconds=0)
        tested = sum((splits.parts[f"family/flood/{r}"].eq("test") for r in range(3)), pd.Series(0, index=flows.index))
        benign_exchange = flows.groupby("exchange")["group"].transform("count").eq(0)
        regular = benign_exchange & ~splits.parts["time"].eq("last-tick")
        assert (tested[regular] == 1).all()

    def test_blocks_shrink_for_a_short_recording(self) -> None:
        groups: list[str | None] = [None if i % 10 else ("flood", "scan")[i // 10 % 2] for i in range(600)]
        splits = make_splits(flow_table([i / 2 for i in range(600)], groups), warm_up_seconds=0)
        for fold in splits.of("family"):
            assert "blocks of 18.75 s" in fold.note

    def test_one_group_is_not_enough(self) -> None:
        splits = make_splits(busy_hour(groups=("attack",)), warm_up_seconds=0)
        assert splits.impossible["family"] == "needs two groups of families, found only attack"

    @pytest.mark.parametrize("rotations", [0, 4])
    def test_rotations_beyond_the_three_parts_are_refused(self, rotations: int) -> None:
        with pytest.raises(ValueError, match="1 to 3"):
            make_splits(busy_hour(), warm_up_seconds=0, rotations=rotations)


class TestRecording:
    def test_each_recording_is_tested_on_models_of_the_others(self) -> None:
        flows = pd.concat([busy_hour("a"), busy_hour("b", start=9000)], ignore_index=True)
        splits = make_splits(flows, warm_up_seconds=0)
        assert [fold.held_out for fold in splits.of("recording")] == ["a", "b"]
        for fold in splits.of("recording"):
            by_part = flows["recording"].groupby(splits.parts[fold.name], observed=True).agg(set).to_dict()
            other = {"a": "b", "b": "a"}[str(fold.held_out)]
            assert by_part["test"] == {fold.held_out}
            assert by_part["fit"] == by_part["calibration"] == {other}

    def test_training_needs_both_classes(self) -> None:
        flows = pd.concat([busy_hour("a"), busy_hour("b", start=9000, groups=())], ignore_index=True)
        splits = make_splits(flows, warm_up_seconds=0)
        assert [fold.held_out for fold in splits.of("recording")] == ["b"]


class TestImpossible:
    @pytest.mark.parametrize(
        ("flows", "warm_up", "reason"),
        [
            (flow_table([0.0, 1.0], ["", ""]), 0, "no flow is labelled"),
            (flow_table([0.0, 1.0], ["flood", "flood"]), 0, "no benign flow"),
            (flow_table([0.0, 1.0], [None, "flood"]), 600, "nothing is left after the warm-up of 600 s"),
        ],
    )
    def test_hopeless_flows_allow_nothing_and_say_why(self, flows: pd.DataFrame, warm_up: int, reason: str) -> None:
        splits = make_splits(flows, warm_up_seconds=warm_up)
        assert splits.folds == ()
        assert set(splits.impossible) == {"random", "time", "family", "recording"}
        assert all(reason in why for why in splits.impossible.values())


class TestStorage:
    def test_what_is_saved_is_loaded(self, tmp_path: Path) -> None:
        splits = make_splits(busy_hour(), warm_up_seconds=600)
        splits.save(tmp_path)
        loaded = Splits.load(tmp_path)
        pd.testing.assert_frame_equal(loaded.parts, splits.parts)
        assert loaded.folds == splits.folds
        assert loaded.impossible == splits.impossible

    def test_splits_without_folds_too(self, tmp_path: Path) -> None:
        splits = make_splits(flow_table([0.0], [""]), warm_up_seconds=0)
        splits.save(tmp_path)
        pd.testing.assert_frame_equal(Splits.load(tmp_path).parts, splits.parts)

    def test_damage_is_one_clear_error(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="cannot be read"):
            Splits.load(tmp_path)
        splits = make_splits(busy_hour(), warm_up_seconds=600)
        splits.save(tmp_path)
        description = json.loads((tmp_path / "splits.json").read_text())
        (tmp_path / "splits.json").write_text(json.dumps({**description, "folds": description["folds"][1:]}))
        with pytest.raises(StoreError, match="does not belong"):
            Splits.load(tmp_path)
        splits.save(tmp_path)
        (tmp_path / "parts.parquet").write_bytes(b"PAR1 and no more")
        with pytest.raises(StoreError, match="cannot be read"):
            Splits.load(tmp_path)

    def test_rows_are_flow_numbers(self) -> None:
        flows = busy_hour()
        splits = make_splits(flows, warm_up_seconds=0)
        (fold,) = splits.of("random")
        together = np.concatenate([splits.rows(fold, part) for part in PARTS])
        assert together.dtype == np.int64
        assert sorted(together) == flows.index.tolist()


@pytest.fixture(scope="module")
def february(real_flows: Path) -> pd.DataFrame:
    reports = read([real_flows]).reports
    return collapse(derive(reports.assign(flow=identify(reports)))[0])


@pytest.mark.real_data
class TestFebruary2022:
    def test_scored_benign_flows_are_those_of_the_analysis(self, february: pd.DataFrame) -> None:
        splits = make_splits(february, warm_up_seconds=1800)
        benign = february["corrected"].eq("benign")
        assert splits.parts["random"][~benign].isin(SIDES).all()
        counts = splits.parts["random"][benign].value_counts()
        assert counts["warm-up"] == 3479
        assert counts["last-tick"] == 339
        assert counts[list(SIDES)].sum() == 14567

    def test_random_holds_every_family_in_every_part(self, february: pd.DataFrame) -> None:
        splits = make_splits(february, warm_up_seconds=1800)
        counts = splits.parts.groupby(
            ["random", february["group"].astype(object).fillna("benign")], observed=True
        ).size()
        assert counts["test"].to_dict() == {"benign": 2913, "brute-force": 2290, "flood": 3373, "shell": 136}
        assert counts["validation"].to_dict() == {"benign": 1457, "brute-force": 1145, "flood": 1687, "shell": 66}

    def test_time_is_cut_within_the_attacks(self, february: pd.DataFrame) -> None:
        splits = make_splits(february, warm_up_seconds=1800)
        (fold,) = splits.of("time")
        assert fold.note == (
            "cut at 2022-02-25 13:43:10 UTC: 9,619 benign and 21,566 malicious flows before, "
            "4,948 benign and 7,416 malicious flows after"
        )

    def test_three_groups_are_held_out(self, february: pd.DataFrame) -> None:
        splits = make_splits(february, warm_up_seconds=1800)
        tested = {
            str(fold.held_out): int(february["corrected"].eq("malicious")[splits.rows(fold, "test")].sum())
            for fold in splits.of("family")
        }
        assert tested == {"brute-force": 11447, "flood": 16866, "shell": 669}
        assert splits.impossible == {"recording": "needs two recordings, found one"}
