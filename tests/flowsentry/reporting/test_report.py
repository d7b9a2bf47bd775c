from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from flowsentry.features.splits import Splits
from flowsentry.features.views import Feature, FeatureSet, ViewManifest
from flowsentry.reporting.evaluation import evaluate
from flowsentry.reporting.report import evaluation_html, view_html

EVIL = "<script>alert('x')</script>$\\frac$&\"'>"
VOID = {"meta", "br", "path", "image", "use", "link"}


class _Page(HTMLParser):
    """Checks that tags are balanced and collects what would load or run something."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.tags, self.data = [], [], set(), []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action") and not value.startswith(("#", "data:")):
                self.loads.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.data.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.data))


@pytest.fixture
def page(evaluation, flows, splits, model_scores):
    return evaluation_html(evaluation, flows, splits, {"decision_tree": model_scores})


def test_the_page_stands_alone(page):
    parsed = _Page(page)
    assert parsed.loads == []
    assert not parsed.tags & {"script", "iframe", "object", "embed", "link"}
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert len(page) < 3_000_000


def test_the_page_holds_every_part(page):
    text = _Page(page).text
    for part in (
        "All protocols side by side",
        "What fooled the random split",
        "Recall per attack family",
        "False alarms by place",
        "ROC, families never trained on",
        "Precision and recall, later flows",
        "Confusion matrices",
        "Time line: Decision tree",
        "recording was not possible: there is one recording",
        "Scorpoi",
    ):
        assert part in text
    assert page.count("<svg") == 2


def test_the_page_shows_the_figures(page):
    cells = [re.sub(r"<[^>]+>|\s", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", page, re.S)]
    assert "50.0033.33" in cells
    assert "83.33" in cells
    assert "266.67%133.33%133.33%266.67%" in cells


def test_the_time_line_is_of_the_named_candidate(evaluation, flows, splits, model_scores):
    page = evaluation_html(evaluation, flows, splits, {"flow_id": model_scores}, best="flow_id")
    assert "Time line: Flow id" in page


def test_names_from_data_are_escaped(flows, splits, model_scores):
    named = flows.assign(
        family=flows["family"].cat.rename_categories({"shell": EVIL}),
        place=flows["place"].cat.rename_categories({"victim": EVIL}),
        recording=pd.Categorical([EVIL] * 12),
    )
    impossible = Splits(splits.parts, splits.folds, {EVIL: EVIL})
    evaluation = evaluate(
        named,
        impossible,
        {"m": model_scores},
        {},
        titles={"m": EVIL},
        uses_identity={},
        limit=2.0,
        data={"view": EVIL, EVIL: {EVIL: EVIL}, "list": [EVIL]},
    )
    page = evaluation_html(evaluation, named, impossible, {"m": model_scores})
    assert "script" not in _Page(page).tags
    assert "alert('x')" in _Page(page).text


def test_flows_without_attacks_or_protocols_still_make_a_page(flows, splits, model_scores):
    benign = flows.assign(label="benign", corrected="benign", family=None, group=None)
    for some in (splits, Splits(splits.parts[[]], (), {"random": "too few flows"})):
        evaluation = evaluate(
            benign, some, {"m": model_scores}, {}, titles={}, uses_identity={}, limit=2.0, data={"none": None}
        )
        page = evaluation_html(evaluation, benign, some, {"m": model_scores})
        assert "nan" not in _Page(page).text.lower().split()
    assert "random was not possible: too few flows" in page
    assert "too few flows" in evaluation.summary_text()
    assert "too few flows" in evaluation.to_markdown()


def test_an_infinite_surprise_can_be_drawn(evaluation, flows, splits, model_scores):
    infinite = model_scores.assign(score=model_scores["score"].where(model_scores["score"] < 3, np.inf))
    assert "<svg" in evaluation_html(evaluation, flows, splits, {"decision_tree": infinite})


def _view(*features, **columns):
    rows = pd.DataFrame({"flow": np.arange(4), **columns})
    manifest = ViewManifest(
        name="paper",
        version="1",
        features=features,
        warm_up_seconds=0,
        digest="ab" * 32,
        lineage={"file": EVIL},
        statistics={"bytes": {"mean": 250.25, "std": 432.0, "q50": 0.5, "q99": 1000.0}},
    )
    return FeatureSet(manifest, rows)


def test_view_page_describes_every_feature():
    view = _view(
        Feature(name="bytes", unit="bytes", description=EVIL, harm=1, minimum_effect=17),
        Feature(name="src_ip", unit="", description="source address", kind="category"),
        bytes=[0.0, 1.0, np.nan, 1000.0],
        src_ip=pd.Categorical([EVIL, EVIL, "10.0.0.1", "10.0.0.1"]),
    )
    page = view_html(view, pd.Series(["benign", "benign", "malicious", None], index=range(4), dtype="category"))
    parsed = _Page(page)
    assert "script" not in parsed.tags
    assert parsed.loads == []
    assert "benign (2)" in parsed.text
    assert "malicious (1)" in parsed.text
    for part in ("higher is worse", "250", "ab" * 32, "alert('x')", "100.0 %"):
        assert part in parsed.text
    assert page.count('class="benign" d="M0 44') == 1
    assert ">log<" in page


def test_histogram_shows_the_share_of_each_class():
    view = _view(Feature(name="flag", unit="", description="", kind="flag"), flag=[0, 0, 0, 1])
    page = view_html(view, pd.Series(["benign", "benign", "malicious", "malicious"], index=range(4)))
    benign = re.search(r'class="benign" d="([^"]+)"', page).group(1)
    malicious = re.search(r'class="malicious" d="([^"]+)"', page).group(1)
    assert benign.startswith("M0 44V0.0H5.0")
    half = 44 * (1 - 0.5**0.5)
    assert malicious.startswith(f"M0 44V{half:.1f}H5.0")
    assert f"V{half:.1f}H240.0V44Z" in malicious


def test_view_page_without_labels_or_finite_values():
    view = _view(
        Feature(name="bytes", unit="bytes", description="all missing"),
        Feature(name="same", unit="", description="constant"),
        bytes=[np.nan] * 4,
        same=[3] * 4,
    )
    page = view_html(view, pd.Series([None] * 4, index=range(4), dtype="category"))
    assert "all (4)" in _Page(page).text
    assert page.count("<svg") == 1
