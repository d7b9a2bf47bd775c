"""The evaluation's tables as rows of text, and their two plain renderings: Markdown and the terminal.

Rates are in percent. Text from data is made harmless for the medium it goes to.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from flowsentry.reporting.study import STUDY

if TYPE_CHECKING:
    from flowsentry.reporting.results import Entry, Evaluation, Labels

NONE: Final = "–"
WIDTH: Final = 110
_FIGURES: Final = {"own": "own", "accuracy": "acc", "recall": "rec", "fpr": "FPR"}
_LEGEND: Final = (
    "All figures in %. own: accuracy of the model's own predict; acc, rec, FPR: accuracy, recall and false "
    "positive rate at the limit; rec under family: mean over the families that training never saw."
)


class Table(NamedTuple):
    """A table for people: the first `names` columns are text, the others figures."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    names: int = 1


def percent(value: float | None, digits: int = 2) -> str:
    """A rate in percent without the sign; a dash where it is undefined. Never rounds to a perfect score."""
    if value is None:
        return NONE
    text = f"{100 * value:.{digits}f}"
    if value < 1 and float(text) == 100:
        return f"{100 - 10**-digits:.{digits}f}"
    return text


def plain(text: object) -> str:
    """Text from data on one line; what is not printable (escape sequences, ...) becomes question marks."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def side_by_side(evaluation: Evaluation, labels: Labels) -> Table:
    """A row per candidate and baseline; own accuracy, accuracy, recall and FPR under every protocol."""
    study = evaluation.is_study and "random" in evaluation.protocols
    header = ["model"]
    for protocol in evaluation.protocols:
        header += [f"{protocol} {short}" for short in _FIGURES.values()]
    if study:
        header.insert(1, "study")
    rows = []
    for entry in evaluation.entries:
        row = [_title(entry)]
        if study:
            row.append(percent(STUDY.accuracy.get(entry.name), 1))
        for protocol in evaluation.protocols:
            figures = evaluation.headline(entry, protocol, labels)
            row += [percent(figures[name]) for name in _FIGURES]
        rows.append(tuple(row))
    return Table(f"All protocols side by side, {labels} labels", tuple(header), tuple(rows))


def families(evaluation: Evaluation, labels: Labels) -> Table | None:
    """Recall per family at the one limit, `mean/worst` fold, and FPR likewise; a column per candidate."""
    protocol = evaluation.family_protocol
    if protocol is None:
        return None
    names: dict[str, int] = {}
    for entry in evaluation.candidates:
        for name, spread in entry.scores[protocol][labels].families.items():
            names[name] = max(spread.flows, names.get(name, 0))
    rows = []
    for name, flows in sorted(names.items(), key=lambda item: -item[1]):
        cells = []
        for entry in evaluation.candidates:
            found = entry.scores[protocol][labels].families.get(name)
            cells.append(_pair(found.mean, found.worst) if found else NONE)
        rows.append((plain(name), f"{flows:,}", *cells))
    scores = [entry.scores[protocol][labels] for entry in evaluation.candidates]
    benign = max((s.benign for s in scores), default=0)
    rows.append(("FPR", f"{benign:,}", *(_pair(s.mean.fpr, s.worst.fpr) for s in scores)))
    how = "held-out families" if protocol == "family" else f"protocol {protocol}"
    return Table(
        f"Recall per family at the limit, {how}, {labels} labels: mean/worst fold",
        ("family", "flows", *(plain(entry.title) for entry in evaluation.candidates)),
        tuple(rows),
    )


def places(evaluation: Evaluation, labels: Labels) -> Table | None:
    """FPR by place and, apart, in the warm-up and the last tick, `mean/worst` fold."""
    protocol = evaluation.family_protocol
    if protocol is None:
        return None
    rows = []
    for kind in ("places", "apart"):
        names: dict[str, int] = {}
        for entry in evaluation.candidates:
            for name, spread in getattr(entry.scores[protocol][labels], kind).items():
                names[name] = max(spread.flows, names.get(name, 0))
        for name, flows in names.items():
            cells = []
            for entry in evaluation.candidates:
                spread = getattr(entry.scores[protocol][labels], kind).get(name)
                cells.append(_pair(spread.mean, spread.worst) if spread else NONE)
            rows.append((plain(name) + (" (not scored)" if kind == "apart" else ""), f"{flows:,}", *cells))
    return Table(
        f"FPR by place at the limit, protocol {protocol}, {labels} labels: mean/worst fold",
        ("place", "flows", *(plain(entry.title) for entry in evaluation.candidates)),
        tuple(rows),
    )


def notes(evaluation: Evaluation, *, every_fold: bool = True) -> list[str]:
    """Protocols that were impossible and why, folds without scores, cuts; else the first note of a protocol."""
    lines = [f"{protocol} was not possible: {why}" for protocol, why in evaluation.impossible.items()]
    for entry in evaluation.entries:
        missing = [fold for scores in entry.scores.values() for fold in scores["published"].missing]
        if missing:
            lines.append(f"{entry.title} has no scores for {', '.join(missing)}")
    seen: set[str] = set()
    for fold in evaluation.folds:
        if fold.note and (every_fold or fold.protocol not in seen):
            lines.append(f"{fold.fold}: {fold.note}")
        seen.add(fold.protocol)
    return [plain(line) for line in lines]


def markdown(evaluation: Evaluation) -> str:
    """All tables in Markdown."""
    lines = ["# Evaluation", "", _intro(evaluation), "", _LEGEND, ""]
    for labels in evaluation.label_sets:
        lines += _markdown_table(side_by_side(evaluation, labels))
    lines += _study_line(evaluation)
    for make in (families, places):
        for labels in evaluation.label_sets:
            table = make(evaluation, labels)
            if table is not None:
                lines += _markdown_table(table)
    found = notes(evaluation)
    if found:
        lines += ["## Protocols and cuts", "", *(f"- {_markdown_cell(line)}" for line in found), ""]
    return "\n".join(lines)


def terminal(evaluation: Evaluation) -> str:
    """The side by side table and recall per family, at most `WIDTH` columns wide, without colours."""
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, color_system=None, highlight=False, markup=False, emoji=False)
    for labels in evaluation.label_sets:
        _print_side_by_side(console, evaluation, labels)
    console.print(Text(_LEGEND))
    for line in _study_line(evaluation):
        console.print(Text(line))
    console.print()
    for start in range(0, len(evaluation.candidates), 6):
        table = families(evaluation, "corrected")
        if table is not None:
            keep = [0, 1, *range(2 + start, min(8 + start, len(table.header)))]
            _print(console, _columns(table, keep))
    for line in notes(evaluation, every_fold=False):
        console.print(Text(f"- {line}"))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _print_side_by_side(console: Console, evaluation: Evaluation, labels: Labels) -> None:
    table = side_by_side(evaluation, labels)
    study = int("study" in table.header)
    per_protocol = 4 if len(evaluation.protocols) <= 3 else 3
    keep, header = list(range(1 + study)), list(table.header[: 1 + study])
    for i, protocol in enumerate(evaluation.protocols):
        first = 1 + study + 4 * i
        chosen = [first, first + 1, first + 2, first + 3] if per_protocol == 4 else [first, first + 2, first + 3]
        keep += chosen
        header += [f"{protocol if j == chosen[0] else ''}\n{table.header[j].split()[1]}" for j in chosen]
    _print(console, _columns(table, keep)._replace(header=tuple(header)))


def _print(console: Console, table: Table) -> None:
    console.print(Text(table.title))
    rich = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(table.header):
        text = Text(name.replace("recording", "record."))
        rich.add_column(
            text, justify="left" if i < table.names else "right", overflow="fold", max_width=24 if i == 0 else 12
        )
    for row in table.rows:
        rich.add_row(*(Text(cell) for cell in row))
    console.print(rich)


def _columns(table: Table, keep: Sequence[int]) -> Table:
    return table._replace(
        header=tuple(table.header[i] for i in keep),
        rows=tuple(tuple(row[i] for i in keep) for row in table.rows),
    )


def _title(entry: Entry) -> str:
    mark = " (id)" if entry.baseline and entry.uses_identity else ""
    return plain(f"{'· ' if entry.baseline else ''}{entry.title}{mark}")


def _pair(mean: float | None, worst: float | None) -> str:
    first, second = percent(mean), percent(worst)
    return first if first == second else f"{first}/{second}"


def _intro(evaluation: Evaluation) -> str:
    view = plain(evaluation.data.get("view", "unknown"))
    corrected = f"{evaluation.corrections:,} labels corrected" if evaluation.corrections else "no label corrected"
    return _markdown_cell(
        f"View {view}; limit: surprise {evaluation.limit:.2f}; {corrected}. "
        "Rows marked · are baselines, (id) those that use an identity."
    )


def _study_line(evaluation: Evaluation) -> list[str]:
    if not evaluation.is_study:
        return []
    return [f"study: {STUDY.source}; compare with random own on published labels.", ""]


def _markdown_table(table: Table) -> list[str]:
    align = [":--" if i < table.names else "--:" for i in range(len(table.header))]
    join: Callable[[Sequence[str]], str] = lambda cells: "| " + " | ".join(map(_markdown_cell, cells)) + " |"  # noqa: E731
    rows = [join(row) for row in table.rows]
    return [f"## {_markdown_cell(table.title)}", "", join(table.header), join(align), *rows, ""]


def _markdown_cell(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", plain(text))
