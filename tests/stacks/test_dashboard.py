from __future__ import annotations

from pathlib import Path

import pytest

from stacks.dashboard import skip_survey


def test_the_survey_of_a_server_is_left_to_the_user(isolated_zenml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zenml.client import Client
    from zenml.enums import StoreType

    client = Client()
    before = client.get_user(client.active_user.id)
    with monkeypatch.context() as patch:
        patch.setattr(type(client.zen_store), "TYPE", StoreType.REST)
        assert client.zen_store.type == StoreType.REST
        skip_survey()
    assert client.get_user(client.active_user.id) == before


def test_the_survey_is_answered_once_and_an_answer_of_the_user_stays(isolated_zenml: Path) -> None:
    from zenml.client import Client

    client = Client()
    skip_survey()
    user = client.get_user(client.active_user.id)
    assert (user.email_opted_in, user.user_metadata["finished_onboarding_survey"]) == (False, True)
    client.update_user(user.id, updated_email="somebody@example.org", updated_email_opt_in=True)
    skip_survey()
    assert client.get_user(user.id).email_opted_in is True
