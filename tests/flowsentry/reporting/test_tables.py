from __future__ import annotations

import pandas as pd
import pytest

from flowsentry.features.splits import Fold, Splits
from flowsentry.reporting import tables
from flowsentry.reporting.evaluation import evaluate


def _row(table, start):
    return next(row for row in table.rows if row[0].startswith(start))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (1.0, "100.00"), (0.99999, "99.99"), (0.5, "50.00"), (0.00004, "0.00"), (0.0, "0.00")],
)
def test_percent_keeps_perfect_for_perfect(value, text):
    assert tables.percent(value) == text


def test_side_by_side_shows_every_protocol_and_the_study(evaluation):
    table = tables.side_by_side(evaluation, "corrected")
    assert table.header[:6] == ("model", "study", "random own", "random acc", "random rec", "random FPR")
    tree = dict(zip(table.header, _row(table, "Decision tree"), strict=True))
    assert tree["study"] == "100.0"
    assert (tree["random own"], tree["random acc"]) == ("83.33", "66.67")
    assert (tree["family rec"], tree["family FPR"]) == ("75.00", "25.00")
    assert _row(table, "· Flow id (id)")[1] == "–"


def test_families_show_mean_and_worst(evaluation):
    table = tables.families(evaluation, "corrected")
    assert _row(table, "shell") == ("shell", "3", "50.00/33.33")
    assert _row(table, "flood") == ("flood", "2", "100.00")
    assert _row(table, "FPR")[2] == "25.00/50.00"


def test_markdown_has_all_tables_and_the_reasons(evaluation):
    text = evaluation.to_markdown()
    for title in ("side by side, published", "side by side, corrected", "Recall per family", "FPR by place"):
        assert title in text
    assert "recording was not possible: there is one recording" in text
    assert "cut of time" in text
    assert "Scorpoi" in text
    assert "warm-up (not scored)" not in text


def test_terminal_text_fits_and_holds_the_figures(evaluation):
    text = evaluation.summary_text()
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert "75.00" in text
    assert "study: Scorpoi" in text
    assert "50.00/33.33" in text


def test_many_candidates_with_long_titles_still_fit(flows, splits, model_scores):
    names = [f"candidate_{i}" for i in range(9)]
    folds = (*splits.folds, Fold("recording/x", "recording", "x", 0, "a note " * 40))
    parts = splits.parts.assign(**{"recording/x": splits.parts["time"]})
    more = model_scores[model_scores["fold"] == "time"].assign(fold="recording/x")
    scores = model_scores.astype({"fold": object})
    evaluation = evaluate(
        flows,
        Splits(parts, folds, {}),
        {name: pd.concat([scores, more]) for name in names},
        {},
        titles={name: f"A candidate with a very long title indeed {name}" for name in names},
        uses_identity={},
        limit=2.0,
        data={"view": "paper"},
    )
    text = evaluation.summary_text()
    assert max(map(len, text.splitlines())) <= tables.WIDTH
    assert text.count("50.00/33.33") == 9


def test_names_from_data_cannot_break_out(flows, splits, model_scores):
    evil = "a|b\x1b[31m\n[bold]<script>alert(1)</script>"
    named = flows.assign(family=flows["family"].cat.rename_categories({"shell": evil}))
    evaluation = evaluate(
        named, splits, {"m": model_scores}, {}, titles={"m": evil}, uses_identity={}, limit=2.0, data={"view": evil}
    )
    assert "\x1b" not in evaluation.summary_text()
    assert "[bold]" in evaluation.summary_text().replace("\n", "")
    text = evaluation.to_markdown()
    assert "\x1b" not in text
    assert "a\\|b?" in text
    assert "\\<script\\>" in text
    assert "<script>" not in text
