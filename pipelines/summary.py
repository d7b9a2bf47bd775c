"""What a finished run left: its pages on disk, and what to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse

from flowsentry.errors import ConfigError, FlowSentryError
from flowsentry.reporting.replay_summary import replay_text
from flowsentry.reporting.verdict_files import write_findings, write_ndjson
from flowsentry.reporting.verdict_summary import verdicts_text
from steps.register import MODEL

PAGES = {
    ("validate", "validation_page"): "validation.html",
    ("engineer", "view_page"): "view.html",
    ("evaluate", "report"): "evaluation.html",
    ("select", "model_card"): "model_card.html",
    ("quality_gate", "gates_page"): "gates.html",
    ("deploy", "gates_page"): "gates.html",
    ("detect", "verdicts_page"): "verdicts.html",
    ("replay", "replay_page"): "replay.html",
}


@dataclass(frozen=True)
class RunSummary:
    """A finished run."""

    run_name: str
    status: str
    text: str
    """Tables, decision, and where to look next."""
    files: tuple[Path, ...]
    failure: str | None
    """Why the run did not do what was asked, in one line; None if it did."""


def run_name(pipeline: str) -> str:
    """A name that no other run has."""
    return f"{pipeline}-{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"


def summarise(name: str, reports: str, error: FlowSentryError | None = None) -> RunSummary:
    """Write the pages of a run to `reports/<run>` and say what it found; of a failed run those that it made.

    Args:
        name: of the run.
        reports: folder, made if absent.
        error: what the run failed with.

    Raises:
        ConfigError: the folder cannot be written.
    """
    run = Client().get_pipeline_run(name)
    folder = Path(reports) / name
    contents: dict[str, Any] = {}
    for place, file in PAGES.items():
        if (content := _output(run, *place)) is not None:
            contents[file] = content
    evaluation = _output(run, "evaluate", "evaluation")
    parts = []
    if evaluation is not None:
        contents |= {"evaluation.json": evaluation.to_json(), "evaluation.md": evaluation.to_markdown()}
        parts.append(evaluation.summary_text())
    if (verdicts := _output(run, "detect", "verdicts")) is not None:
        told = _output(run, "detect", "verdict_summary")
        judged = _output(run, "validate", "valid_reports")
        contents |= _verdict_files(verdicts, judged) | {"verdicts.json": told.model_dump_json(indent=1)}
        parts.append(verdicts_text(told))
    if (replayed := _output(run, "replay", "replay_report")) is not None:
        contents |= {"replay.parquet": _output(run, "replay", "answers").to_parquet}
        contents |= {"replay.json": replayed.model_dump_json(indent=1)}
        parts.append(replay_text(replayed))
    quarantine = _output(run, "validate", "quarantine")
    if isinstance(quarantine, pd.DataFrame) and len(quarantine):
        contents["quarantine.csv"] = quarantine.to_csv(index=False)
    written = tuple(folder / file for file in contents)
    try:
        for path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content := contents[path.name]):
                content(path)
            else:
                path.write_text(str(content), encoding="utf-8")
    except OSError as failed:
        raise ConfigError(f"reports: cannot write to {folder}: {failed.strerror}; name another folder") from failed
    if (selection := _output(run, "select", "selection")) is not None:
        parts.append(f"Selected: {selection.reason}")
        if version := _output(run, "register", "model_version"):
            stage = Client().get_model_version(MODEL, version).stage
            parts.append(f"Model:    flowsentry, version {version}, stage {stage}")
        if address := _output(run, "deploy", "address"):
            parts.append(f"Champion: version {version} at {address}; `python -m flowsentry status` says how it is")
    candidates = ", `make mlflow` all candidates" if "evaluate" in run.steps else ""
    parts.append(f"Run:      {name}; `make dashboard` opens ZenML's dashboard{candidates}")
    parts += [f"{'File' if callable(contents[path.name]) else 'Page'}:     {path}" for path in written]
    failure = str(error) if error else None
    if run.status != ExecutionStatus.COMPLETED:
        failure = failure or f"the run {name} is {run.status}, not completed"
    return RunSummary(name, str(run.status), "\n".join(parts), written, failure)


def _verdict_files(verdicts: pd.DataFrame, reports: pd.DataFrame) -> dict[str, Callable[[Path], None]]:
    """Writers of the verdicts, by name of the file."""
    return {
        "verdicts.parquet": lambda path: verdicts.to_parquet(path, index=False),
        "verdicts.ndjson": lambda path: write_ndjson(verdicts, path),
        "findings.ndjson": lambda path: write_findings(verdicts, reports, path),
    }


def _output(run: PipelineRunResponse, step: str, output: str) -> Any:
    """An output of a step, None if the run did not come that far."""
    found = run.steps[step].outputs.get(output) if step in run.steps else None
    return found[0].load() if found else None
