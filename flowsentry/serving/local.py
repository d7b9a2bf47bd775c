"""The deployer of this machine: a client of the supervisor, which it starts when needed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import flowsentry
from flowsentry.errors import ConfigError, DeployError
from flowsentry.serving import deployer, supervisor
from flowsentry.serving.deployer import Endpoint, Record, Status

PORT: Final = "FLOWSENTRY_PORT"
DEFAULT_PORT: Final = 3300
START_SECONDS: Final = 30.0
"""For the supervisor to listen, processes of a killed one included."""


class LocalDeployer:
    """Implements `Deployer` with processes on this machine."""

    def __init__(
        self,
        home: Path | None = None,
        *,
        port: int | None = None,
        ready_seconds: float = 60.0,
        worker: str | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            home: folder of record, bundles, state and logs; by default as `deployer.home()` says.
            port: of the stable address on 127.0.0.1, 0 for any; by default FLOWSENTRY_PORT or 3300. A supervisor
                that runs already stays where it is.
            ready_seconds: how long a service may take to become ready.
            worker: program that serves bundles in place of BentoML's worker.
        """
        self.home = (home or deployer.home()).absolute()
        self._port = _port() if port is None else port
        self._ready_seconds = ready_seconds
        self._worker = worker

    def start_challenger(self, bundle: Path, model_version: str, digest: str) -> Endpoint:
        """Serve a bundle beside the champion; returns when it is ready.

        The challenger belongs to this process: it is stopped some seconds after this process has ended, however
        that came about, and until then it takes the place of an earlier challenger of this process.

        Raises:
            DeployError: it did not become ready or died, with the last lines of its log; or the bundle is damaged or
                for another Python; or a challenger that another running process started less than
                `supervisor.TRIAL_SECONDS` ago is on trial.
        """
        url = self._ask(
            "start_challenger",
            bundle=str(bundle.absolute()),
            model_version=model_version,
            digest=digest,
            seconds=self._ready_seconds,
            owner=[os.getpid(), supervisor.started(os.getpid())],
        )
        return Endpoint(url=url, token=self._token())

    def stop_challenger(self, digest: str | None = None) -> None:
        """Stop serving the challenger; nothing happens if there is none.

        Raises:
            DeployError: it is another bundle than `digest` says.
        """
        self._ask("stop_challenger", start=False, digest=digest)

    def promote(self, digest: str, instead_of: str | None) -> Record:
        """Make the challenger the champion; no request fails.

        A champion that does not answer is killed: its checkpoints are valid, and clients send the rest again.

        Raises:
            DeployError: there is no challenger, it is another bundle than `digest`, it has died or does not answer,
                or the champion is another one than `instead_of`. The champion stays.
        """
        return Record.model_validate(self._ask("promote", digest=digest, instead_of=instead_of))

    def rollback(self) -> Record:
        """Make the previous champion the champion again; no request fails.

        The present one is killed if it does not answer.

        Raises:
            DeployError: there is none, its bundle is damaged, or it does not become ready. The champion stays.
        """
        return Record.model_validate(self._ask("rollback", seconds=self._ready_seconds))

    def record(self) -> Record:
        """What is deployed; nothing is started to find out.

        Raises:
            DeployError: the record is damaged.
        """
        return self.status().record

    def status(self) -> Status:
        """What is deployed and what runs; nothing is started to find out.

        Raises:
            DeployError: the record is damaged.
        """
        if (told := self._ask("status", start=False)) is not None:
            return Status.model_validate(told)
        record = supervisor.read_record(self.home)
        return Status(record=record.model_copy(update={"challenger": None}), running=False)

    def start(self) -> Status:
        """Bring the champion of the record back if it does not run; returns when it is ready.

        Raises:
            DeployError: it does not become ready, the port is taken, or the record is damaged.
        """
        self._supervise().close()
        limit = time.monotonic() + self._ready_seconds
        while True:
            status = Status.model_validate(self._ask("status"))
            champion = status.champion
            if champion is None or (champion.state == "ready" and champion.healthy):
                return status
            if champion.state == "failed" or time.monotonic() > limit:
                version = status.record.champion.model_version if status.record.champion else "?"
                problem = champion.problem or f"is not ready after {self._ready_seconds:g} s"
                raise DeployError(
                    f"the champion, model version {version}: {problem}; log {champion.log}; "
                    f"`python run.py --rollback` brings the previous one back"
                )
            time.sleep(0.05)

    def endpoint(self) -> Endpoint:
        """The champion's stable address; the champion is started if it does not run.

        Raises:
            DeployError: there is no champion, or it does not become ready.
        """
        if self.record().champion is None:
            raise DeployError("no model has been deployed yet: python run.py --pipeline train")
        status = self.start()
        assert status.url is not None
        return Endpoint(url=status.url, token=self._token())

    def stop(self) -> None:
        """Stop everything; the record stays."""
        self._ask("stop", start=False)
        limit = time.monotonic() + 2 * supervisor.GRACE_SECONDS
        while (self.home / "supervisor.lock").exists():
            if (held := supervisor.lock(self.home)) is not None:
                os.close(held)
                return
            if time.monotonic() > limit:
                raise DeployError(f"the supervisor does not end; log {self.home / 'logs' / 'supervisor.log'}")
            time.sleep(0.05)

    def challenger_log(self) -> str:
        """Last lines that the present or the last challenger wrote."""
        return self._ask("challenger_log", start=False) or ""

    def _token(self) -> str:
        return supervisor.read_token(self.home)

    def _connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(str(supervisor.socket_path(self.home)))
        except OSError:
            connection.close()
            return None
        return connection

    def _ask(self, command: str, *, start: bool = True, **arguments: Any) -> Any:
        """The supervisor's answer; None if there is no supervisor and none is to be started."""
        if (connection := self._supervise() if start else self._connect()) is None:
            return None
        limit = float(arguments.get("seconds", 0)) + supervisor.SWITCH_SECONDS + 2 * supervisor.GRACE_SECONDS + 30
        line = b""
        with connection, connection.makefile("rwb") as stream:
            connection.settimeout(limit)
            try:
                stream.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
                stream.flush()
                line = stream.readline()
            except TimeoutError:
                raise DeployError(f"the supervisor did not answer {command} within {limit:g} s") from None
            except ConnectionError:
                pass
        if not line:
            if command == "status":  # asked again of the next one
                time.sleep(0.05)
                return self._ask(command, start=start)
            raise DeployError(f"the supervisor ended during {command}; `python -m flowsentry start` starts it again")
        answer = json.loads(line)
        if "error" in answer:
            raise DeployError(answer["error"])
        return answer["value"]

    def _supervise(self) -> socket.socket:
        """A connection to the supervisor, which is started unless it runs."""
        limit = time.monotonic() + START_SECONDS
        while (connection := self._connect()) is None:
            if (said := self._start_supervisor()) not in ("", supervisor.LOCKED):
                raise DeployError(f"the services of {self.home} cannot start: {said}")
            if time.monotonic() > limit:
                raise DeployError(f"the supervisor does not answer; log {self.home / 'logs' / 'supervisor.log'}")
            if said:
                time.sleep(0.1)
        return connection

    def _start_supervisor(self) -> str:
        """Empty if it listens now, else what it said."""
        try:
            self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DeployError(f"{self.home}: cannot be made ({error.strerror}); set FLOWSENTRY_HOME") from error
        source = str(Path(flowsentry.__file__).parents[1])
        path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "flowsentry.serving.supervisor"]
        command += ["--home", str(self.home), "--port", str(self._port)]
        command += ["--worker", self._worker] if self._worker else []
        with subprocess.Popen(
            command,
            cwd=self.home,
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            try:
                said, _ = process.communicate(timeout=START_SECONDS)
            except subprocess.TimeoutExpired:
                raise DeployError(f"the supervisor did not start within {START_SECONDS:g} s") from None
        return said.strip() if said.endswith("\n") else said or "the supervisor ended at once"


def _port() -> int:
    said = os.environ.get(PORT) or str(DEFAULT_PORT)
    if not said.isdecimal() or int(said) > 65535:
        raise ConfigError(f"{PORT} should be a port number, not {said!r}")
    return int(said)
