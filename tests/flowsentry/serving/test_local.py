"""The local deployer with a stand-in service: real processes, sockets and signals."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from flowsentry.errors import ConfigError, DeployError
from flowsentry.serving import bundle as bundles
from flowsentry.serving import supervisor
from flowsentry.serving.deployer import Endpoint, Record
from flowsentry.serving.local import LocalDeployer

STAND_IN = Path(__file__).with_name("stand_in.py")
REPOSITORY = Path(__file__).parents[3]
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def make_bundle(folder: Path, version: str, python: str = THIS_PYTHON) -> tuple[Path, str, str]:
    """Arguments of `start_challenger`."""
    (folder / version / "src").mkdir(parents=True)
    about = {"model_version": version, "python": python}
    (folder / version / "src" / "bundle.json").write_text(json.dumps(about))
    text = bundles._sums(folder / version)
    (folder / version / bundles.SUMS).write_text(text)
    return folder / version, version, hashlib.sha256(text.encode()).hexdigest()


Make = Callable[..., LocalDeployer]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Deployers of one home; everything is stopped in the end, and nothing is left."""
    made: list[LocalDeployer] = []

    def make(**options: Any) -> LocalDeployer:
        made.append(LocalDeployer(tmp_path / "home", **{"port": 0, "worker": str(STAND_IN)} | options))
        return made[-1]

    yield make
    for deployer in made:
        deployer.stop()
    assert not processes(tmp_path / "home")


@pytest.fixture
def deployer(make: Make) -> LocalDeployer:
    return make(ready_seconds=15)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalDeployer]:
    """A deployer whose champion, version 1, no test changes."""
    folder = tmp_path_factory.mktemp("served")
    deployer = LocalDeployer(folder / "home", port=0, worker=str(STAND_IN))
    deploy(deployer, folder, "1")
    yield deployer
    deployer.stop()
    assert not processes(folder / "home")


def processes(home: Path) -> list[int]:
    """Running processes that have this home on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.fsencode(home) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def deploy(deployer: LocalDeployer, tmp_path: Path, version: str) -> str:
    bundle = make_bundle(tmp_path, version)
    deployer.start_challenger(*bundle)
    promote(deployer, bundle[2])
    return bundle[2]


def promote(deployer: LocalDeployer, digest: str) -> Record:
    """Instead of whichever champion there is."""
    champion = deployer.record().champion
    return deployer.promote(digest, champion.digest if champion else None)


def ask(endpoint: Endpoint, path: str = "/v1/verdicts", method: str = "POST", **options: Any) -> tuple[int, Any]:
    """Status and body of an answer."""

    async def one() -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {endpoint.token}"} if endpoint.token else {}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, endpoint.url + path, headers=headers, **options) as answer,
        ):
            text = await answer.text()
            return answer.status, json.loads(text) if text.startswith("{") else text

    return asyncio.run(one())


def until(holds: Callable[[], bool], seconds: float = 15) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit, "it never came to be"
        time.sleep(0.02)


class Load:
    """Requests at a steady rate for the duration of a block."""

    def __init__(self, endpoint: Endpoint, rate: int) -> None:
        self.statuses: Counter[int] = Counter()
        self.versions: list[str] = []
        self.longest = 0.0
        self._endpoint, self._rate = endpoint, rate
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()))

    def __enter__(self) -> Load:
        self._thread.start()
        until(lambda: self.statuses[200] > 20)
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.2)
        self._end.set()
        self._thread.join()

    async def _send(self) -> None:
        headers = {"Authorization": f"Bearer {self._endpoint.token}"}
        async with aiohttp.ClientSession(headers=headers) as session, asyncio.TaskGroup() as group:
            begin, number = time.monotonic(), 0
            while not self._end.is_set():
                group.create_task(self._one(session))
                number += 1
                await asyncio.sleep(max(0.0, begin + number / self._rate - time.monotonic()))

    async def _one(self, session: aiohttp.ClientSession) -> None:
        begin = time.monotonic()
        try:
            async with session.post(f"{self._endpoint.url}/v1/verdicts?stream=load", data=b"x") as answer:
                if answer.status == 200:
                    self.versions.append((await answer.json())["model_version"])
                self.statuses[answer.status] += 1
        except aiohttp.ClientError:
            self.statuses[0] += 1
        self.longest = max(self.longest, time.monotonic() - begin)


def test_nothing_runs_before_it_is_needed(deployer: LocalDeployer) -> None:
    status = deployer.status()
    assert (status.running, status.record.champion, deployer.challenger_log()) == (False, None, "")
    with pytest.raises(DeployError, match="no model has been deployed"):
        deployer.endpoint()
    assert not deployer.home.exists()


def test_a_challenger_answers_beside_the_champion_until_it_replaces_it(deployer: LocalDeployer, tmp_path: Path) -> None:
    first = deploy(deployer, tmp_path, "1")
    second = make_bundle(tmp_path, "2")
    challenger = deployer.start_challenger(*second)
    assert ask(deployer.endpoint())[1]["model_version"] == "1"
    assert ask(challenger)[1]["model_version"] == "2"
    assert challenger.url != deployer.endpoint().url
    record = deployer.promote(second[2], first)
    assert record.champion is not None and record.previous is not None
    assert (record.champion.model_version, record.previous.digest, record.challenger) == ("2", first, None)
    assert record.champion.url == deployer.endpoint().url
    assert ask(deployer.endpoint())[1]["model_version"] == "2"
    assert deployer.record() == record


def test_streams_go_on_over_a_switch_and_a_rollback(deployer: LocalDeployer, tmp_path: Path) -> None:
    deploy(deployer, tmp_path, "1")
    assert [ask(deployer.endpoint())[1]["seen"] for _ in range(2)] == [1, 2]
    deploy(deployer, tmp_path, "2")
    assert ask(deployer.endpoint())[1] | {"pid": 0} == {"model_version": "2", "seen": 3, "body": 0, "pid": 0}
    record = deployer.rollback()
    assert record.champion is not None and record.previous is not None
    assert (record.champion.model_version, record.previous.model_version) == ("1", "2")
    assert ask(deployer.endpoint())[1] | {"pid": 0} == {"model_version": "1", "seen": 4, "body": 0, "pid": 0}


def test_no_request_fails_while_champions_change(deployer: LocalDeployer, tmp_path: Path) -> None:
    first, second = deploy(deployer, tmp_path, "1"), make_bundle(tmp_path, "2")
    deployer.start_challenger(*second)
    with Load(deployer.endpoint(), 200) as load:
        deployer.promote(second[2], first)
        deployer.rollback()
    assert set(load.statuses) == {200}
    assert set(load.versions) == {"1", "2"}
    changes = [b for a, b in zip(load.versions, load.versions[1:], strict=False) if a != b]
    assert changes == ["2", "1"]
    assert ask(deployer.endpoint(), "/v1/verdicts?stream=load")[1]["seen"] == len(load.versions) + 1


def test_services_survive_their_starter_and_stop_leaves_nothing(deployer: LocalDeployer, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "1")
    program = f"""
from pathlib import Path
from flowsentry.serving.local import LocalDeployer
deployer = LocalDeployer(Path({str(deployer.home)!r}), port=0, worker={str(STAND_IN)!r})
deployer.start_challenger(Path({str(bundle[0])!r}), "1", {bundle[2]!r})
deployer.promote({bundle[2]!r}, None)
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True, timeout=30, start_new_session=True)
    assert ask(deployer.endpoint())[0] == 200
    assert len(processes(deployer.home)) == 2
    deployer.stop()
    assert not processes(deployer.home)
    record = deployer.record()
    assert record.champion is not None and not deployer.status().running
    assert json.loads((deployer.home / "state" / "seen.json").read_text()) == {"default": 1}


def test_a_champion_that_dies_is_started_again_and_requests_wait_for_it(
    deployer: LocalDeployer, tmp_path: Path
) -> None:
    deploy(deployer, tmp_path, "1")
    endpoint = deployer.endpoint()
    before = ask(endpoint)[1]["pid"]
    for restarts in (1, 2):
        os.kill(ask(endpoint)[1]["pid"], signal.SIGKILL)
        assert ask(endpoint, "/v1/verdicts?seen=1")[0] == 200
        champion = deployer.status().champion
        assert champion is not None
        assert (champion.restarts, champion.exit_status, champion.healthy) == (restarts, -9, True)
    assert ask(endpoint)[1]["pid"] != before


def test_a_challenger_that_cannot_start_says_why(served: LocalDeployer, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"(?s)ended with exit status 3.*no such feature: flag_count"):
        served.start_challenger(*make_bundle(tmp_path, "dies-at-once"))
    assert "flag_count" in served.challenger_log()
    assert ask(served.endpoint())[1]["model_version"] == "1"
    assert served.record().challenger is None


def test_a_challenger_that_is_never_ready_is_stopped(make: Make, tmp_path: Path) -> None:
    deployer = make(ready_seconds=1)
    with pytest.raises(DeployError, match=r"was not ready after 1 s; log .*service-"):
        deployer.start_challenger(*make_bundle(tmp_path, "never-ready"))
    assert len(processes(deployer.home)) == 1


def test_the_death_of_a_challenger_is_recorded_and_it_stays_dead(served: LocalDeployer, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path, "dies-of-a-flow")
    challenger = served.start_challenger(*bundle)
    with pytest.raises(aiohttp.ClientError):
        ask(challenger, data=b"poison")
    until(lambda: served.record().challenger is None)
    dead = served.status().challenger
    assert dead is not None
    assert (dead.state, dead.exit_status, dead.pid, dead.restarts) == ("failed", 9, None, 0)
    assert "division by zero" in served.challenger_log()
    with pytest.raises(DeployError, match=r"(?s)ended with exit status 9.*division by zero"):
        promote(served, bundle[2])
    assert ask(served.endpoint())[1]["model_version"] == "1"
    served.stop_challenger()
    assert served.status().challenger is None
    assert "division by zero" in served.challenger_log()


def test_a_champion_that_does_not_let_go_is_killed_and_replaced(deployer: LocalDeployer, tmp_path: Path) -> None:
    deploy(deployer, tmp_path, "does-not-release")
    left = ask(deployer.endpoint())[1]["pid"]
    deploy(deployer, tmp_path, "2")
    assert left not in processes(deployer.home)
    assert ask(deployer.endpoint())[1]["model_version"] == "2"
    assert "did not release its streams (500)" in (deployer.home / "logs" / "supervisor.log").read_text()


def test_only_the_tested_challenger_replaces_only_the_champion_that_it_was_compared_with(
    served: LocalDeployer, tmp_path: Path
) -> None:
    champion = served.record().champion
    assert champion is not None
    gated, other = make_bundle(tmp_path, "gated"), make_bundle(tmp_path, "other")
    served.start_challenger(*gated)
    served.start_challenger(*other)
    with pytest.raises(DeployError, match=r"the challenger is model version other, bundle .* not bundle"):
        served.promote(gated[2], champion.digest)
    with pytest.raises(DeployError, match="the challenger is model version other"):
        served.stop_challenger(gated[2])
    for instead_of, words in ((None, "was compared with none"), (gated[2], f"with bundle {gated[2][:12]}")):
        with pytest.raises(DeployError, match=f"the champion is model version 1, .*{words}: another run"):
            served.promote(other[2], instead_of)
    record = served.record()
    assert record.champion == champion and record.challenger is not None and record.challenger.digest == other[2]
    served.stop_challenger(other[2])
    served.stop_challenger(other[2])
    assert served.status().challenger is None


TRY = """
import sys, time
from pathlib import Path
from flowsentry.serving.local import LocalDeployer
deployer = LocalDeployer(Path({home!r}), port=0, worker={worker!r})
deployer.start_challenger(Path({path!r}), {version!r}, {digest!r})
print("ready", flush=True)
time.sleep(60)
"""


def test_a_challenger_on_trial_is_left_alone_and_ends_with_the_process_that_tries_it(
    served: LocalDeployer, tmp_path: Path
) -> None:
    path, version, digest = make_bundle(tmp_path, "tried")
    program = TRY.format(home=str(served.home), worker=str(STAND_IN), path=str(path), version=version, digest=digest)
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == b"ready\n"
            with pytest.raises(DeployError, match=rf"model version tried is on trial, for process {other.pid} since"):
                served.start_challenger(*make_bundle(tmp_path, "2"))
        finally:
            other.kill()
    tried = served.status().challenger
    assert tried is not None and tried.pid is not None
    until(lambda: served.status().challenger is None)
    assert tried.pid not in processes(served.home)
    assert served.challenger_log().endswith(f"process {other.pid}, which had it on trial, has ended: it is stopped")
    assert served.record().challenger is None
    assert ask(served.endpoint())[1]["model_version"] == "1"


def test_a_bundle_for_another_python_is_not_served(served: LocalDeployer, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=rf"built for Python 3\.9, and this is Python {THIS_PYTHON}: train again"):
        served.start_challenger(*make_bundle(tmp_path, "old", python="3.9"))
    assert served.status().challenger is None


def test_there_is_nothing_to_promote_or_to_go_back_to(served: LocalDeployer, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="no challenger"):
        promote(served, "0" * 64)
    with pytest.raises(DeployError, match="no previous champion"):
        served.rollback()


def test_the_same_bundle_again_keeps_the_previous_champion(deployer: LocalDeployer, tmp_path: Path) -> None:
    first = deploy(deployer, tmp_path, "1")
    second = make_bundle(tmp_path, "2")
    for _ in range(2):
        deployer.start_challenger(*second)
        record = promote(deployer, second[2])
        assert record.previous is not None and record.previous.digest == first


def test_only_what_can_be_gone_back_to_is_kept(deployer: LocalDeployer, tmp_path: Path) -> None:
    digests = [deploy(deployer, tmp_path, version) for version in "123"]
    assert {path.name for path in (deployer.home / "bundles").iterdir()} == set(digests[1:])


def test_an_altered_bundle_is_not_served(served: LocalDeployer, tmp_path: Path) -> None:
    path, version, digest = make_bundle(tmp_path, "1")
    with pytest.raises(DeployError, match="digest"):
        served.start_challenger(path, version, "0" * 64)
    with pytest.raises(DeployError, match="is model version 1, not 7"):
        served.start_challenger(path, "7", digest)
    (path / "src" / "more.py").write_text("")
    with pytest.raises(DeployError, match=r"src/more\.py is not what was built"):
        served.start_challenger(path, version, digest)


def test_rollback_to_an_altered_bundle_leaves_the_champion(deployer: LocalDeployer, tmp_path: Path) -> None:
    first = deploy(deployer, tmp_path, "1")
    deploy(deployer, tmp_path, "2")
    (deployer.home / "bundles" / first / "src" / "bundle.json").write_text("{}")
    with pytest.raises(DeployError, match="is not what was built"):
        deployer.rollback()
    assert ask(deployer.endpoint())[1]["model_version"] == "2"


@pytest.mark.parametrize("moment", ["serving", "with a challenger"])
def test_start_repairs_what_a_killed_supervisor_leaves(deployer: LocalDeployer, tmp_path: Path, moment: str) -> None:
    deploy(deployer, tmp_path, "1")
    ask(deployer.endpoint())
    if moment == "with a challenger":
        deployer.start_challenger(*make_bundle(tmp_path, "2"))
    pid = deployer.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    status = deployer.start()
    assert status.pid != pid
    assert (status.record.challenger, status.challenger) == (None, None)
    assert ask(deployer.endpoint())[1] | {"pid": 0} == {"model_version": "1", "seen": 2, "body": 0, "pid": 0}
    assert len(processes(deployer.home)) == 2


def test_a_supervisor_killed_at_any_point_of_a_switch_leaves_a_champion(make: Make, tmp_path: Path) -> None:
    deployer = make()
    champion = deploy(deployer, tmp_path, "1")
    second = make_bundle(tmp_path, "2")
    found = set()
    for delay in (0.0, 0.004, 0.02):
        deployer.start_challenger(*second)
        pid = deployer.status().pid
        assert pid is not None
        with ThreadPoolExecutor() as pool:
            promotion = pool.submit(deployer.promote, second[2], champion)
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            promotion.exception()
        status = deployer.start()
        assert status.record.champion is not None
        answered = ask(deployer.endpoint())[1]["model_version"]
        assert answered == status.record.champion.model_version
        found.add(answered)
        champion = status.record.champion.digest
    assert found <= {"1", "2"}


def test_a_leftover_service_is_ended_even_if_it_ignores_the_first_signal(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "GRACE_SECONDS", 0.5)
    home = tmp_path / "home"
    deployer = make()
    deploy(deployer, tmp_path, "ignores-sigterm")
    left = ask(deployer.endpoint())[1]["pid"]
    pid = deployer.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(processes(home)) == 1)
    supervisor._end_leftovers(home / "run" / "processes.json")
    until(lambda: left not in processes(home), 1)


def test_two_starters_share_one_supervisor(make: Make, tmp_path: Path) -> None:
    deploy(make(), tmp_path, "1")
    make().stop()
    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: make().start(), range(4)))
    assert len({status.pid for status in statuses}) == 1
    assert len(processes(make().home)) == 2


def test_a_damaged_record_is_named(deployer: LocalDeployer, tmp_path: Path) -> None:
    deploy(deployer, tmp_path, "1")
    deployer.stop()
    (deployer.home / "record.json").write_text('{"champion": 1}')
    for ask_for in (deployer.start, deployer.record):
        with pytest.raises(DeployError, match=r"record\.json: .* is damaged"):
            ask_for()


def test_a_taken_port_is_named(make: Make) -> None:
    with socket.socket() as taken:
        taken.bind((supervisor.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(DeployError, match=f"port {port} of 127.0.0.1 is taken; set FLOWSENTRY_PORT"):
            make(port=port).start()


def test_a_port_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWSENTRY_PORT", "http")
    with pytest.raises(ConfigError, match="FLOWSENTRY_PORT"):
        LocalDeployer()


def test_the_address_asks_for_the_token_and_shows_nothing_else(served: LocalDeployer) -> None:
    endpoint = served.endpoint()
    assert endpoint.token not in repr(endpoint)
    for token in (None, "", endpoint.token and endpoint.token[:-1], "é"):
        status, problem = ask(Endpoint(url=endpoint.url, token=token), data=b"secret flows")
        assert (status, problem["code"]) == (401, "unauthorized")
    assert ask(endpoint, "/", "GET")[0] == 404
    assert ask(endpoint, "/docs.json", "GET")[0] == 404
    assert ask(Endpoint(url=endpoint.url, token=None), "/readyz", "GET")[0] == 200
    assert stat.S_IMODE((served.home / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(supervisor.socket_path(served.home).stat().st_mode) == 0o600
    assert stat.S_IMODE(served.home.stat().st_mode) == 0o700


def test_bodies_pass_whole_up_to_a_limit(served: LocalDeployer) -> None:
    endpoint = served.endpoint()
    assert ask(endpoint, data=io.BytesIO(bytes(5_000_000)))[1]["body"] == 5_000_000
    status, problem = ask(endpoint, data=io.BytesIO(bytes((32 << 20) + 1)))
    assert (status, problem["code"]) == (413, "too_large")
    assert problem["detail"] == f"the body is longer than {32 << 20} bytes"


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/healthz"])
def test_what_asks_for_no_token_is_only_read_and_takes_no_body(served: LocalDeployer, path: str) -> None:
    anybody = Endpoint(url=served.endpoint().url, token=None)
    for method in ("POST", "PUT", "DELETE"):
        status, problem = ask(anybody, path, method, data=b"x")
        assert (status, problem["code"]) == (405, "method_not_allowed")
    host, port = anybody.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        # the body never comes, and is not waited for
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n".encode())
        assert connection.recv(12) in (b"HTTP/1.1 200", b"HTTP/1.1 404")


def test_a_home_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    deployer = LocalDeployer(tmp_path / ("x" * 90), port=0, worker=str(STAND_IN))
    try:
        deploy(deployer, tmp_path, "1")
        path = supervisor.socket_path(deployer.home)
        assert len(str(path)) < 100 and path.exists()
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert ask(deployer.endpoint())[0] == 200
    finally:
        deployer.stop()
    assert not path.exists()
    path.parent.rmdir()


def test_a_running_supervisor_is_not_started_again(served: LocalDeployer) -> None:
    assert served.start().pid == served.status().pid


def test_a_champion_that_cannot_be_brought_back_can_be_rolled_back(deployer: LocalDeployer, tmp_path: Path) -> None:
    deploy(deployer, tmp_path, "1")
    second = deploy(deployer, tmp_path, "2")
    deployer.stop()
    deployer.stop()
    assert not deployer.status().running
    (deployer.home / "bundles" / second / "src" / "bundle.json").write_text("{}")
    with pytest.raises(DeployError, match=r"model version 2: .* is not what was built.*run.py --rollback"):
        deployer.start()
    deployer.rollback()
    assert ask(deployer.endpoint())[1]["model_version"] == "1"


class Home:
    """A supervisor within this process, with limits of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("bundles", "state", "run", "logs"):
            (folder / name).mkdir(parents=True)
        (folder / "token").write_text("secret")

    async def serve(self, bundles: list[tuple[Path, str, str]], act: Callable[[supervisor.Supervisor], Any]) -> None:
        """Deploy the bundles one after the other, do something, and end."""
        served = supervisor.Supervisor(self.folder, Record(), "secret", (str(STAND_IN),))
        await served.proxy.listen(supervisor.HOST, 0)
        await served.begin()
        try:
            champion = None
            for bundle in bundles:
                await self.start(served, bundle)
                await served.obey("promote", {"digest": bundle[2], "instead_of": champion})
                champion = bundle[2]
            await act(served)
        finally:
            await served.end()

    async def start(self, served: supervisor.Supervisor, bundle: tuple[Path, str, str], owner: int = 0) -> None:
        path, version, digest = bundle
        pid = owner or os.getpid()
        await served.obey(
            "start_challenger",
            {
                "bundle": str(path),
                "model_version": version,
                "digest": digest,
                "seconds": 15,
                "owner": [pid, supervisor.started(pid)],
            },
        )


async def post(served: supervisor.Supervisor, query: str = "") -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": "Bearer secret"}) as session,
        session.post(f"{served.proxy.url}/v1/verdicts{query}", data=b"x") as answer,
    ):
        assert answer.status == 200
        return dict(await answer.json())


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("how", ["promote", "rollback"])
def test_a_champion_that_hangs_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, busy: bool
) -> None:
    monkeypatch.setattr(supervisor, "DRAIN_SECONDS", 0.3)
    monkeypatch.setattr(supervisor, "RELEASE_SECONDS", 0.3)
    home = Home(tmp_path / "home")
    first, second, third = (make_bundle(tmp_path, version) for version in "123")

    async def hang_and_replace(served: supervisor.Supervisor) -> None:
        hung = (await post(served))["pid"]
        os.kill(hung, signal.SIGSTOP)
        waiting = asyncio.create_task(post(served, "?seen=1")) if busy else None
        await asyncio.sleep(0.1)
        if how == "promote":
            await home.start(served, third)
            await served.obey("promote", {"digest": third[2], "instead_of": second[2]})
        else:
            await served.obey("rollback", {"seconds": 15})
        wanted = "3" if how == "promote" else "1"
        assert (await post(served))["model_version"] == wanted
        if waiting is not None:
            assert (await waiting)["model_version"] == wanted
        assert hung not in processes(home.folder)
        assert served.record.champion is not None and served.record.champion.model_version == wanted
        status = await served.obey("status", {})
        assert (status["champion"]["restarts"], status["champion"]["healthy"]) == (0, True)

    asyncio.run(home.serve([first, second], hang_and_replace))
    assert not processes(home.folder)


def test_a_champion_that_hangs_is_started_again_but_not_one_that_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(supervisor, "MOST_MISSES", 4)
    home = Home(tmp_path / "home")

    async def hang(served: supervisor.Supervisor) -> None:
        hung = (await post(served, "?slow=1.5"))["pid"]
        assert (await post(served))["pid"] == hung
        os.kill(hung, signal.SIGSTOP)
        assert (await post(served, "?seen=2"))["pid"] != hung
        champion = (await served.obey("status", {}))["champion"]
        assert (champion["restarts"], champion["exit_status"], champion["healthy"]) == (1, -9, True)

    asyncio.run(home.serve([make_bundle(tmp_path, "1")], hang))
    assert not processes(home.folder)


def test_a_challenger_that_hangs_is_not_promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PROBE_SECONDS", 0.5)
    home = Home(tmp_path / "home")
    first, second = (make_bundle(tmp_path, version) for version in "12")

    async def hang(served: supervisor.Supervisor) -> None:
        await home.start(served, second)
        os.kill((await served.obey("status", {}))["challenger"]["pid"], signal.SIGSTOP)
        with pytest.raises(DeployError, match="model version 2, does not answer"):
            await served.obey("promote", {"digest": second[2], "instead_of": first[2]})
        assert (await post(served))["model_version"] == "1"
        os.kill((await served.obey("status", {}))["challenger"]["pid"], signal.SIGKILL)

    asyncio.run(home.serve([first], hang))


def test_a_trial_that_takes_too_long_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    first, second = (make_bundle(tmp_path, version) for version in "12")

    async def overlap(served: supervisor.Supervisor) -> None:
        await home.start(served, first, owner=os.getppid())
        with pytest.raises(DeployError, match="model version 1 is on trial"):
            await home.start(served, second)
        monkeypatch.setattr(supervisor, "TRIAL_SECONDS", 0.0)
        await home.start(served, second)
        assert served.record.challenger is not None and served.record.challenger.digest == second[2]

    asyncio.run(home.serve([], overlap))


def test_checkpoints_that_nobody_needs_are_removed(tmp_path: Path) -> None:
    now, day = time.time(), 86_400
    ages = {
        "default.state": 29,
        "old.state": 31,
        "young.state.damaged": 29,
        "old.state.damaged": 31,
        "gate-0123456789abcdef.state": 2,
        "gate-fedcba9876543210.state": 0.5,
        "gate-0123456789abcdef.state.damaged": 2,
        "replay-01234567.state": 2,
        "score-01234567.state": 2,
        "gate-north.state": 2,
        "notes.txt": 99,
    }
    folder = tmp_path / "behaviour-2"
    folder.mkdir()
    for name, age in ages.items():
        (folder / name).write_text("")
        os.utime(folder / name, (now, now - age * day))
    supervisor.forget_streams(tmp_path, now)
    assert {path.name for path in folder.iterdir()} == {
        "default.state", "young.state.damaged", "gate-fedcba9876543210.state", "gate-north.state", "notes.txt",
    }  # fmt: skip


def test_a_start_removes_old_checkpoints(deployer: LocalDeployer, tmp_path: Path) -> None:
    deploy(deployer, tmp_path, "1")
    deployer.stop()
    old, new = (deployer.home / "state" / "behaviour-2" / f"{name}.state" for name in ("old", "new"))
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("")
    os.utime(old, (0, 0))
    deployer.start()
    until(lambda: not old.exists())
    assert new.exists()
