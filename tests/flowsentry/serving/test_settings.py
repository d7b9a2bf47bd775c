from __future__ import annotations

from pathlib import Path

import pytest

from flowsentry.errors import ConfigError
from flowsentry.serving.settings import Settings


def test_without_variables_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSENTRY_HOME", str(tmp_path))
    settings = Settings.read({"PATH": "/bin", "FLOWSENTRY_TELEMETRY": "off"})
    assert settings.state == str(tmp_path / "state")
    assert (settings.body_bytes, settings.flows, settings.body_seconds) == (32 * 2**20, 50_000, 20)
    assert settings.token is None
    assert settings.access_log == "off"


def test_variables_are_read_by_their_names() -> None:
    given = {
        "STATE": "s3://bucket/state",
        "FLOWS": "10",
        "CHECKPOINT_SECONDS": "0.5",
        "TOKEN": "abc",
        "ACCESS_LOG": "on",
    }
    settings = Settings.read({f"FLOWSENTRY_SERVICE_{name}": value for name, value in given.items()})
    assert (settings.state, settings.flows, settings.checkpoint_seconds) == ("s3://bucket/state", 10, 0.5)
    assert (settings.token, settings.access_log) == ("abc", "on")
    assert "abc" not in repr(settings)


def test_what_kubernetes_sets_beside_a_service_of_that_name_is_not_ours() -> None:
    names = ("HOST", "PORT", "PORT_HTTP", "PORT_3000_TCP_ADDR")
    assert Settings.read({f"FLOWSENTRY_SERVICE_{name}": "10.0.0.1" for name in names}) == Settings.read({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FLOWS", "many"), ("FLOWS", "0"), ("FLOWS", ""), ("BODY_BYTES", "-1"), ("BODY_SECONDS", "nan"),
        ("BODY_SECONDS", "inf"), ("STREAMS", "1.5"), ("ACCESS_LOG", "yes"), ("TOKEN", ""), ("TOKEN", "two words"),
        ("TOKEN", "é"), ("STATE", ""), ("FLOW", "10"), ("flows", "10"), ("PORTS", "80"),
    ],
)  # fmt: skip
def test_a_wrong_or_unknown_variable_is_one_line_that_names_it(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.read({f"FLOWSENTRY_SERVICE_{name}": value})
    assert f"FLOWSENTRY_SERVICE_{name}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_comes_from_a_file_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    assert Settings.read({"FLOWSENTRY_SERVICE_TOKEN_FILE": str(tmp_path / "token")}).token == "s3cret"


@pytest.mark.parametrize("content", [None, b"", b"\n", b"two words", b"\xff"])
def test_a_useless_token_file_is_named_and_its_content_is_not_shown(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Settings.read({"FLOWSENTRY_SERVICE_TOKEN_FILE": str(path)})
    assert str(path) in str(caught.value)
    assert "words" not in str(caught.value)


def test_a_token_and_a_file_of_one_are_too_much(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    given = {"FLOWSENTRY_SERVICE_TOKEN": "other", "FLOWSENTRY_SERVICE_TOKEN_FILE": str(tmp_path / "token")}
    with pytest.raises(ConfigError, match="not both"):
        Settings.read(given)
