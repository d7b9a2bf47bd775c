from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

import pytest
import yaml
from zenml.client import Client
from zenml.enums import StackComponentType

from flowsentry.config import load
from flowsentry.errors import ConfigError, StackError
from stacks import apply as stacks

LOCAL = stacks.FOLDER / "local.yaml"

# ZenML writes a stack that is updated while it is active to its configuration, as the one that the user chose
pytestmark = pytest.mark.usefixtures("fresh_zenml")


def changed(folder: Path, old: str, new: str) -> Path:
    """The local stack's file with one change."""
    text = LOCAL.read_text()
    assert old in text
    path = folder / "stack.yaml"
    path.write_text(text.replace(old, new))
    return path


def refusal(path: Path) -> str:
    with pytest.raises((ConfigError, StackError)) as caught:
        stacks.apply(path)
    message = str(caught.value)
    assert all(str(path) in line for line in message.splitlines())
    return message


@pytest.mark.parametrize("name", stacks.known())
def test_every_stack_file_loads(name: str) -> None:
    assert load(stacks.path_of(name), stacks.StackFile).stack_name == f"flowsentry-{name}"


def test_applying_twice_changes_nothing() -> None:
    first = stacks.apply(LOCAL)
    before = Client().get_stack(first)
    assert stacks.apply(LOCAL) == first
    assert Client().get_stack(first).updated == before.updated


def test_what_zenml_holds_is_what_the_file_says() -> None:
    stack = Client().get_stack(stacks.apply(LOCAL))
    written = yaml.safe_load(LOCAL.read_text())
    assert stack.to_yaml() == {name: value for name, value in written.items() if name != "zenml_version"}


def test_a_changed_setting_arrives_and_a_removed_one_goes(tmp_path: Path) -> None:
    def settings(stack: UUID) -> dict[str, object]:
        return Client().get_stack(stack).components[StackComponentType.EXPERIMENT_TRACKER][0].configuration

    original = "configuration: {}  # without a tracking_uri"
    uri = "sqlite:///elsewhere.db"
    with_uri = changed(tmp_path, original, f"configuration: {{tracking_uri: '{uri}'}} #")
    stack = stacks.apply(with_uri)
    assert settings(stack)["tracking_uri"] == uri
    assert stacks.apply(LOCAL) == stack
    assert settings(stack) == {}


def test_a_component_can_be_dropped(tmp_path: Path) -> None:
    document = yaml.safe_load(LOCAL.read_text())
    del document["components"]["experiment_tracker"]
    path = tmp_path / "stack.yaml"
    path.write_text(yaml.safe_dump(document))
    stack = stacks.apply(path)
    assert not Client().get_stack(stack).components.get(StackComponentType.EXPERIMENT_TRACKER)
    assert stacks.apply(LOCAL) == stack
    assert Client().get_stack(stack).components[StackComponentType.EXPERIMENT_TRACKER]


def test_activation_is_for_this_process_only(fresh_zenml: Path) -> None:
    assert Client().active_stack_model.name == "default"
    saved = (fresh_zenml / "config.yaml").read_text()
    stack = stacks.activate("local")
    assert os.environ["ZENML_ACTIVE_STACK_ID"] == str(stack)
    assert Client().active_stack_model.name == "flowsentry-local"
    assert (fresh_zenml / "config.yaml").read_text() == saved


def test_an_unknown_stack_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(StackError, match=r"stack locla is unknown; did you mean local\? Known: .*local"):
        stacks.activate("locla")
    with pytest.raises(StackError, match=r"stack \.\./configs/train is unknown"):
        stacks.activate("../configs/train")


def test_a_stack_for_another_zenml_is_refused(tmp_path: Path) -> None:
    assert "is for ZenML 0.90.0" in refusal(changed(tmp_path, "0.98.0", "0.90.0"))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("flavor: mlflow", "flavour: mlflow", "is no key of this file"),
        ("  artifact_store:\n", "  artefact_store:\n", "artefact_store"),
        ("stack_name: flowsentry-local", "stack_name: default", "stack_name"),
        ("type: orchestrator", "type: artifact_store", "flowsentry-local is of type artifact_store, but stands under"),
        ("name: flowsentry-local\n      flavor: mlflow", "name: mine\n      flavor: mlflow", "should begin with"),
        ("flavor: mlflow", "flavor: mlfow", "flavor mlfow is unknown to ZenML"),
        ("configuration: {}  #", "configuration: {tracking_url: x}  #", "has no setting tracking_url; did you mean"),
        ("configuration: {}  #", "configuration: {tracking_insecure_tls: [1]}  #", "tracking_insecure_tls"),
    ],
)
def test_what_zenml_would_accept_in_silence_is_refused(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert expected in refusal(changed(tmp_path, old, new))


def test_a_stack_needs_a_place_for_artifacts(tmp_path: Path) -> None:
    document = yaml.safe_load(LOCAL.read_text())
    document["components"]["artifact_store"] = []
    path = tmp_path / "stack.yaml"
    path.write_text(yaml.safe_dump(document))
    assert "has no artifact_store" in refusal(path)


def test_another_flavor_under_the_same_name_is_refused(tmp_path: Path) -> None:
    stacks.apply(LOCAL)
    assert "exists with flavor local, not local_docker" in refusal(
        changed(tmp_path, "flavor: local\n      type: orchestrator", "flavor: local_docker\n      type: orchestrator")
    )


CLUSTER = stacks.FOLDER / "cluster.yaml"
SITE = {
    "CONTEXT": "of-the-test",
    "NAMESPACE": "ns",
    "HOST": "192.0.2.1",
    "REGISTRY": "registry.example.org/team",
    "TAG": "1",
}


@pytest.fixture
def a_site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stacks.site.FILE", tmp_path / "none.yaml")
    for name in [name for name in os.environ if name.startswith("FLOWSENTRY_SITE")]:
        monkeypatch.delenv(name)
    for key, value in SITE.items():
        monkeypatch.setenv(f"FLOWSENTRY_SITE_{key}", value)


@pytest.mark.usefixtures("a_site")
def test_values_of_the_site_are_filled_in_and_secrets_stay_names() -> None:
    file = stacks._filled(CLUSTER, load(CLUSTER, stacks.StackFile))
    settings = {kind: listed[0].configuration for kind, listed in file.components.items()}
    assert settings["orchestrator"]["kubernetes_context"] == "of-the-test"
    assert settings["orchestrator"]["kubernetes_namespace"] == "ns"
    assert settings["artifact_store"]["client_kwargs"]["endpoint_url"] == "http://192.0.2.1:30070"
    assert settings["container_registry"]["uri"] == "registry.example.org/team"
    assert settings["experiment_tracker"]["tracking_uri"] == "http://192.0.2.1:30050"
    assert settings["experiment_tracker"]["tracking_password"] == "{{flowsentry-mlflow.password}}"
    assert "${" not in str(settings)


@pytest.mark.usefixtures("a_site")
def test_every_setting_of_the_cluster_stack_is_known_to_zenml() -> None:
    file = stacks._filled(CLUSTER, load(CLUSTER, stacks.StackFile))
    Client().create_secret("flowsentry-mlflow", {"username": "a", "password": "b"})
    try:
        for listed in file.components.values():
            for component in listed:
                stacks._check_settings(Client(), CLUSTER, component)
    finally:
        Client().delete_secret("flowsentry-mlflow")


@pytest.mark.usefixtures("a_site")
def test_a_placeholder_that_no_site_has_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stack.yaml"
    path.write_text(CLUSTER.read_text().replace("${s3_url}", "${s3_uri}"))
    assert "${s3_uri} is no key of a site; known: context, namespace" in refusal(path)


def test_the_local_stack_needs_no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSENTRY_SITE", "/nowhere/site.yaml")
    assert stacks.apply(LOCAL)
