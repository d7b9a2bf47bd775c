"""The live page, as Streamlit runs it. What it says is computed in `figures`; here it is laid out.

Names of families, files and models come from outside: in Markdown every punctuation mark of theirs is escaped, so that
nothing of them is a link, an image or a colour.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import altair as alt
import pandas as pd
import streamlit as st

from flowsentry.errors import StoreError
from flowsentry.flows.schema import BENIGN, MALICIOUS
from flowsentry.monitoring import journal as journals
from flowsentry.monitoring.figures import (
    SILENT_SECONDS,
    WINDOW,
    Card,
    Finding,
    Progress,
    Standing,
    Tally,
    card_of,
    findings,
)
from flowsentry.monitoring.journal import NARROW, Header, Model, Reader

REFRESH_SECONDS: Final = 2.0
ALERTS: Final = 9
HEIGHT: Final = 270
LEAST_FPR_SCALE: Final = 0.01
NEWEST: Final = "newest"

RIGHT, MISSED, FALSE_ALARM = "#0072B2", "#D55E00", "#E69F00"
REFERENCE, CONSTANT = "#333333", "#B9C0C8"
PALETTE: Final = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C6D1F"]
"""Okabe and Ito's colours, told apart by colour-blind readers too."""
DASHES: Final = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
State = tuple[Path | None, int, float | None, bool]
"""What is shown: which journal, reports in it, when it was finished, whether it stands still."""
SINCE, RECENTLY = "since the beginning", f"last {WINDOW} reports"


def main() -> None:
    """Show the journal named on the command line, or one of those in the user's folder."""
    st.set_page_config(page_title="FlowSentry live", layout="wide")
    named = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    title, chooser = st.columns([3, 1], vertical_alignment="bottom")
    title.header("FlowSentry: replay against the live service", anchor=False)
    chosen = NEWEST if named else _choice(chooser)
    path = _path(named, chosen)
    state = _state(path)
    if path is None:
        _nothing_yet()
    else:
        try:
            _show(path)
        except StoreError as error:
            st.error(_plain(str(error)))
    st.fragment(_watch, run_every=REFRESH_SECONDS)(named, chosen, state)


def _watch(named: Path | None, chosen: str, shown: State) -> None:
    """Draw the page again if there is something new: drawing costs more than looking."""
    if _state(_path(named, chosen)) != shown:
        st.rerun()


def _state(path: Path | None) -> State:
    if path is None:
        return (None, 0, None, False)
    try:
        with Reader(path) as reader:
            tally: Tally | None = st.session_state.get("tally")
            silent = tally is not None and _silent_seconds(tally, reader.header) > SILENT_SECONDS
            return (path, reader.count, reader.finished, silent)
    except StoreError:
        return (path, -1, None, False)


def _silent_seconds(tally: Tally, header: Header) -> float:
    return time.time() - (tally.last_sent.timestamp() if tally.last_sent is not None else header.begun)


def _show(path: Path) -> None:
    with Reader(path) as reader:
        tally = _tally(path, reader)
        models, finished = reader.models, reader.finished
        header, alerts = reader.header, reader.alerts(ALERTS * 20)
    card = card_of(models[-1].description) if models else None
    _begin(header, models, tally, finished)
    if not tally.rows:
        st.info("The replay has begun; nothing is answered yet.")
        return
    progress = Progress(header.total, finished is not None, _silent_seconds(tally, header))
    _banners(findings(tally, card, progress), card)
    _numbers(tally.standing)
    _charts(tally, card)
    _alerts(alerts)
    if models:
        _champion(models[-1])


def _choice(place: Any) -> str:
    names = [NEWEST, *(path.stem for path in journals.journals(journals.folder()))]
    if len(names) == 1:
        return NEWEST
    chosen = place.selectbox("Replay", names, format_func=lambda name: "the newest" if name == NEWEST else name)
    return str(chosen)


def _path(named: Path | None, chosen: str) -> Path | None:
    if named is not None:
        return named
    found = journals.journals(journals.folder())
    return next((path for path in found if path.stem == chosen), found[0] if found else None)


def _nothing_yet() -> None:
    st.info("There is no replay yet. With a service at work (`python run.py --pipeline train` deploys one), run:")
    st.code("python -m flowsentry replay simulate --speed 10x\npython -m flowsentry replay flows.csv", language="bash")
    st.caption("This page shows it as soon as it begins.")


def _tally(path: Path, reader: Reader) -> Tally:
    """The running scores of a journal, brought up to date with what is new in it."""
    key = (str(path), reader.header)
    if st.session_state.get("shown") != key:
        st.session_state["shown"], st.session_state["tally"] = key, Tally()
    tally: Tally = st.session_state["tally"]
    while not (rows := reader.read(tally.position, columns=NARROW)).empty:
        tally.take(rows)
    return tally


def _begin(header: Header, models: Sequence[Model], tally: Tally, finished: float | None) -> None:
    version = f"model version **{_plain(models[-1].version)}**" if models else "no model has answered"
    changed = f" (the {len(models)}th to answer in this replay)" if len(models) > 1 else ""
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(header.begun))
    cold = f" · {tally.cold:,} flows judged before the baseline was warm" if tally.cold else ""
    st.markdown(
        f"{_plain(header.source)} · {version}{changed} · {_plain(header.pace)} · begun {began} · "
        f"{tally.flows:,} flows{cold}"
    )
    state = "sent; finished" if finished else "sent"
    st.progress(
        min(tally.rows / header.total, 1.0) if header.total else 1.0,
        text=f"{tally.rows:,} of {header.total:,} reports {state}",
    )


def _banners(found: Sequence[Finding], card: Card | None) -> None:
    for finding in found:
        if finding.code == "constant":
            st.error(f"### This model is of no use\n\n{_plain(finding.text)}", icon=":material/dangerous:")
        elif finding.severity == "bad":
            st.error(f"**{_plain(finding.text)}**", icon=":material/error:")
        else:
            st.warning(_plain(finding.text), icon=":material/info:")
    if not found:
        compared = "as good as its card says" if card else "its card has no scores to compare with"
        st.success(f"Not constant, not skewed, nothing lost; {compared}.", icon=":material/check_circle:")


def _numbers(standing: Standing) -> None:
    constant = standing.always(BENIGN)
    tiles = [
        ("Right", f"{standing.right:,}", f"{_percent(standing.accuracy)} of the flows"),
        ("Wrong", f"{standing.wrong:,}", f"always “benign”: {constant.wrong:,}"),
        ("Recall", _percent(standing.recall), f"{standing.tp:,} of {standing.malicious:,} attacks"),
        ("Precision", _percent(standing.precision), f"{standing.tp:,} of {standing.alarms:,} alarms"),
        (
            "False alarms",
            _percent(standing.fpr),
            f"{standing.fp:,} of {standing.benign:,} benign",
        ),
        ("Balanced accuracy", _percent(standing.balanced_accuracy), "constant answer: 50%"),
    ]
    for place, (name, value, beside) in zip(st.columns(len(tiles)), tiles, strict=True):
        with place.container(border=True):
            st.metric(name, value)
            st.caption(beside)


def _charts(tally: Tally, card: Card | None) -> None:
    past = tally.history()
    left, right = st.columns([2, 1])
    left.subheader("Answers so far", anchor=False)
    left.altair_chart(_answers(past), width="stretch")
    left.caption(
        "Flows by their latest verdict. Dashed: the right answers of a model that always says “benign”. "
        "A model that finds attacks is above it."
    )
    right.subheader("Beside a constant answer", anchor=False)
    right.altair_chart(_beside_constants(tally.standing, "balanced_accuracy", "balanced accuracy"), width="stretch")
    right.altair_chart(_beside_constants(tally.standing, "accuracy", "share of right answers"), width="stretch")
    right.caption("Where one class is rare, right answers flatter a constant answer; balanced accuracy does not.")

    left, right = st.columns(2)
    left.subheader("Recall by family", anchor=False)
    if tally.families:
        which = left.segmented_control("Recall", [SINCE, RECENTLY], default=SINCE, label_visibility="collapsed")
        column = "recent_recall" if which == RECENTLY else "recall"
        left.altair_chart(_recall(tally.family_history(), column, tally.families), width="stretch")
        right.subheader("Families", anchor=False)
        _families(right, tally, card)
    else:
        left.info("No malicious flow so far.")

    left, right = st.columns(2)
    left.subheader("False alarms, share of benign flows", anchor=False)
    left.altair_chart(_false_alarms(past, card), width="stretch")
    right.subheader("Latency of a request, ms", anchor=False)
    right.altair_chart(_latency(past), width="stretch")


def _answers(past: pd.DataFrame) -> Any:
    names = {"right": "right", "missed": "missed attacks", "false_alarms": "false alarms"}
    long = past.rename(columns=names).melt("reports", list(names.values()), "answer", "flows")
    long["order"] = long["answer"].map({name: i for i, name in enumerate(names.values())})
    areas = (
        alt.Chart(long)
        .mark_area(opacity=0.85, line=False)
        .encode(
            _reports(),
            alt.Y("flows:Q", title="flows", stack="zero"),
            alt.Color(
                "answer:N",
                scale=alt.Scale(domain=list(names.values()), range=[RIGHT, MISSED, FALSE_ALARM]),
                legend=_legend(),
            ),
            order="order:Q",
            tooltip=["reports:Q", "answer:N", "flows:Q"],
        )
    )
    constant = past.assign(flows=past["right"] + past["wrong"] - past["constant_wrong"])
    line = (
        alt.Chart(constant).mark_line(color=REFERENCE, strokeDash=[6, 4], strokeWidth=2).encode(_reports(), y="flows:Q")
    )
    return alt.layer(areas, line).properties(height=HEIGHT + 30)


def _beside_constants(standing: Standing, measure: str, title: str) -> Any:
    who = {
        "this model": standing,
        "always “benign”": standing.always(BENIGN),
        "always “malicious”": standing.always(MALICIOUS),
    }
    table = pd.DataFrame(
        [(name, getattr(its, measure)) for name, its in who.items()], columns=["model", "share"]
    ).dropna()
    base = alt.Chart(table.astype({"share": "float64"})).encode(
        alt.X("share:Q", title=None, scale=alt.Scale(domain=[0, 1.2]), axis=None),
        alt.Y("model:N", title=None, sort=list(who), axis=alt.Axis(labelLimit=150, ticks=False, domain=False)),
    )
    colour = alt.Color("model:N", scale=alt.Scale(domain=list(who), range=[RIGHT, *[CONSTANT] * 2]), legend=None)
    bars = base.mark_bar(height=22).encode(color=colour, tooltip=["model:N", alt.Tooltip("share:Q", format=".1%")])
    text = base.mark_text(align="left", dx=5, color=REFERENCE).encode(text=alt.Text("share:Q", format=".1%"))
    return alt.layer(bars, text).properties(height=132, title=alt.Title(title, fontSize=13, anchor="start"))


def _recall(table: pd.DataFrame, column: str, families: Sequence[str]) -> Any:
    return (
        alt.Chart(table)
        .mark_line(strokeWidth=2.5, interpolate="step-after")
        .encode(
            _reports(),
            alt.Y(f"{column}:Q", title="recall", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
            alt.Color(
                "family:N",
                scale=alt.Scale(domain=list(families), range=_repeated(PALETTE, len(families))),
                legend=_legend(),
            ),
            alt.StrokeDash(
                "family:N", scale=alt.Scale(domain=list(families), range=_repeated(DASHES, len(families))), legend=None
            ),
            tooltip=["reports:Q", "family:N", "flows:Q", "flagged:Q", alt.Tooltip(f"{column}:Q", format=".1%")],
        )
        .properties(height=HEIGHT)
    )


def _families(place: Any, tally: Tally, card: Card | None) -> None:
    recent = tally.family_history().groupby("family")["recent_recall"].last()
    rows = []
    for name in tally.families:
        share, promised = tally.family(name), card.families.get(name) if card else None
        rows.append(
            {
                "family": name,
                "flows": share.flows,
                "found": share.flagged,
                "recall": share.rate,
                RECENTLY: recent.get(name),
                "card": promised.rate if promised else None,
            }
        )
    percent = st.column_config.NumberColumn(format="percent")
    place.dataframe(
        pd.DataFrame(rows).sort_values("recall", ignore_index=True),
        hide_index=True,
        column_config={
            "recall": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1),
            RECENTLY: percent,
            "card": percent,
        },
    )
    place.caption("Card: recall on the validation flows of the training run. The worst family first.")


def _false_alarms(past: pd.DataFrame, card: Card | None) -> Any:
    names = {"fpr": SINCE, "recent_fpr": RECENTLY}
    long = past.rename(columns=names).melt("reports", list(names.values()), "span", "share").dropna()
    promised = card.benign.rate if card else None
    top = max(1.1 * long["share"].max(), 1.5 * (promised or 0), LEAST_FPR_SCALE) if len(long) else 1.0
    lines = (
        alt.Chart(long)
        .mark_line(strokeWidth=2)
        .encode(
            _reports(),
            alt.Y("share:Q", title=None, axis=alt.Axis(format="~%", tickCount=5), scale=alt.Scale(domain=[0, top])),
            alt.Color(
                "span:N", scale=alt.Scale(domain=list(names.values()), range=[MISSED, FALSE_ALARM]), legend=_legend()
            ),
            tooltip=["reports:Q", "span:N", alt.Tooltip("share:Q", format=".2%")],
        )
    )
    if promised is None:
        return alt.layer(lines).properties(height=HEIGHT)
    rule = alt.Chart(pd.DataFrame({"share": [promised], "name": ["its card"]})).encode(y="share:Q")
    return alt.layer(
        lines,
        rule.mark_rule(color=REFERENCE, strokeDash=[6, 4], strokeWidth=2),
        rule.mark_text(align="right", baseline="bottom", dx=-4, dy=-3, color=REFERENCE).encode(
            x=alt.value("width"), text="name:N"
        ),
    ).properties(height=HEIGHT)


def _latency(past: pd.DataFrame) -> Any:
    names = {"latency_p50": "median", "latency_p99": "99 of 100 are faster"}
    long = past.rename(columns=names).melt("reports", list(names.values()), "latency", "ms").dropna()
    return (
        alt.Chart(long)
        .mark_line(strokeWidth=2)
        .encode(
            _reports(),
            alt.Y("ms:Q", title=None, scale=alt.Scale(type="log"), axis=alt.Axis(format="~g", tickCount=5)),
            alt.Color(
                "latency:N", scale=alt.Scale(domain=list(names.values()), range=[RIGHT, MISSED]), legend=_legend()
            ),
            tooltip=["reports:Q", "latency:N", alt.Tooltip("ms:Q", format=".1f")],
        )
        .properties(height=HEIGHT)
    )


def _alerts(alerts: pd.DataFrame) -> None:
    st.subheader("Last alerts", anchor=False)
    if alerts.empty:
        st.info("No alert so far.")
        return
    latest = alerts.drop_duplicates("flow").head(ALERTS)
    truth = latest["family"].where(latest["family"].notna(), latest["expected"])
    table = pd.DataFrame(
        {
            "time": latest["time"],
            "from": _ends(latest, "src"),
            "to": _ends(latest, "dst").str.cat(("/" + latest["transport"].astype("string")).fillna("")),
            "alarm": latest["anomaly_type"],
            "reason": latest["reason"],
            "score": latest["anomaly_score"],
            "truth": truth.mask(latest["expected"].eq(BENIGN), "benign: false alarm").fillna("unknown"),
        }
    )
    st.dataframe(
        table,
        hide_index=True,
        column_config={
            "time": st.column_config.DatetimeColumn(format="HH:mm:ss", width=70),
            "from": st.column_config.TextColumn(width=150),
            "to": st.column_config.TextColumn(width=160),
            "alarm": st.column_config.TextColumn(width=90),
            "reason": st.column_config.TextColumn(width=580),
            "score": st.column_config.NumberColumn(format="%.1f", width=50),
            "truth": st.column_config.TextColumn(width=120),
        },
    )
    st.caption(f"A flow is called malicious from the score {latest['threshold'].iloc[0]:.2f} on.")


def _champion(model: Model) -> None:
    said = model.description
    card = said.get("card")
    card = card if isinstance(card, Mapping) else {}
    about = card.get("model")
    name = about.get("title") if isinstance(about, Mapping) else None
    st.subheader("The champion’s card", anchor=False)
    facts = {
        "model": name,
        "version": model.version,
        "view": " ".join(str(said[key]) for key in ("view", "view_version") if key in said),
        "limit": f"{threshold:.2f}" if isinstance(threshold := said.get("threshold"), float) else None,
    }
    st.markdown(" · ".join(f"{key} **{_plain(str(value))}**" for key, value in facts.items() if value))
    rows = _protocols(card)
    if rows:
        percent = st.column_config.NumberColumn(format="percent")
        st.dataframe(pd.DataFrame(rows), hide_index=True, column_config=dict.fromkeys(_RATES.values(), percent))
    limits = card.get("limits")
    if isinstance(limits, list) and limits:
        with st.expander("What it cannot do"):
            st.markdown("\n".join(f"- {_plain(str(line))}" for line in limits))


_RATES: Final = {
    ("recall", "mean"): "recall",
    ("recall", "worst"): "recall, worst",
    ("fpr", "mean"): "false alarms",
    ("fpr", "worst"): "false alarms, worst",
    ("balanced_accuracy", "mean"): "balanced accuracy",
}


def _protocols(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    try:
        for protocol, by_labels in card["protocols"].items():
            rates = by_labels["corrected"]["rates"]
            rows.append(
                {"protocol": str(protocol)} | {name: rates[rate][spread] for (rate, spread), name in _RATES.items()}
            )
    except (KeyError, TypeError, AttributeError):
        return []
    return rows


def _reports() -> alt.X:
    return alt.X(
        "reports:Q", title="reports sent", axis=alt.Axis(format=",d", tickCount=6), scale=alt.Scale(nice=False)
    )


def _legend() -> alt.Legend:
    return alt.Legend(title=None, orient="top", labelLimit=180, columns=4)


def _repeated(values: Sequence[Any], count: int) -> list[Any]:
    return [values[i % len(values)] for i in range(count)]


def _ends(alerts: pd.DataFrame, side: str) -> pd.Series:
    port = alerts[f"{side}_port"].astype("string")
    return alerts[f"{side}_ip"].astype("string").str.cat((":" + port).fillna(""))


def _percent(share: float | None) -> str:
    if share is None:
        return "–"
    return f"{share:.2%}" if 0 < share < 0.01 or 0.99 < share < 1 else f"{share:.1%}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&=\"'/@^])", r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    main()
