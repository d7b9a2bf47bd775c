"""Which stored version is the champion: ZenML's own store, and records as the deployer writes them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from zenml.client import Client

from flowsentry.detector import Detector
from flowsentry.errors import ConfigError
from flowsentry.flows import labels
from flowsentry.flows.reports import collapse, identify
from flowsentry.learning.quality_gate import Exposure, Scored, Unscored, fingerprints
from flowsentry.serving.deployer import Record
from stacks import apply
from steps import stages
from steps.quality_gate import _champion
from tests.pipelines.champion import deployed, no_model, recording, register, trained

ONE, TWO = "a" * 64, "b" * 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore", "error:::(flowsentry|materializers|pipelines|run|stacks|steps)"),
]


@pytest.fixture(scope="module")
def detector() -> Detector:
    return trained("tails")


@pytest.fixture(autouse=True)
def store(isolated_zenml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    apply.activate("local")
    with no_model():
        yield


@pytest.fixture(scope="module")
def tables() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reports and flows."""
    raw = recording(3, minutes=40, scale=0.02)
    reports, _ = labels.derive(raw.assign(flow=identify(raw)))
    return reports, collapse(reports)


def test_a_version_of_the_same_number_with_another_bundle_is_not_the_champion(detector: Detector) -> None:
    stored = register(detector, digest=ONE)
    unbuilt = register(detector)
    assert stages.version(deployed(stored, ONE).champion).id == stored.id
    assert stages.version(deployed(stored, TWO).champion) is None
    assert stages.version(deployed(unbuilt, ONE).champion) is None
    assert stages.version(deployed("99", ONE).champion) is None


def test_the_deployed_champion_judges_whatever_zenml_has_at_stage_production(detector: Detector) -> None:
    champion, other = register(detector, digest=ONE), register(detector, digest=TWO)
    other.set_stage("production", force=True)
    judge = stages.judge(None, deployed(champion, ONE))
    assert (judge.model_version, judge.detector.id) == (champion.name, champion.get_artifact("detector").id)
    assert judge.why == "the champion"
    named = stages.judge(other.name, deployed(champion, ONE))
    assert (named.model_version, named.why) == (other.name, "as asked")


def test_where_nothing_is_deployed_the_version_at_stage_production_judges_and_it_is_said(detector: Detector) -> None:
    stored = register(detector)
    stored.set_stage("production", force=True)
    judge = stages.judge(None, Record())
    assert (judge.model_version, judge.why) == (stored.name, "at stage production, as nothing is deployed")


def test_a_champion_that_the_store_does_not_know_judges_nothing(detector: Detector) -> None:
    stored = register(detector, digest=TWO)
    stored.set_stage("production", force=True)
    with pytest.raises(ConfigError) as refused:
        stages.judge(None, deployed(stored, ONE))
    assert str(refused.value) == (
        "version 1 is in production, but this ZenML store does not know its bundle aaaaaaaaaaaa: "
        "use the ZenML store that it was trained in, or name one of 1 with --model-version"
    )


def test_the_champion_gets_the_stage_and_a_stranger_does_not(detector: Detector) -> None:
    one, two = register(detector, digest=ONE), register(detector, digest=TWO)
    stages.keep_equal(deployed(one, ONE))
    assert stages.in_production() == one.name
    stages.keep_equal(deployed(two, ONE))
    assert stages.in_production() == one.name


def test_a_difference_says_what_to_do(detector: Detector) -> None:
    assert stages.difference(Record()) is None
    one, two = register(detector, digest=ONE), register(detector, digest=TWO)
    assert "version 1 is in production, but ZenML has no version at stage" in stages.difference(deployed(one, ONE))
    stages.keep_equal(deployed(one, ONE))
    assert stages.difference(deployed(one, ONE)) is None
    assert stages.difference(deployed(two, TWO)) == (
        "version 2 is in production, but ZenML has version 1 at stage production: "
        "python run.py --pipeline train again, or --rollback, makes them equal"
    )
    same_number = stages.difference(deployed(one, TWO))
    assert "version 1 is in production, but this ZenML store does not know its bundle bbbbbbbbbbbb" in same_number
    assert "--rollback" in same_number
    assert stages.difference(Record()) == (
        "nothing is in production, but ZenML has version 1 at stage production: "
        "python run.py --pipeline train deploys again"
    )


def test_the_gate_compares_with_the_champion_by_its_digest(
    detector: Detector, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    reports, flows = tables
    learned = Exposure(np.unique(fingerprints(flows.head(100))))
    stored = register(detector, digest=ONE, learned=learned)
    scored, seen = _champion(deployed(stored, ONE).champion, *tables)
    assert isinstance(scored, Scored)
    assert scored.version == stored.name
    assert scored.flagged.sum() == detector.verdicts(reports).groupby("flow")["label"].last().eq("malicious").sum()
    assert 100 <= seen.sum() < len(flows)
    stranger, unknown = _champion(deployed(stored, TWO).champion, *tables)
    assert isinstance(stranger, Unscored)
    assert unknown is None
    for words in ("does not know its bundle bbbbbbbbbbbb", "train in the store that it came from", "--rollback"):
        assert words in stranger.reason


def test_a_lost_record_of_the_deployer_does_not_lower_the_bar(
    detector: Detector, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    assert _champion(None, *tables) == (None, None)
    stored = register(detector)
    stored.set_stage("production", force=True)
    scored, seen = _champion(None, *tables)
    assert isinstance(scored, Scored)
    assert (scored.version, seen) == (stored.name, None)


def test_a_champion_whose_files_are_gone_cannot_be_scored(
    detector: Detector, tables: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    stored = register(detector, digest=ONE)
    artifact = stored.get_artifact("detector")
    (Path(artifact.uri) / "data" / "limit.json").unlink()
    damaged, _ = _champion(deployed(stored, ONE).champion, *tables)
    assert isinstance(damaged, Unscored)
    shutil.rmtree(artifact.uri)
    gone, _ = _champion(deployed(stored, ONE).champion, *tables)
    assert isinstance(gone, Unscored)
    assert Client().get_model_version("flowsentry", stored.name).id == stored.id
