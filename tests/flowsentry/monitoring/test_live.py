from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from flowsentry.monitoring import live
from flowsentry.monitoring.journal import Header, Journal, Model, folder
from tests.flowsentry.monitoring.conftest import ROOT

PAGE = ROOT / "flowsentry" / "monitoring" / "live_page.py"
CARD = {
    "model": {"title": "Logistic regression"},
    "validation": {
        "corrected": {
            "counts": {"tp": 95, "fp": 1, "tn": 999, "fn": 5},
            "families": {"flood": {"flows": 100, "flagged": 95, "rate": 0.95}},
        }
    },
    "protocols": {
        "time": {
            "corrected": {
                "rates": {
                    name: {"mean": 0.625, "worst": 0.5}
                    for name in ("recall", "fpr", "balanced_accuracy", "accuracy", "precision")
                }
            }
        }
    },
    "limits": ["Misses ![much](http://198.51.100.1/x.png)."],
}
HOSTILE = "![x](http://198.51.100.1/x.png) <b>:red[y]"


def fill(
    name: str, *, benign: int = 300, malicious: int = 60, recall: float = 1.0, family: str = "flood", **header: Any
) -> Path:
    """A journal of a replay in which this share of the malicious flows was found."""
    path = folder() / f"{name}.replay"
    count = benign + malicious
    about = Header("replay-1", "flows.csv", "ab" * 32, count, "10x", "http://127.0.0.1:1", time.time())
    is_malicious = np.random.default_rng(0).permutation(count) < malicious
    found = is_malicious & (np.cumsum(is_malicious) <= round(recall * malicious))
    with Journal.create(path, Header(**{**vars(about), **header})) as journal:
        journal.add_model(Model(0, "7", {"view": "behaviour", "view_version": "1", "threshold": 3.0, "card": CARD}))
        journal.add(
            [
                {
                    "position": i,
                    "flow": i,
                    "flow_id": f"id {i}",
                    "time": 1_700_000_000_000,
                    "src_ip": "10.0.0.1",
                    "dst_ip": "10.0.0.2",
                    "src_port": None,
                    "dst_port": 22,
                    "transport": "tcp",
                    "expected": "malicious" if is_malicious[i] else "benign",
                    "family": family if is_malicious[i] else None,
                    "verdict": "malicious" if found[i] else "benign",
                    "rejected": None,
                    "anomaly_score": 4.0 if found[i] else 0.0,
                    "threshold": 3.0,
                    "warm": True,
                    "anomaly_type": "flood" if found[i] else None,
                    "reason": "900 flows in 10 s" if found[i] else None,
                    "request": i,
                    "latency_ms": 2.0,
                    "sent": int(time.time() * 1000),
                }
                for i in range(count)
            ]
        )
        journal.finish()
    return path


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSENTRY_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(PAGE)])


def shown() -> AppTest:
    page = AppTest.from_file(str(PAGE), default_timeout=60).run()
    assert not page.exception, [error.value for error in page.exception]
    return page


def text(page: AppTest) -> str:
    parts = [*page.header, *page.subheader, *page.markdown, *page.caption, *page.info, *page.error, *page.success]
    return "\n".join(part.value for part in parts)


def numbers(page: AppTest) -> dict[str, str]:
    return {metric.label: metric.value for metric in page.metric}


def test_without_a_replay_it_says_what_to_run() -> None:
    page = shown()
    assert "There is no replay yet" in page.info[0].value
    assert "python -m flowsentry replay" in page.code[0].value


def test_a_healthy_replay_is_shown_with_its_numbers_and_its_models_card() -> None:
    fill("20260101T000000-a", recall=0.95)
    page = shown()
    assert numbers(page) == {
        "Right": "357",
        "Wrong": "3",
        "Recall": "95.0%",
        "Precision": "100.0%",
        "False alarms": "0.0%",
        "Balanced accuracy": "97.5%",
    }
    assert [s.value for s in page.success] == ["Not constant, not skewed, nothing lost; as good as its card says."]
    assert not page.error
    families, alerts, protocols = (frame.value for frame in page.dataframe)
    assert families.iloc[0][["family", "flows", "found", "card"]].tolist() == ["flood", 60, 57, 0.95]
    assert alerts["reason"].eq("900 flows in 10 s").all()
    assert alerts["to"].iloc[0] == "10.0.0.2:22/tcp"
    assert protocols.iloc[0][["protocol", "recall", "recall, worst"]].tolist() == ["time", 0.625, 0.5]


def test_a_constant_model_is_called_useless_at_the_top() -> None:
    fill("20260101T000000-a", recall=0.0)
    page = shown()
    assert len(page.error) == 1
    assert page.error[0].value.startswith("### This model is of no use")
    assert "this model finds nothing" in page.error[0].value
    assert numbers(page)["Balanced accuracy"] == "50.0%"
    assert not page.success


def test_the_newest_replay_is_shown_and_others_can_be_chosen() -> None:
    fill("20260101T000000-old", source="old flows")
    fill("20260201T000000-new", source="new flows")
    page = shown()
    assert "new flows" in text(page)
    page.selectbox[0].select("20260101T000000-old").run()
    assert "old flows" in text(page)
    assert "new flows" not in text(page)


def test_the_replay_named_on_the_command_line_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    old = fill("20260101T000000-old", source="old flows")
    fill("20260201T000000-new", source="new flows")
    monkeypatch.setattr(sys, "argv", [str(PAGE), str(old)])
    page = shown()
    assert "old flows" in text(page)
    assert not page.selectbox


def test_names_from_outside_are_neither_links_nor_images() -> None:
    fill("20260101T000000-a", recall=0.3, family=HOSTILE, source=HOSTILE)
    told = text(shown())
    assert "198" in told
    for markup in ("![", "](", "http:", "<b>", ":red["):
        assert markup not in told


def test_a_damaged_journal_is_told_on_the_page() -> None:
    (folder() / "20260101T000000-a.replay").write_bytes(b"no journal" * 100)
    assert "not a replay" in shown().error[0].value


def test_the_server_answers_on_this_machine_alone_and_ends_when_told(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "flowsentry", "live", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5) as answer:
                    assert answer.read() == b"ok"
                break
            except OSError:
                assert time.monotonic() < limit
                assert server.poll() is None
                time.sleep(0.1)
        with socket.socket() as other, pytest.raises(OSError):
            other.settimeout(2)
            other.connect(("127.0.0.2", port))
    finally:
        server.terminate()
        assert server.wait(10) == 0
    assert f"http://127.0.0.1:{port}" in log.read_text()


def test_nothing_is_sent_or_fetched() -> None:
    options = live.command(8501, None)
    assert "--browser.gatherUsageStats=false" in options
    assert "--server.address=127.0.0.1" in options
    assert "--server.fileWatcherType=none" in options
