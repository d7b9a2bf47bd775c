"""The published interface is what the service writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import orjson
import pandas as pd
import pyarrow as pa
import pytest

from flowsentry.detector import Detector, Judged
from flowsentry.flows.columns import Columns
from flowsentry.serving import app, schema, wire
from flowsentry.serving._values import REASONS
from flowsentry.serving.protocol import ARROW, JSON, NDJSON
from flowsentry.serving.wire import Batch, Head
from tests.flowsentry.test_detector import trained

if TYPE_CHECKING:
    from tests.flowsentry.conftest import Small

DOCS = Path(__file__).resolve().parents[3] / "docs" / "schema"


@pytest.mark.parametrize("name", sorted(schema.FILES))
def test_the_published_files_are_up_to_date(name: str, tmp_path: Path) -> None:
    schema.write(tmp_path)
    assert sorted(path.name for path in DOCS.iterdir()) == sorted(schema.FILES)
    fresh = (tmp_path / name).read_text(encoding="utf-8")
    assert (DOCS / name).read_text(encoding="utf-8") == fresh, "python -m flowsentry.serving.schema docs/schema"


@pytest.fixture(scope="module")
def detector(small: Small) -> Detector:
    return trained(small)


@pytest.fixture(scope="module")
def real(small: Small, detector: Detector) -> tuple[Head, Judged, Batch]:
    """Verdicts of a simulated hour, some malicious, and two rejects."""
    given = small.raw.iloc[:4000]
    flows: list[Any] = json.loads(given.drop(columns=["recording", "file"]).to_json(orient="records", date_unit="ms"))
    flows[1:1] = [7, {**flows[0], "bytes": -1}]
    now = int(given["time"].max().timestamp() * 1000)
    batch = wire.parse(orjson.dumps({"flows": flows}), JSON, max_flows=10_000, now_ms=now)
    assert [place for place, _ in batch.rejected] == [1, 2]
    judged = detector.watch().take(batch.columns)
    expected = detector.watch().take(Columns.of(given))
    np.testing.assert_array_equal(judged.score, expected.score)
    assert 0 < judged.malicious.sum() < len(given)
    manifest = detector.manifest
    return Head("day", 4002, 0, "3", manifest.name, manifest.version, detector.limit), judged, batch


def component(name: str) -> jsonschema.Draft202012Validator:
    document = schema.openapi()
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})


def test_real_answers_are_of_the_published_schema(real: tuple[Head, Judged, Batch]) -> None:
    answer = orjson.loads(wire.answer(JSON, *real))
    schema.Answer.model_validate_json(json.dumps(answer))
    verdict = jsonschema.Draft202012Validator(schema.verdict_schema())
    malicious = [verdict for verdict in answer["verdicts"] if verdict["label"] == "malicious"]
    assert malicious
    assert all(verdict["reasons"] and verdict["first_alarm"] for verdict in malicious)
    few = [*malicious[:100], *answer["verdicts"][:100]]
    assert not [error for line in few for error in verdict.iter_errors(line)]
    assert not list(component("Answer").iter_errors(answer | {"verdicts": few}))
    lines = [orjson.loads(line) for line in wire.answer(NDJSON, *real).splitlines()]
    assert [line["index"] for line in lines] == list(range(len(lines)))
    for line in lines[:100]:
        assert not list((component("RejectedLine") if "rejected" in line else verdict).iter_errors(line))


def test_the_columns_of_an_arrow_answer_are_the_fields_of_a_verdict(real: tuple[Head, Judged, Batch]) -> None:
    table = pa.ipc.open_stream(wire.answer(ARROW, *real)).read_all()
    assert table.column_names == [*schema.Verdict.model_fields, "rejected"]
    assert [field.name for field in table.schema.field("reasons").type.value_type] == list(schema.Reason.model_fields)
    answer = orjson.loads(wire.answer(JSON, *real))
    scores = {line["index"]: line["anomaly_score"] for line in answer["verdicts"]}
    assert dict(zip(*table.select(["index", "anomaly_score"]).drop_null().to_pydict().values(), strict=True)) == scores


@pytest.mark.parametrize(
    "change",
    [
        {"label": "odd"}, {"anomaly_score": None}, {"reasons": None}, {"first_alarm": 7}, {"extra": 1},
        {"anomaly_type": "novel"}, {"index": -1}, {"warm": 1},
    ],
)  # fmt: skip
def test_another_verdict_is_not_of_the_schema(change: dict[str, Any], real: tuple[Head, Judged, Batch]) -> None:
    verdict = orjson.loads(wire.answer(JSON, *real))["verdicts"][0]
    validator = jsonschema.Draft202012Validator(schema.verdict_schema())
    assert not list(validator.iter_errors(verdict))
    assert list(validator.iter_errors(verdict | change))


def test_the_verdict_schema_is_sound_and_named() -> None:
    document = schema.verdict_schema()
    jsonschema.Draft202012Validator.check_schema(document)
    assert document["$id"] == "urn:flowsentry:verdict:1"
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert all(field.get("description") or name in _PLAIN for name, field in document["properties"].items())


_PLAIN = {"flow_id", "model_version"}
"""Fields that explain themselves."""


def test_openapi_names_every_path_and_problem_and_all_its_references_lead_somewhere() -> None:
    document = schema.openapi()
    assert document["openapi"].startswith("3.1")
    assert set(document["paths"]) == {
        "/v1/verdicts", "/v1/streams/{stream}", "/v1/release", "/v1/model", "/v1/openapi.json", "/metrics", "/livez",
        "/readyz", "/healthz",
    }  # fmt: skip
    for component_schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(component_schema)
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split('"$ref": "#/components/schemas/')[1:]}
    assert references <= set(document["components"]["schemas"])
    assert {"Flow", "Verdict", "Reason", "Rejected"} <= references
    stated = {int(status) for path in document["paths"].values() for op in path.values() if isinstance(op, dict)
              for status in op["responses"]}  # fmt: skip
    assert stated == {200, 204} | {status for status, _ in schema.PROBLEMS.values()}
    assert set(document["paths"]["/v1/verdicts"]["post"]["requestBody"]["content"]) == set(wire.MEDIA_TYPES)


def test_what_the_proxy_says_for_a_service_may_come_on_every_path() -> None:
    for path, item in schema.openapi()["paths"].items():
        for method in item.keys() - {"parameters"}:
            assert {"408", "413", "503"} <= set(item[method]["responses"]), (method, path)
            assert ("401" in item[method]["responses"]) is path.startswith("/v1/")


def test_the_description_of_a_real_model_is_of_the_schema(detector: Detector) -> None:
    described = orjson.loads(app.Model(detector, "3", "0" * 64).described())
    assert not list(component("ModelDescription").iter_errors(described))


def test_a_problem_is_of_the_schema() -> None:
    rejected = [{"index": 3, "reason": "flow_id is missing"}]
    for problem in (
        app.Problem("seen_mismatch", "x", seen=1, durable=0),
        app.Problem("bad_flows", "x", rejected=rejected),
    ):
        assert not list(component("Problem").iter_errors(orjson.loads(problem.body)))
    assert list(component("Problem").iter_errors({"title": "x", "status": 400, "code": "odd", "detail": "x"}))


def test_a_simulated_flow_is_of_the_schema(small: Small) -> None:
    given = small.raw.head(50).drop(columns=["recording", "file"])
    given = given.assign(time=given["time"].map(pd.Timestamp.isoformat))
    flows = json.loads(given.to_json(orient="records"))
    assert not list(component("Flows").iter_errors({"flows": flows}))
    assert list(component("Flows").iter_errors({"flows": [{**flows[0], "src_port": 65_536}]}))


PAGE = (DOCS.parent / "verdicts.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_are_what_they_say() -> None:
    request, answer = (json.loads(block.split("```")[0]) for block in PAGE.split("```json\n")[1:])
    assert not list(component("Answer").iter_errors(answer))
    batch = wire.parse(json.dumps(request).encode(), JSON, max_flows=10, now_ms=2 * 10**12)
    assert [{"index": place, "reason": reason} for place, reason in batch.rejected] == answer["rejected"]
    assert batch.flow_ids == [verdict["flow_id"] for verdict in answer["verdicts"]]
    assert not list(component("Flow").iter_errors(request["flows"][0]))


def test_the_page_names_every_reason_field_and_problem() -> None:
    part = PAGE.split("## Rejected flows")[1].split("## Streams")[0].replace("`", "")
    rows = [row.split("|")[1].strip() for row in part.splitlines() if row.startswith("|")]
    told = set()
    for row in rows:
        *others, last = row.split(" / ")
        _, _, rest = last.partition(" ")
        told |= {last, *(f"{other} {rest}" for other in others)}
    assert set(REASONS) <= told
    for name in (*schema.Flow.model_fields, *schema.Verdict.model_fields, *schema.Reason.model_fields):
        assert f"`{name}`" in PAGE
    for code, (status, _) in schema.PROBLEMS.items():
        assert f"| {status} | `{code}` |" in PAGE
