"""`python -m flowsentry.serving.supervisor`: keeps the services of this machine running, one process per home.

It answers at the stable address, runs champion and challenger as processes of their own, and obeys the deployer
through a Unix socket (one JSON object each way). `record.json` is written just before traffic moves: whatever is
killed whenever, the champion that the record names is the one that the next start serves, and both share the
streams' checkpoints.

Each service is what `bentoml serve` starts as its worker, without BentoML's own process manager in between: that
would start a challenger that has died again, in silence, and would double the time to start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import fcntl
import json
import logging
import logging.handlers
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from flowsentry import telemetry
from flowsentry.errors import DeployError, FlowSentryError, StoreError
from flowsentry.serving import bundle as bundles
from flowsentry.serving.deployer import Deployed, Record, Service, Status
from flowsentry.serving.proxy import Proxy
from flowsentry.serving.settings import Settings

HOST: Final = "127.0.0.1"
DRAIN_SECONDS: Final = 15.0
"""How long a switch waits for requests under way, and then ..."""
RELEASE_SECONDS: Final = 10.0
"""... for the champion to store its streams, before it is killed."""
SWITCH_SECONDS: Final = DRAIN_SECONDS + RELEASE_SECONDS
"""Longest time of a switch; less than requests are held for."""
GRACE_SECONDS: Final = 15.0
"""From SIGTERM, on which a service stores its streams, to SIGKILL."""
LONGEST_BACKOFF: Final = 30.0
STEADY_SECONDS: Final = 60.0
"""A service that ran so long and dies is started again at once."""
PROBE_SECONDS: Final = 5.0
"""The champion is asked so often whether it lives; long requests do not keep it from answering."""
MOST_MISSES: Final = 6
"""After so many unanswered questions in a row it is killed and started again."""
TRIAL_SECONDS: Final = 900.0
"""For so long nobody but its owner may replace a challenger."""
OWNER_SECONDS: Final = 5.0
"""How often it is looked whether a challenger's owner still runs."""
FORGET_SECONDS: Final = 30 * 86_400.0
"""Checkpoints not written for so long are removed ..."""
FORGET_TRIAL_SECONDS: Final = 86_400.0
"""... and after this time those of gates, replays and scorings, which never come again."""
TIDY_SECONDS: Final = 86_400.0
LOG_BYTES: Final = 5 << 20
TAIL_BYTES: Final = 16 << 10
TAIL_LINES: Final = 30
KEPT_LOGS: Final = 10
LOCKED: Final = "another supervisor has this home"
WORKER: Final = ("-m", "_bentoml_impl.worker.service")
"""Arguments of this Python by which a service is started, before `BUNDLE --fd N ...`."""
_LONGEST_SOCKET_PATH: Final = 100
_TRIAL: Final = re.compile("(gate-[0-9a-f]{16}|(replay|score)-[0-9a-f]{8})")
"""Names of streams that our own programs draw."""

log = logging.getLogger("flowsentry.supervisor")


class Output:
    """What a service writes: its last part in memory, all of it in a file that is rotated once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail = bytearray()
        self._file = path.open("ab")

    def write(self, content: bytes) -> None:
        if self._file.closed:
            return
        self._tail += content
        del self._tail[:-TAIL_BYTES]
        if self._file.tell() + len(content) > LOG_BYTES:
            self._file.close()
            self.path.replace(self.path.with_suffix(".log.1"))
            self._file = self.path.open("ab")
        self._file.write(content)
        self._file.flush()

    def tail(self) -> str:
        return bundles.tail(self._tail.decode("utf-8", "replace"), TAIL_LINES)

    def close(self) -> None:
        self._file.close()


class Unit:
    """One deployed bundle and its process, present or past."""

    def __init__(
        self, deployed: Deployed, home: Path, worker: Sequence[str], owner: tuple[int, str] | None = None
    ) -> None:
        self.deployed = deployed
        self.owner = owner
        """Process that has it on trial, and when that one began."""
        self.folder = home / "bundles" / deployed.digest
        self.output = Output(home / "logs" / f"service-{deployed.digest[:12]}.log")
        self.state: Literal["starting", "ready", "waiting", "stopped", "failed"] = "starting"
        self.url = ""
        self.restarts = 0
        self.exit_status: int | None = None
        self.problem: str | None = None
        self.begin = time.monotonic()
        self.process: asyncio.subprocess.Process | None = None
        self._home = home
        self._worker = worker
        self._pump: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin a process that listens on a free port of its own; it is not ready yet.

        Raises:
            StoreError: the bundle is damaged, or built for another Python.
        """
        bundle = await asyncio.to_thread(bundles.verify, self.folder, self.deployed.digest)
        built_for, this = bundle.about.get("python"), ".".join(map(str, sys.version_info[:2]))
        if built_for != this:
            raise StoreError(
                f"{self.name} was built for Python {built_for}, and this is Python {this}: train again, or run "
                f"`python -m flowsentry stop` and go on with Python {built_for}"
            )
        self.state, self.begin = "starting", time.monotonic()
        metrics = self._home / "run" / f"metrics-{self.deployed.digest[:12]}-{secrets.token_hex(4)}"
        metrics.mkdir(parents=True)
        with socket.socket() as listener:
            listener.bind((HOST, 0))
            self.url = f"http://{HOST}:{listener.getsockname()[1]}"
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._worker,
                str(self.folder),
                *("--fd", str(listener.fileno()), "--worker-id", "1"),
                *("--timeout-keep-alive", "75", "--timeout-graceful-shutdown", "10"),
                cwd=self.folder,
                env=_environment(self._home, metrics),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                preexec_fn=_die_with_parent(),
            )
        self._pump = asyncio.create_task(self._take_output(self.process, metrics))
        log.info("%s started as process %d at %s", self.name, self.process.pid, self.url)

    async def _take_output(self, process: asyncio.subprocess.Process, metrics: Path) -> None:
        assert process.stdout is not None
        while content := await process.stdout.read(1 << 16):
            self.output.write(content)
        await process.wait()
        shutil.rmtree(metrics, ignore_errors=True)

    @property
    def name(self) -> str:
        return f"model version {self.deployed.model_version}"

    @property
    def pid(self) -> int | None:
        alive = self.process is not None and self.process.returncode is None
        return self.process.pid if alive and self.process is not None else None

    async def become_ready(self, proxy: Proxy, seconds: float) -> None:
        """Wait until the service says that it is ready.

        Raises:
            DeployError: it has died, or takes longer; with its last lines.
        """
        limit = time.monotonic() + seconds
        while await proxy.ask(self.url, "GET", "/readyz", 2) != 200:
            if self.pid is None:
                raise self._failure(f"ended with {ending(await self.ended())} before it was ready")
            if time.monotonic() > limit:
                raise self._failure(f"was not ready after {seconds:g} s")
            await asyncio.sleep(0.05)
        self.state = "ready"

    def _failure(self, what: str) -> DeployError:
        self.problem = what
        said = self.output.tail()
        return DeployError(f"{self.name} {what}; log {self.output.path}" + (f"\n{said}" if said else ""))

    async def ended(self) -> int:
        """Wait for the end of the process, and of its output; gives its exit status."""
        assert self.process is not None
        self.exit_status = await self.process.wait()
        if self._pump is not None:
            await asyncio.wait([self._pump], timeout=1)
        return self.exit_status

    async def stop(self) -> None:
        """End the process: by SIGTERM, and if that is not enough, its whole group by SIGKILL."""
        if self.state != "failed":
            self.state = "stopped"
        process = self.process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), GRACE_SECONDS)
            except TimeoutError:
                log.warning("%s did not end within %g s and is killed", self.name, GRACE_SECONDS)
        if process is not None:
            _kill_group(process.pid)
            await self.ended()

    def kill(self) -> None:
        """End the process at once, even one that is stopped or hangs."""
        if self.pid is not None:
            _kill_group(self.pid)

    def close(self) -> None:
        self.output.close()

    async def told(self, proxy: Proxy) -> Service:
        return Service(
            state=self.state,
            healthy=self.pid is not None and await proxy.ask(self.url, "GET", "/readyz", 1) == 200,
            url=self.url,
            pid=self.pid,
            uptime=time.monotonic() - self.begin if self.pid is not None else 0.0,
            restarts=self.restarts,
            exit_status=self.exit_status,
            problem=self.problem,
            log=str(self.output.path),
        )


class Supervisor:
    """The services of one home."""

    def __init__(self, home: Path, record: Record, token: str, worker: Sequence[str]) -> None:
        self.record = record
        self.proxy = Proxy(token, body_bytes=Settings.read(_environment(home, home)).body_bytes)
        self.ending = asyncio.Event()
        self._home = home
        self._worker = worker
        self._begin = time.monotonic()
        self._champion: Unit | None = None
        self._challenger: Unit | None = None
        self._challenger_log = ""
        self._one = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def begin(self) -> None:
        """Bring the champion of the record back; its challenger has died with the last supervisor."""
        champion, previous = (
            deployed and deployed.model_copy(update={"url": self.proxy.url})
            for deployed in (self.record.champion, self.record.previous)
        )
        self._write(Record(champion=champion, previous=previous))
        if champion is not None:
            self._champion = Unit(champion, self._home, self._worker)
            self._note_processes()
            self._spawn(self._keep(self._champion, started=False))
        self._spawn(self._forget_streams())

    async def end(self) -> None:
        """Answer what is there, then end all services; they store their streams."""
        async with self._one:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.proxy.close()
            units = [unit for unit in (self._champion, self._challenger) if unit is not None]
            await asyncio.gather(*(unit.stop() for unit in units))
            for unit in units:
                unit.close()
            self._write(self.record.model_copy(update={"challenger": None}))

    async def obey(self, command: str, arguments: dict[str, Any]) -> Any:
        """Carry out a command of the deployer, one at a time.

        Raises:
            FlowSentryError: it could not be done; why.
        """
        commands: dict[str, Callable[..., Awaitable[Any]]] = {
            "start_challenger": self._start_challenger,
            "stop_challenger": self._stop_challenger,
            "promote": self._promote,
            "rollback": self._rollback,
        }
        match command:
            case "status":
                return (await self._status()).model_dump()
            case "challenger_log":
                return self._challenger.output.tail() if self._challenger else self._challenger_log
            case "stop":
                self.ending.set()
                return None
            case known if known in commands:
                async with self._one:
                    if self.ending.is_set():
                        raise DeployError("the services are being stopped")
                    return await commands[known](**arguments)
            case _:
                raise DeployError(
                    f"the supervisor is of another version and does not know {command}; stop it, start it"
                )

    async def _status(self) -> Status:
        return Status(
            record=self.record,
            running=True,
            pid=os.getpid(),
            url=self.proxy.url,
            uptime=time.monotonic() - self._begin,
            champion=await self._champion.told(self.proxy) if self._champion else None,
            challenger=await self._challenger.told(self.proxy) if self._challenger else None,
        )

    async def _start_challenger(
        self, bundle: str, model_version: str, digest: str, seconds: float, owner: list[Any]
    ) -> str:
        pid, begin = owner
        self._check_free((pid, begin))
        await self._drop_challenger()
        await asyncio.to_thread(_install, Path(bundle), self._home / "bundles" / digest, model_version, digest)
        deployed = Deployed(model_version=model_version, digest=digest, url="")
        unit = Unit(deployed, self._home, self._worker, (pid, begin))
        self._challenger = unit
        try:
            await self._run(unit, seconds)
        except DeployError:
            await self._drop_challenger()
            self._tidy()
            raise
        unit.deployed = unit.deployed.model_copy(update={"url": unit.url})
        self._write(self.record.model_copy(update={"challenger": unit.deployed}))
        self._spawn(self._mourn(unit))
        self._spawn(self._follow_owner(unit))
        return unit.url

    def _check_free(self, owner: tuple[int, str]) -> None:
        other = self._challenger
        if other is None or other.state != "ready" or other.owner in (None, owner):
            return
        age = time.monotonic() - other.begin
        if age < TRIAL_SECONDS and _lives(other.owner):
            raise DeployError(
                f"{other.name} is on trial, for process {other.owner[0]} since {age:.0f} s; wait for its end and try "
                f"again"
            )
        log.warning("%s is on trial for %.0f s and gives way", other.name, age)

    async def _run(self, unit: Unit, seconds: float) -> None:
        """Start and wait; a process that does not become ready is stopped."""
        try:
            await unit.start()
            self._note_processes()
            await unit.become_ready(self.proxy, seconds)
        except StoreError as error:
            unit.state, unit.problem = "failed", str(error)
            raise DeployError(str(error)) from error
        except DeployError:
            unit.state = "failed"
            await unit.stop()
            raise

    async def _stop_challenger(self, digest: str | None) -> None:
        if self._challenger is not None and digest is not None:
            self._check_is(self._challenger, digest)
        await self._drop_challenger()
        self._tidy()

    async def _drop_challenger(self, why: str = "") -> None:
        if (unit := self._challenger) is None:
            return
        await unit.stop()
        if why:
            unit.output.write(f"flowsentry: {why}\n".encode())
        self._challenger_log = unit.output.tail()
        unit.close()
        self._challenger = None
        self._write(self.record.model_copy(update={"challenger": None}))

    def _check_is(self, challenger: Unit, digest: str) -> None:
        if challenger.deployed.digest != digest:
            raise DeployError(
                f"the challenger is {challenger.name}, bundle {challenger.deployed.digest[:12]}, not bundle "
                f"{digest[:12]}: another run has started it meanwhile"
            )

    async def _promote(self, digest: str, instead_of: str | None) -> dict[str, Any]:
        unit = self._challenger
        if unit is None:
            raise DeployError("there is no challenger to promote")
        self._check_is(unit, digest)
        champion = self.record.champion
        if instead_of != (champion.digest if champion else None):
            serving = f"model version {champion.model_version}, bundle {champion.digest[:12]}" if champion else "none"
            raise DeployError(
                f"the champion is {serving}, and {unit.name} was compared with "
                f"{f'bundle {instead_of[:12]}' if instead_of else 'none'}: another run has changed it meanwhile; run "
                f"the pipeline again"
            )
        if unit.state != "ready":
            raise DeployError(f"the challenger, {unit.name}, cannot be promoted: {unit.problem}\n{unit.output.tail()}")
        if await self.proxy.ask(unit.url, "GET", "/readyz", PROBE_SECONDS) != 200:
            raise DeployError(f"the challenger, {unit.name}, does not answer; log {unit.output.path}")
        await self._switch(unit)
        self._tidy()
        return self.record.model_dump()

    async def _rollback(self, seconds: float) -> dict[str, Any]:
        if (previous := self.record.previous) is None:
            raise DeployError("there is no previous champion to go back to")
        unit = Unit(previous, self._home, self._worker)
        try:
            await self._run(unit, seconds)
            await self._switch(unit)
        except DeployError:
            await unit.stop()
            unit.close()
            raise
        return self.record.model_dump()

    async def _switch(self, unit: Unit) -> None:
        """Make a ready service the champion: hold requests, let the old one store its streams, write, move traffic.

        An old one that does not answer its requests, or does not let go of its streams, is killed: what it has not
        stored is sent again by the clients.
        """
        old = self._champion
        async with self.proxy.switching():
            is_idle = await self.proxy.become_idle(DRAIN_SECONDS)
            released = 200
            if old is not None and old.pid is not None and old.state == "ready":
                released = await self.proxy.ask(old.url, "POST", "/v1/release", RELEASE_SECONDS)
            # From here to the new target nothing is waited for: nobody sees the old one dead and starts it again.
            if unit.pid is None:
                raise DeployError(f"{unit.name} has died and cannot become the champion; log {unit.output.path}")
            if old is not None and not (is_idle and released == 200):
                what = (
                    "did not end its requests"
                    if not is_idle
                    else f"did not release its streams ({released or 'no answer'})"
                )
                log.error("%s %s and is killed\n%s", old.name, what, old.output.tail())
                old.kill()
            unit.deployed = unit.deployed.model_copy(update={"url": self.proxy.url})
            before = self.record.champion
            again = before is not None and before.digest == unit.deployed.digest
            self._write(
                Record(
                    champion=unit.deployed,
                    previous=self.record.previous if again else before,
                    challenger=None if unit is self._challenger else self.record.challenger,
                )
            )
            self._champion = unit
            if unit is self._challenger:
                self._challenger = None
            self.proxy.point(unit.url)
        log.info("%s is the champion", unit.name)
        self._spawn(self._keep(unit, started=True))
        if old is not None:
            await old.stop()
            old.close()
        self._note_processes()

    async def _keep(self, unit: Unit, *, started: bool) -> None:
        """Start the champion again whenever it dies, sooner or later, until it is no longer the champion."""
        backoff = 0.0
        while True:
            try:
                if not started:
                    await self._run(unit, 60)
                    if self._champion is not unit:
                        return
                    self.proxy.point(unit.url)
                    log.info("%s is ready", unit.name)
                started = False
                self._spawn(self._probe(unit))
                status = await unit.ended()
                if self._champion is not unit or self.ending.is_set():
                    return
                unit.problem = f"ended with {ending(status)}"
                log.error("the champion, %s, ended with %s\n%s", unit.name, ending(status), unit.output.tail())
            except DeployError as error:
                if self._champion is not unit:
                    return
                log.error("%s", error)
                if isinstance(error.__cause__, StoreError):  # trying again helps nobody
                    return
            self.proxy.point(None)
            unit.state = "waiting"
            backoff = 0.0 if time.monotonic() - unit.begin > STEADY_SECONDS else backoff
            await asyncio.sleep(backoff)
            backoff = min(max(2 * backoff, 0.5), LONGEST_BACKOFF)
            if self._champion is not unit:
                return
            unit.restarts += 1

    async def _probe(self, unit: Unit) -> None:
        """Kill the champion's present process if it no longer answers; `_keep` starts the next one."""
        pid, misses = unit.pid, 0
        while pid is not None and misses < MOST_MISSES:
            asked = time.monotonic()
            answered = await self.proxy.ask(unit.url, "GET", "/livez", PROBE_SECONDS)
            misses = 0 if answered else misses + 1
            await asyncio.sleep(asked + PROBE_SECONDS - time.monotonic())
            if self._champion is not unit or unit.pid != pid:
                return
        log.error("the champion, %s, has not answered %d times in a row and is killed", unit.name, misses)
        unit.kill()

    async def _follow_owner(self, unit: Unit) -> None:
        """Stop a challenger that nobody has on trial any more."""
        while unit.owner is not None and _lives(unit.owner):
            await asyncio.sleep(OWNER_SECONDS)
            if self._challenger is not unit:
                return
        async with self._one:
            if self._challenger is unit and unit.owner is not None:
                said = f"process {unit.owner[0]}, which had it on trial, has ended: it is stopped"
                log.warning("the challenger, %s: %s", unit.name, said)
                await self._drop_challenger(said)
                self._tidy()

    async def _mourn(self, unit: Unit) -> None:
        """Record the death of a challenger."""
        status = await unit.ended()
        if self._challenger is unit and unit.state == "ready":
            unit.state, unit.problem = "failed", f"it ended with {ending(status)}"
            log.error("the challenger, %s, ended with %s\n%s", unit.name, ending(status), unit.output.tail())
            self._write(self.record.model_copy(update={"challenger": None}))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget_streams(self) -> None:
        """Remove old checkpoints, now and every day."""
        while True:
            await asyncio.to_thread(forget_streams, self._home / "state", time.time())
            await asyncio.sleep(TIDY_SECONDS)

    def _write(self, record: Record) -> None:
        self.record = record
        write_atomically(self._home / "record.json", record.model_dump_json(indent=1))

    def _note_processes(self) -> None:
        """So that a next supervisor can end what this one leaves if it is killed."""
        pids = [unit.pid for unit in (self._champion, self._challenger) if unit is not None and unit.pid is not None]
        write_atomically(self._home / "run" / "processes.json", json.dumps({pid: started(pid) for pid in pids}))

    def _tidy(self) -> None:
        """Forget bundles that nothing refers to, and old logs."""
        record = self.record
        kept = {d.digest for d in (record.champion, record.previous, record.challenger) if d is not None}
        for folder in (self._home / "bundles").iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
        logs = sorted((self._home / "logs").glob("service-*.log*"), key=lambda path: path.stat().st_mtime)
        for path in logs[:-KEPT_LOGS]:
            if not any(path.name.startswith(f"service-{digest[:12]}") for digest in kept):
                path.unlink(missing_ok=True)


def forget_streams(state: Path, now: float) -> None:
    """Remove the checkpoints of a folder that were not written for long, those set aside included.

    Args:
        state: the folder.
        now: seconds since 1970.
    """
    for path in (*state.glob("*/*.state"), *state.glob("*/*.state.damaged")):
        with contextlib.suppress(OSError):
            if has_outlived(path.name, seconds := now - path.stat().st_mtime):
                path.unlink()
                log.info("removed %s, not written for %.0f days", path, seconds / 86_400)


def has_outlived(name: str, seconds: float) -> bool:
    """Whether a checkpoint may go that was not written for so long.

    Args:
        name: of its file.
        seconds: since it was written.
    """
    is_trial = _TRIAL.fullmatch(name.partition(".state")[0])
    return seconds > (FORGET_TRIAL_SECONDS if is_trial else FORGET_SECONDS)


def ending(status: int) -> str:
    """How a process ended, in words."""
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _install(source: Path, target: Path, model_version: str, digest: str) -> None:
    """Copy a bundle to where it is served from, whole or not at all, and verify the copy.

    Raises:
        StoreError: it is damaged, or another one.
    """
    bundle = bundles.verify(source, digest)
    if bundle.about["model_version"] != model_version:
        raise StoreError(f"{source}: is model version {bundle.about['model_version']}, not {model_version}")
    try:
        bundles.verify(target, digest)
    except StoreError:
        shutil.rmtree(target, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="incoming-") as scratch:
            copy = Path(scratch, "bundle")
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            bundles.verify(copy, digest)
            copy.replace(target)
    bundles.warm(target)


def _environment(home: Path, metrics: Path) -> dict[str, str]:
    """Of a service: its code comes from its bundle, so nothing of ours is on its path."""
    environment = dict(os.environ)
    path = environment.pop("PYTHONPATH", "").split(os.pathsep)
    if kept := [entry for entry in path if entry and not Path(entry, "flowsentry").is_dir()]:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    telemetry.disable(environment)
    environment.pop("FLOWSENTRY_SERVICE_TOKEN", None)
    environment.setdefault("FLOWSENTRY_SERVICE_STATE", str(home / "state"))
    return environment | {
        "BENTOML_HOME": str(home / "bentoml"),
        "FLOWSENTRY_SERVICE_TOKEN_FILE": str(home / "token"),
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "PYTHONUNBUFFERED": "1",
    }


def _die_with_parent() -> Callable[[], None] | None:
    """On Linux a service gets SIGTERM when its supervisor dies; elsewhere the next supervisor ends it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(1, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _lives(process: tuple[int, str]) -> bool:
    pid, begin = process
    return bool(begin) and started(pid) == begin


def started(pid: int) -> str:
    """When a running process began: with the pid this names a process for good. Empty if it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        return "" if state == "Z" else numbers[18]
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"LC_ALL": "C"}).stdout.strip()


def _end_leftovers(path: Path) -> None:
    """End services that a supervisor which was killed has left behind."""
    try:
        left = {int(pid): str(begin) for pid, begin in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return
    left = dict(filter(_lives, left.items()))
    for pid in left:
        os.kill(pid, signal.SIGTERM)
    limit = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < limit and any(map(_lives, left.items())):
        time.sleep(0.1)
    for pid in filter(lambda pid: _lives((pid, left[pid])), left):
        _kill_group(pid)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, private to its owner, such that after a crash it is the old or the new one, whole."""
    fresh = path.with_name(f".{path.name}.new")
    with os.fdopen(os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_record(home: Path) -> Record:
    """What the record of a home says; an empty one if there is none yet.

    Raises:
        DeployError: it is damaged.
    """
    path = home / "record.json"
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Record()
    except (OSError, ValidationError) as error:
        raise DeployError(
            f"{path}: the record of what is deployed is damaged; restore it, or remove it and deploy again"
        ) from error


def read_token(home: Path) -> str:
    """The bearer token of a home.

    Raises:
        DeployError: there is none.
    """
    path = home / "token"
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        token = ""
    if not token:
        raise DeployError(f"{path}: holds no token; `python -m flowsentry stop`, remove the file, and start again")
    return token


def socket_path(home: Path) -> Path:
    """Of the control socket: in the home, or in a private folder where its path would be too long for a socket.

    Raises:
        DeployError: somebody else has taken that folder.
    """
    path = home / "control.sock"
    if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
        return path
    folder = Path(tempfile.gettempdir()) / f"flowsentry-{os.getuid()}-{sha256(os.fsencode(home)).hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise DeployError(f"{folder}: is not private; remove it, or set FLOWSENTRY_HOME to a shorter path")
    return folder / "control.sock"


def lock(home: Path) -> int | None:
    """File descriptor of the lock that the one supervisor of a home holds until its end; None if another has it."""
    file = os.open(home / "supervisor.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


async def _serve(home: Path, port: int, worker: Sequence[str], report: Callable[[str], None]) -> None:
    record = read_record(home)
    if not (home / "token").exists():
        write_atomically(home / "token", secrets.token_urlsafe(32))
    token = read_token(home)
    await asyncio.to_thread(_end_leftovers, home / "run" / "processes.json")
    shutil.rmtree(home / "run", ignore_errors=True)
    for name in ("bundles", "state", "run", "bentoml"):
        (home / name).mkdir(mode=0o700, exist_ok=True)
    supervisor = Supervisor(home, record, token, worker)
    try:
        await supervisor.proxy.listen(HOST, port)
    except OSError as error:
        await supervisor.proxy.close()
        raise DeployError(f"port {port} of {HOST} is taken; set FLOWSENTRY_PORT to a free one") from error

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = json.loads(await reader.readline())
            try:
                answer = {"value": await supervisor.obey(asked.pop("command"), asked)}
            except FlowSentryError as error:
                answer = {"error": str(error)}
            except Exception as error:
                log.exception("a command failed")
                answer = {"error": f"{type(error).__name__}: {error}; log {home / 'logs' / 'supervisor.log'}"}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (ValueError, OSError):
            pass
        finally:
            writer.close()

    path = socket_path(home)
    path.unlink(missing_ok=True)
    mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(control, path)
    finally:
        os.umask(mask)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, supervisor.ending.set)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    await supervisor.begin()
    report("")
    log.info("process %d listens at %s", os.getpid(), supervisor.proxy.url)
    await supervisor.ending.wait()
    await supervisor.end()
    server.close()
    path.unlink(missing_ok=True)
    log.info("ended")


def main() -> int:
    """Leave the caller's session, then serve until told to stop.

    The first line of the output is empty once it listens, or says why it cannot.
    """
    parser = argparse.ArgumentParser(prog="python -m flowsentry.serving.supervisor", description=main.__doc__)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--worker", help="a program that serves bundles in place of BentoML's worker")
    arguments = parser.parse_args()
    home: Path = arguments.home
    worker = WORKER if arguments.worker is None else (arguments.worker,)
    (home / "logs").mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.fork():  # who starts it need not wait for its end
        os._exit(0)
    os.setsid()
    if lock(home) is None:
        print(LOCKED, flush=True)
        return 1
    handler = logging.handlers.RotatingFileHandler(home / "logs" / "supervisor.log", maxBytes=LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    logging.getLogger("asyncio").addHandler(handler)
    logging.getLogger("aiohttp").addHandler(handler)
    log.setLevel(logging.INFO)

    def report(text: str) -> None:
        print(text, flush=True)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.close(nowhere)

    try:
        asyncio.run(_serve(home, arguments.port, worker, report))
    except FlowSentryError as error:
        log.error("%s", error)
        report(str(error))
        return 1
    except Exception as error:
        log.exception("the supervisor failed")
        report(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
