"""Charts as inline SVG, drawn without a display and without global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from flowsentry.reporting.evaluation import Pooled
from flowsentry.reporting.metrics import Bools, Floats, cumulative
from flowsentry.reporting.tables import plain

PALETTE: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D", "#8C6D1F")
"""Okabe and Ito's colours, told apart by colour-blind readers too."""
STYLES: Final = ("-", "--", "-.", ":")
BENIGN, MALICIOUS, MISSED = PALETTE[0], PALETTE[1], "#D9D9D9"
_POINTS: Final = 250
_DOTS: Final = 2500
_LOWEST_FPR: Final = 1e-4
_LOOK: Final = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#9aa1a9",
    "axes.labelcolor": "#3b424a",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "grid.color": "#e6e8eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "flowsentry",
    "text.parse_math": False,
    "xtick.color": "#5a626b",
    "ytick.color": "#5a626b",
}


def curves(panels: Sequence[tuple[str, Mapping[str, Pooled]]]) -> Markup:
    """ROC (FPR logarithmic) and precision-recall curves, a row per protocol; a dot marks what the limit does.

    Args:
        panels: title of the protocol, and the candidates' tested rows by title.
    """
    with rc_context(_LOOK):
        figure = Figure(figsize=(11, 3.5 * len(panels) + 0.6), layout="constrained")
        axes = figure.subplots(len(panels), 2, squeeze=False)
        for (title, candidates), (left, right) in zip(panels, axes, strict=True):
            for i, (name, rows) in enumerate(candidates.items()):
                look = {"color": PALETTE[i % len(PALETTE)], "linestyle": STYLES[i // 2 % len(STYLES)]}
                _curve(left, right, rows, plain(name), look)
            left.set(xscale="log", xlim=(_LOWEST_FPR, 1.05), ylim=(-0.02, 1.03))
            left.set(title=f"ROC, {title}", xlabel="false positive rate (logarithmic)", ylabel="recall")
            right.set(xlim=(-0.02, 1.03), ylim=(-0.02, 1.03))
            right.set(title=f"Precision and recall, {title}", xlabel="recall", ylabel="precision")
            left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
            left.grid(True)
            right.grid(True)
        handles, names = axes[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, names, loc="outside upper left", ncols=min(4, len(names)), handlelength=3)
        return _svg(figure)


def time_line(times: pd.DatetimeIndex, rows: Pooled, limit: float) -> Markup:
    """Scores over time, attacks found and missed, and false alarms; three charts over one clock.

    Args:
        times: of `rows`, [n], one recording.
        rows: tested rows; several of one flow (from several folds) count in proportion.
        limit: the surprise at which flows are flagged.
    """
    clock = times.tz_convert("UTC").tz_localize(None).to_numpy()
    edges = _edges(clock)
    with rc_context(_LOOK):
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        scores, attacks, alarms = figure.subplots(3, 1, sharex=True, height_ratios=(1.5, 1, 1))
        top = max(2 * limit, 1.0)
        for malicious, colour, name in ((False, BENIGN, "benign"), (True, MALICIOUS, "malicious")):
            chosen = np.flatnonzero(rows.malicious == malicious)
            chosen = np.random.default_rng(0).permutation(chosen)[:_DOTS]
            value = np.clip(rows.score[chosen], 0, top)
            scores.scatter(clock[chosen], value, s=4, c=colour, label=name, linewidths=0, rasterized=True)
        scores.axhline(limit, color="#1d2329", linewidth=1)
        scores.set(title="Surprise of tested flows (a sample), and the limit", ylabel="surprise", ylim=(0, top * 1.03))
        scores.legend(loc="upper left", ncols=2, markerscale=3)
        found = _binned(clock, edges, rows.malicious & rows.flagged)
        missed = _binned(clock, edges, rows.malicious & ~rows.flagged)
        _bars(attacks, edges, found, MALICIOUS, "flagged")
        _bars(attacks, edges, missed, MISSED, "missed", bottom=found)
        attacks.set(title="Malicious flows", ylabel="tested rows")
        attacks.legend(loc="upper left", ncols=2)
        _bars(alarms, edges, _binned(clock, edges, ~rows.malicious & rows.flagged), BENIGN, "flagged")
        alarms.set(title="False alarms: benign flows flagged", ylabel="tested rows")
        for axis in (scores, attacks, alarms):
            axis.grid(True, axis="y")
            axis.set_axisbelow(True)
        alarms.xaxis.set_major_formatter(ConciseDateFormatter(alarms.xaxis.get_major_locator()))
        return _svg(figure)


class AlertPanel(NamedTuple):
    """One recording of a chart of alerts."""

    title: str
    flows: pd.DatetimeIndex
    """[flows] when each was first reported."""
    alerts: pd.DatetimeIndex
    """[alerts] when each was raised."""
    warm: Bools
    """[alerts] raised with a warm baseline."""
    warm_from: pd.Timestamp | None
    """When the baseline was warm; None: never."""


def alerts(panels: Sequence[AlertPanel]) -> Markup:
    """Flows and alerts over time, a pair of charts per recording; the warm-up is shaded."""
    with rc_context(_LOOK):
        figure = Figure(figsize=(11, 3.4 * len(panels)), layout="constrained")
        axes = figure.subplots(2 * len(panels), 1, squeeze=False, height_ratios=(0.8, 1) * len(panels))[:, 0]
        for panel, traffic, raised in zip(panels, axes[::2], axes[1::2], strict=True):
            clock, alarms = _clock(panel.flows), _clock(panel.alerts)
            edges = _edges(clock)
            _bars(traffic, edges, _binned(clock, edges, np.ones(len(clock), bool)), "#b9c0c8", "flows")
            warm, cold = (_binned(alarms, edges, rows) for rows in (panel.warm, ~panel.warm))
            _bars(raised, edges, warm, MALICIOUS, "alerts")
            if cold.any():
                _bars(raised, edges, cold, "#E8B88F", "alerts in the warm-up", bottom=warm)
                raised.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=2)
            until = edges[-1] if panel.warm_from is None else panel.warm_from.tz_localize(None).to_datetime64()
            seconds = int((edges[1] - edges[0]) / np.timedelta64(1, "s"))
            for axis in (traffic, raised):
                axis.set(xlim=(edges[0], edges[-1]), ylabel=f"per {_span(seconds)}")
                axis.grid(True, axis="y")
                axis.set_axisbelow(True)
                axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
                axis.xaxis.set_major_formatter(ConciseDateFormatter(axis.xaxis.get_major_locator()))
                if until > edges[0]:
                    axis.axvspan(edges[0], until, color="#f1f3f5", zorder=0)
            traffic.set(title=f"Flows, {plain(panel.title)}")
            traffic.tick_params(labelbottom=False)
            raised.set(title="Alerts")
        return _svg(figure)


def answers(history: pd.DataFrame) -> Markup:
    """A replay as it went: wrong answers beside a constant model's, rates, and latency.

    Args:
        history: of `monitoring.figures.Tally`.
    """
    with rc_context(_LOOK):
        figure = Figure(figsize=(11, 6.6), layout="constrained")
        wrong, rates, latency = figure.subplots(3, 1, sharex=True)
        at = history["reports"]
        wrong.plot(at, history["constant_wrong"], color="#8d96a0", linestyle="--", label="always benign")
        wrong.plot(at, history["wrong"], color=MALICIOUS, label="the service")
        wrong.set(title="Wrong answers so far", ylabel="flows")
        for name, title, colour, line in (
            ("recall", "recall", PALETTE[0], "-"),
            ("recent_recall", "recall, recently", PALETTE[5], ":"),
            ("fpr", "false positive rate", MALICIOUS, "-"),
            ("recent_fpr", "the same, recently", PALETTE[4], ":"),
        ):
            rates.plot(at, 100 * history[name], color=colour, linestyle=line, label=title)
        rates.set(title="Rates so far", ylabel="%", ylim=(-3, 103))
        latency.plot(at, history["latency_p99"], color=PALETTE[3], label="99%")
        latency.plot(at, history["latency_p50"], color=PALETTE[2], label="50%")
        latency.set(title="Latency of requests", ylabel="ms", xlabel="reports answered", ylim=(0, None))
        for axis in (wrong, rates, latency):
            axis.grid(True, axis="y")
            axis.set_axisbelow(True)
            axis.legend(loc="lower right", bbox_to_anchor=(1, 0.97), ncols=4)
        return _svg(figure)


def _clock(times: pd.DatetimeIndex) -> NDArray[np.datetime64]:
    return np.asarray(times.tz_convert("UTC").tz_localize(None).to_numpy())


def _span(seconds: int) -> str:
    return (
        f"{seconds} s" if seconds < 120 else f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
    )


def _curve(left: Any, right: Any, rows: Pooled, name: str, look: dict[str, str]) -> None:
    positives = int(rows.malicious.sum())
    negatives = rows.malicious.size - positives
    if not positives or not negatives:
        return
    _, tp, fp = cumulative(rows.malicious, rows.score)
    recall, fpr, precision = tp / positives, fp / negatives, tp / (tp + fp)
    keep = _thin(fpr, recall)
    left.plot(np.maximum(fpr[keep], _LOWEST_FPR), recall[keep], label=name, linewidth=1.6, **look)
    right.plot(recall[keep], precision[keep], linewidth=1.6, **look)
    hits = int((rows.malicious & rows.flagged).sum())
    alarms = int(rows.flagged.sum()) - hits
    mark = {"color": look["color"], "marker": "o", "markersize": 6, "markeredgecolor": "white"}
    left.plot([max(alarms / negatives, _LOWEST_FPR)], [hits / positives], **mark)
    if hits + alarms:
        right.plot([hits / positives], [hits / (hits + alarms)], **mark)


def _thin(fpr: Floats, recall: Floats) -> NDArray[np.int64]:
    """Points that keep the shape of both curves: even steps in recall and in the logarithm of FPR."""
    steps = np.linspace(0, 1, _POINTS)
    by_recall = np.searchsorted(recall, steps * recall[-1])
    by_fpr = np.searchsorted(fpr, np.geomspace(_LOWEST_FPR, 1, _POINTS))
    chosen = np.unique(np.concatenate([[0], by_recall, by_fpr, [fpr.size - 1]]))
    return np.asarray(chosen[chosen < fpr.size], np.int64)


def _edges(clock: NDArray[np.datetime64], bins: int = 110) -> NDArray[np.datetime64]:
    first, last = clock.min().astype("datetime64[s]"), clock.max().astype("datetime64[s]")
    width = max(1, -(-int((last - first) / np.timedelta64(1, "s") + 1) // bins))
    return np.asarray(first + np.arange(bins + 1) * np.timedelta64(width, "s"))


def _binned(clock: NDArray[np.datetime64], edges: NDArray[np.datetime64], rows: Bools) -> Floats:
    counts, _ = np.histogram(clock[rows].astype("datetime64[s]").astype(np.int64), edges.astype(np.int64))
    return counts.astype(np.float64)


def _bars(axis: Any, edges: Any, height: Floats, colour: str, name: str, bottom: Floats | None = None) -> None:
    axis.bar(edges[:-1], height, width=edges[1] - edges[0], align="edge", color=colour, label=name, bottom=bottom)


def _svg(figure: Any) -> Markup:
    out = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(out, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])
