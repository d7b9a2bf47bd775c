"""Where a detector is served, behind one small interface: a process on this machine, or pods."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

HOME: Final = "FLOWSENTRY_HOME"
"""Environment variable: folder of the deployer of this machine."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Endpoint(_Frozen):
    """Where a service answers, and what it asks for."""

    url: str
    token: str | None = Field(repr=False)


class Deployed(_Frozen):
    """A bundle that is served, or was."""

    model_version: str
    digest: str = Field(pattern="^[0-9a-f]{64}$")
    url: str


class Record(_Frozen):
    """Which version is in production, which was before it, and which wants to be."""

    champion: Deployed | None = None
    previous: Deployed | None = None
    challenger: Deployed | None = None


class Service(_Frozen):
    """A service process as it is now."""

    state: Literal["starting", "ready", "waiting", "stopped", "failed"]
    """`waiting`: it has died and is started again soon; `failed`: it stays down."""
    healthy: bool
    """It says of itself, at this moment, that it is ready."""
    url: str
    pid: int | None
    uptime: float
    """In seconds, of the present process."""
    restarts: int
    exit_status: int | None
    """Of the last process that ended; negative: killed by that signal."""
    problem: str | None
    log: str


class Status(_Frozen):
    """What the record says beside what runs."""

    record: Record
    running: bool
    """There is a supervisor."""
    pid: int | None = None
    url: str | None = None
    """Stable address of the champion."""
    uptime: float = 0.0
    champion: Service | None = None
    challenger: Service | None = None


class Deployer(Protocol):
    """Starts a challenger beside the champion, and moves traffic.

    Every method raises DeployError if it could not do what its name says; the champion then serves as before.
    """

    def start_challenger(self, bundle: Path, model_version: str, digest: str) -> Endpoint:
        """Serve a bundle beside the champion; returns when it is ready.

        It takes the place of another challenger, unless somebody else has that one on trial: then it is refused.
        """
        ...

    def stop_challenger(self, digest: str | None = None) -> None:
        """Stop serving the challenger; nothing happens if there is none.

        Args:
            digest: refused if the challenger is another bundle; None: whichever it is.
        """
        ...

    def promote(self, digest: str, instead_of: str | None) -> Record:
        """Make the challenger the champion; no request fails.

        Args:
            digest: of the bundle that was tested; refused if the challenger is another one.
            instead_of: digest of the champion that the challenger was compared with, None if there was none; refused
                if the champion is another one by now.
        """
        ...

    def rollback(self) -> Record:
        """Make the previous champion the champion again, and the present one the previous; no request fails."""
        ...

    def record(self) -> Record:
        """What is deployed."""
        ...

    def status(self) -> Status:
        """What is deployed and what runs; nothing is started to find out."""
        ...

    def endpoint(self) -> Endpoint:
        """The champion's stable address; the champion is started if it does not run."""
        ...

    def stop(self) -> None:
        """Stop everything; the record stays."""
        ...

    def challenger_log(self) -> str:
        """Last lines that the present or the last challenger wrote."""
        ...


def home() -> Path:
    """Folder of this machine's deployer: FLOWSENTRY_HOME, by default `~/.flowsentry`."""
    return Path(os.environ.get(HOME) or Path.home() / ".flowsentry").expanduser().absolute()
