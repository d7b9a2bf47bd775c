"""Settings of the service, from environment variables FLOWSENTRY_SERVICE_*; the defaults suit a laptop."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from flowsentry.errors import ConfigError
from flowsentry.serving.deployer import home

PREFIX: Final = "FLOWSENTRY_SERVICE_"
_OF_KUBERNETES: Final = re.compile("HOST|PORT(_.*)?")
"""Kubernetes sets these in every pod beside a Service called `flowsentry`."""
_TOKEN: Final = re.compile(r"[\x21-\x7e]{1,4096}")

_Count = Annotated[int, Field(ge=1, le=2**53)]
_Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseModel):
    """One field for each variable: `body_bytes` is FLOWSENTRY_SERVICE_BODY_BYTES."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    state: str = Field(default_factory=lambda: str(home() / "state"), min_length=1)
    """Folder, or URL of an object store, of the checkpoints."""
    token: str | None = Field(default=None, repr=False)
    """Every request to /v1 must bring it; without one the service answers everybody who reaches it."""
    token_file: Path | None = None
    """File that holds the token."""
    body_bytes: _Count = 32 << 20
    """Longest body of a request."""
    body_seconds: _Seconds = 20.0
    """How long a client may take to send a body."""
    flows: _Count = 50_000
    """Most flows of a request."""
    streams: _Count = 256
    """Most streams in memory; the one idle longest is written and dropped."""
    memory_bytes: _Count = 2 << 30
    """Of all streams in memory."""
    checkpoint_seconds: _Seconds = 5.0
    """A changed stream is written after this time ..."""
    checkpoint_flows: _Count = 20_000
    """... or after so many flows."""
    access_log: Literal["on", "off"] = "off"
    """One line for every request."""

    @field_validator("token")
    @classmethod
    def _sendable(cls, token: str | None) -> str | None:
        if token is not None and not _TOKEN.fullmatch(token):
            raise ValueError("must be visible ASCII characters without spaces, at most 4096")
        return token

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings as the environment has them.

        Raises:
            ConfigError: a variable is unknown or has an impossible value, or the token's file cannot be read.
        """
        given: dict[str, Any] = {}
        for name, value in environment.items():
            key = name.removeprefix(PREFIX)
            if key != name and not _OF_KUBERNETES.fullmatch(key):
                if key != key.upper() or key.lower() not in cls.model_fields:
                    known = ", ".join(PREFIX + field.upper() for field in cls.model_fields)
                    raise ConfigError(f"environment variable {name} is unknown; known are {known}")
                given[key.lower()] = value
        if "token_file" in given:
            if "token" in given:
                raise ConfigError(f"set one of {PREFIX}TOKEN and {PREFIX}TOKEN_FILE, not both")
            given["token"] = _token_of(Path(given["token_file"]))
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = PREFIX + str(first["loc"][0]).upper()
            if "token_file" in given and first["loc"] == ("token",):
                name = str(given["token_file"])
            raise ConfigError(f"environment variable {name}: {first['msg'].removeprefix('Value error, ')}") from error


def _token_of(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token's file {path} cannot be read ({type(error).__name__})") from error
