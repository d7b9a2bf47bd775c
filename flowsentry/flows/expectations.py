"""What good reports look like, as a Great Expectations suite; bad rows are set aside with the reason.

Every rule is one expectation, and the same expectation finds the bad rows and fills the result page. Rules over more
than one column are computed first, as a column of truth values named after what it states.

Great Expectations is imported on first use only, because that takes seconds. It sends usage statistics unless its
environment variable `GX_ANALYTICS_ENABLED` is false before that import.
"""

from __future__ import annotations

import html
import warnings
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd

from flowsentry.errors import ValidationFailed
from flowsentry.flows._typing import RAW_LENGTH
from flowsentry.flows._validation_page import self_contained
from flowsentry.flows.schema import (
    BENIGN,
    BY_NAME,
    MALICIOUS,
    MAX_COUNT,
    MAX_DURATION_NS,
    MAX_PORT,
    SCHEMA,
    TIME_DTYPE,
    TRANSPORTS,
    is_address,
)
from flowsentry.flows.sources import QUARANTINE

TIME_MARGIN_SECONDS: Final = 86_400
"""A report may be this much, and a tenth of the central span more, away from the central 98% of its recording."""

_SECOND: Final = 1_000_000
_TYPES: Final = {
    "int64": "int64",
    "Int64": "float64",
    "Int32": "float64",
    "bool": "bool",
    "category": "CategoricalDtypeType",
    "string[pyarrow]": "str",
    TIME_DTYPE: "Timestamp",
}
"""What Great Expectations calls the dtypes of the canonical schema. Whole numbers with gaps are checked as float64
(exact up to 2^53), because it goes through those of pandas one by one in Python."""


@dataclass(frozen=True)
class Validated:
    """Good rows and bad rows, and what was checked. Rows read = len(reports) + len(quarantine)."""

    reports: pd.DataFrame
    """The good rows, in their order, with a fresh index."""
    quarantine: pd.DataFrame
    """All bad rows, those set aside while reading first: file, row, reason, raw."""
    result: dict[str, Any]
    """For JSON: rows read, good and quarantined, the bad share, bad rows by reason, and every expectation."""
    page: str
    """Great Expectations' result page: one HTML document that loads nothing from elsewhere."""


class TooManyBadRows(ValidationFailed):
    """The bad share of the rows is above the limit; `validated` holds what was found."""

    def __init__(self, message: str, validated: Validated) -> None:
        super().__init__(message)
        self.validated = validated


def validate(
    reports: pd.DataFrame, *, quarantined_at_load: pd.DataFrame, rows_read: int, max_quarantine_share: float
) -> Validated:
    """Check every row against the suite.

    Args:
        reports: canonical schema.
        quarantined_at_load: rows already set aside: file, row, reason, raw.
        rows_read: rows of the files, good and bad.
        max_quarantine_share: largest share of `rows_read` that may be bad, 0..1.

    Raises:
        TooManyBadRows: the limit is exceeded, or not one good row is left.
        ValidationFailed: a column is not of the canonical type.
        ValueError: rows were lost before.
    """
    if rows_read != len(reports) + len(quarantined_at_load):
        raise ValueError(f"{rows_read} rows read are not {len(reports)} + {len(quarantined_at_load)}")
    for name in (column.name for column in SCHEMA if column.name in reports):
        if reports[name].dtype != BY_NAME[name].dtype:
            raise ValidationFailed(
                f"column {name} is {reports[name].dtype}, not {BY_NAME[name].dtype}; read the flows again"
            )
    table = reports.reset_index(drop=True)
    batch, suite = prepare(table)
    outcome = batch.validate(suite, result_format="COMPLETE")
    rows_by_reason: dict[str, np.ndarray] = {}
    for check in outcome.results:
        rows = check.result.get("unexpected_index_list")
        reason = check.expectation_config.meta["reason"]
        if rows:
            found = np.asarray(rows, np.int64)
            rows_by_reason[reason] = np.union1d(rows_by_reason.get(reason, found), found)
    bad = _bad_rows(table, rows_by_reason)
    quarantine = pd.concat([q for q in (quarantined_at_load[list(QUARANTINE)], bad) if len(q)] or [bad])
    keep = np.ones(len(table), bool)
    keep[bad.index] = False
    good = table if keep.all() else table[keep].reset_index(drop=True)
    result = _summary(outcome, rows_read, quarantine, max_quarantine_share)
    validated = Validated(good, quarantine.reset_index(drop=True), result, _page(outcome))
    if len(quarantine) > max_quarantine_share * rows_read or not len(good):
        raise TooManyBadRows(_complaint(validated, max_quarantine_share), validated)
    return validated


def _great_expectations() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        # Importing it imports modules that Python calls deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        import great_expectations
        import great_expectations.expectations

    return great_expectations, great_expectations.expectations


def prepare(table: pd.DataFrame) -> tuple[Any, Any]:
    """What Great Expectations needs: a batch with the table and the truth columns, and the suite for it.

    Args:
        table: canonical schema, with a `RangeIndex`.
    """
    gx, _ = _great_expectations()
    from great_expectations.data_context.types.base import ProgressBarsConfig

    gaps = {name: "float64" for name in table if BY_NAME[str(name)].dtype in ("Int32", "Int64")}
    checked = pd.concat([table.astype(gaps), _statements(table)], axis=1)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("flows").add_dataframe_asset("reports")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": checked})
    return batch, _suite(checked.columns)


def _suite(columns: pd.Index) -> Any:
    """The suite for these columns; the reason for a failing row is in the meta of each expectation."""
    gx, gxe = _great_expectations()
    checks: list[Any] = []
    for name in (column.name for column in SCHEMA if column.name in columns):
        dtype = BY_NAME[name].dtype
        reason = f"column {name} is not of type {dtype}"
        checks.append(gxe.ExpectColumnValuesToBeOfType(column=name, type_=_TYPES[dtype], meta={"reason": reason}))
    for name in ("flow_id", "src_ip", "dst_ip", "time"):
        checks.append(gxe.ExpectColumnValuesToNotBeNull(column=name, meta={"reason": f"{name} is missing"}))
    most = {"src_port": MAX_PORT, "dst_port": MAX_PORT, "duration": MAX_DURATION_NS}
    for name in ("src_port", "dst_port", "bytes", "duration", "packets", *_DIRECTIONS):
        if name in columns:
            top = most.get(name, MAX_COUNT)
            meta = {"reason": f"{name} is not within 0..{top}"}
            checks.append(gxe.ExpectColumnValuesToBeBetween(column=name, min_value=0, max_value=top, meta=meta))
    sets = {"transport": TRANSPORTS, "label": (BENIGN, MALICIOUS)}
    for name, values in sets.items():
        reason = f"{name} is not known" if name == "transport" else f"{name} is not one of {', '.join(values)}"
        checks.append(gxe.ExpectColumnValuesToBeInSet(column=name, value_set=list(values), meta={"reason": reason}))
    checks.append(
        gxe.ExpectCompoundColumnsToBeUnique(
            column_list=["file", "row"], meta={"reason": "the same row of a file is there more than once"}
        )
    )
    if {"start", "end"} <= set(columns):
        checks.append(
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(
                column_A="end",
                column_B="start",
                or_equal=True,
                ignore_row_if="either_value_is_missing",
                meta={"reason": "end is before start"},
            )
        )
    for statement, reason in _STATEMENTS.items():
        if statement in columns:
            checks.append(gxe.ExpectColumnValuesToBeInSet(column=statement, value_set=[True], meta={"reason": reason}))
    return gx.ExpectationSuite(name="reports", expectations=checks)


_DIRECTIONS: Final = ("src_bytes", "dst_bytes", "src_packets", "dst_packets")
_STATEMENTS: Final = {
    "src_ip is an address": "src_ip is not an IPv4 or IPv6 address",
    "dst_ip is an address": "dst_ip is not an IPv4 or IPv6 address",
    "tcp and udp have ports": "a port is missing although transport is tcp or udp",
    "time is within the recording": "time is far from the rest of its recording",
    "bytes are the sum of both directions": "bytes are not the sum of both directions",
    "packets are the sum of both directions": "packets are not the sum of both directions",
}


def _statements(table: pd.DataFrame) -> pd.DataFrame:
    """Truth value of every rule that needs more than one column, one column each; true where it does not apply."""
    truth = {f"{name} is an address": _is_address(table[name]) for name in ("src_ip", "dst_ip")}
    ports = table["src_port"].notna() & table["dst_port"].notna()
    truth["tcp and udp have ports"] = ports.to_numpy() | ~table["transport"].isin(["tcp", "udp"]).to_numpy()
    truth["time is within the recording"] = _is_near(table)
    for name in ("bytes", "packets"):
        parts = [f"src_{name}", f"dst_{name}"]
        if name in table and set(parts) <= set(table.columns):
            whole = table[name].astype("Int64")
            equal = table[parts[0]] + table[parts[1]] == whole
            truth[f"{name} are the sum of both directions"] = equal.fillna(True).to_numpy(bool)
    return pd.DataFrame(truth, index=table.index)


def _is_address(column: pd.Series) -> np.ndarray:
    """Checked once for each distinct address; true where missing, which is a rule of its own."""
    valid = np.array([*(is_address(str(text)) for text in column.cat.categories), True])
    return np.asarray(valid[column.cat.codes.to_numpy()], bool)


def _is_near(table: pd.DataFrame) -> np.ndarray:
    known = table["time"].notna().to_numpy()
    times = table["time"].to_numpy(dtype="datetime64[us]").astype(np.int64)
    recordings = table["recording"].cat.codes.to_numpy()
    near = np.ones(len(table), bool)
    for recording in np.unique(recordings[known]):
        inside = known & (recordings == recording)
        low, high = np.quantile(times[inside], [0.01, 0.99], method="nearest")
        margin = TIME_MARGIN_SECONDS * _SECOND + (high - low) // 10
        near[inside] = (times[inside] >= low - margin) & (times[inside] <= high + margin)
    return near


def _bad_rows(table: pd.DataFrame, rows_by_reason: dict[str, np.ndarray]) -> pd.DataFrame:
    """Quarantine rows, indexed by their place in `table`; several reasons are joined by "; "."""
    reasons: dict[int, str] = {}
    for reason, rows in sorted(rows_by_reason.items()):
        for row in rows.tolist():
            reasons[row] = f"{reasons[row]}; {reason}" if row in reasons else reason
    places = np.array(sorted(reasons), np.int64)
    found = table.iloc[places]
    lines = found.drop(columns=["file", "row"]).to_json(orient="records", lines=True, date_format="iso").splitlines()
    columns = {
        "file": found["file"].astype(object),
        "row": found["row"],
        "reason": [reasons[place] for place in places.tolist()],
        "raw": [line[:RAW_LENGTH] for line in lines],
    }
    return pd.DataFrame(columns, index=places)


def _summary(outcome: Any, rows_read: int, quarantine: pd.DataFrame, limit: float) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for reasons, number in quarantine["reason"].value_counts().items():
        for reason in str(reasons).split("; "):
            counts[reason] = counts.get(reason, 0) + int(number)
    checks = []
    for check in outcome.results:
        config = check.expectation_config
        details = {key: value for key, value in config.kwargs.items() if key != "batch_id"}
        checks.append(
            {
                "expectation": config.type,
                "arguments": details,
                "success": bool(check.success),
                "bad_rows": int(check.result.get("unexpected_count", 0)),
                "reason": config.meta["reason"],
            }
        )
    return {
        "rows": {"read": rows_read, "good": rows_read - len(quarantine), "quarantined": len(quarantine)},
        "quarantined_share": len(quarantine) / max(1, rows_read),
        "max_quarantine_share": limit,
        "bad_rows_by_reason": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "expectations": checks,
        "great_expectations": _great_expectations()[0].__version__,
    }


def _complaint(validated: Validated, limit: float) -> str:
    rows, counts = validated.result["rows"], validated.result["bad_rows_by_reason"]
    top = []
    for reason, number in list(counts.items())[:3]:
        match = [reason in str(given).split("; ") for given in validated.quarantine["reason"]]
        first = validated.quarantine[match].iloc[0]
        top.append(f"{reason} ({number:,}, first at {first['file']}:{first['row']})")
    return (
        f"{rows['quarantined']:,} of {rows['read']:,} rows are bad "
        f"({validated.result['quarantined_share']:.2%}, limit {limit:.2%}): {'; '.join(top)}; "
        "repair the source or raise the limit"
    )


def _page(outcome: Any) -> str:
    from great_expectations.render.renderer import ValidationResultsPageRenderer
    from great_expectations.render.view import DefaultJinjaPageView

    for check in outcome.results:
        for complete in ("unexpected_list", "unexpected_index_list", "unexpected_index_query"):
            check.result.pop(complete, None)
        # The page shows values as they are, and they come from outside.
        for sample in check.result.get("partial_unexpected_counts", []):
            sample["value"] = html.escape(str(sample["value"])[:RAW_LENGTH])
        check.result["partial_unexpected_list"] = []
    return self_contained(DefaultJinjaPageView().render(ValidationResultsPageRenderer().render(outcome)))
