from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from flowsentry.errors import ConfigError
from stacks import site

LEAST = {
    "FLOWSENTRY_SITE_CONTEXT": "kind-flowsentry",
    "FLOWSENTRY_SITE_HOST": "172.18.0.2",
    "FLOWSENTRY_SITE_REGISTRY": "registry.example.org/team",
    "FLOWSENTRY_SITE_TAG": "1",
}


@pytest.fixture(autouse=True)
def no_site_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "FILE", tmp_path / "site.yaml")


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        site.load(environment)
    (line,) = str(caught.value).splitlines()
    return line


def test_addresses_follow_from_the_host() -> None:
    here = site.load(LEAST)
    assert here.namespace == "flowsentry"
    assert here.zenml_url == "http://172.18.0.2:30080"
    assert here.s3_url == "http://172.18.0.2:30070"
    assert here.mlflow_url == "http://172.18.0.2:30050"
    assert here.pipeline_image == "registry.example.org/team/flowsentry-pipeline:1"
    assert here.serving_image == "registry.example.org/team/flowsentry-serving:1"


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("context: a\nhost: b\nregistry: c\nnamespace: d\ns3_url: http://e\n")
    here = site.load({"FLOWSENTRY_SITE": str(file), "FLOWSENTRY_SITE_NAMESPACE": "other", "FLOWSENTRY_SITE_TAG": "1"})
    assert (here.context, here.namespace, here.s3_url) == ("a", "other", "http://e")


def test_the_example_is_a_site_and_explains_each_key() -> None:
    example = site.ROOT / "stacks" / "site.example.yaml"
    here = site.load({"FLOWSENTRY_SITE": str(example)})
    text = example.read_text()
    everything = yaml.safe_load(re.sub(r"^# (?=[a-z0-9_]+: )", "", text, flags=re.MULTILINE))
    assert set(everything) == set(vars(here))


@pytest.mark.parametrize("key", ["context", "host", "registry"])
def test_a_missing_key_is_named_with_both_ways_to_give_it(key: str, tmp_path: Path) -> None:
    variable = f"FLOWSENTRY_SITE_{key.upper()}"
    line = refusal({name: value for name, value in LEAST.items() if name != variable})
    assert f"needs to know {key}: write it into {tmp_path}/site.yaml" in line
    assert variable in line


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FLOWSENTRY_SITE_NAMSPACE", "x", "FLOWSENTRY_SITE_NAMSPACE: is no key of a site; known: context, namespace"),
        ("FLOWSENTRY_SITE_NAMESPACE", "Not/ok", "FLOWSENTRY_SITE_NAMESPACE: String should match"),
        ("FLOWSENTRY_SITE_HOST", "http://x", "FLOWSENTRY_SITE_HOST: String should match"),
        ("FLOWSENTRY_SITE_S3_URL", "x:7070", "FLOWSENTRY_SITE_S3_URL: String should match"),
    ],
)
def test_an_impossible_variable_is_named(variable: str, value: str, expected: str) -> None:
    assert refusal(LEAST | {variable: value}).startswith(expected)


def test_a_misspelt_key_of_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("context: a\nhosts: b\n")
    assert refusal({"FLOWSENTRY_SITE": str(file)}) == f"{file}:2: hosts is no key of this file; did you mean host?"


def test_a_named_file_that_is_missing_is_an_error() -> None:
    assert "there is no such file" in refusal(LEAST | {"FLOWSENTRY_SITE": "/nowhere/site.yaml"})
