from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from flowsentry.errors import ConfigError, StoreError
from flowsentry.serving.store import Store, open_store

NAME = "behaviour-1/default.state"


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    place = {
        "folder": str(tmp_path / "state"),
        "file": f"file://{tmp_path}/state",
        "memory": f"memory://bucket/{tmp_path.name}",
    }[request.param]
    yield open_store(place)
    if request.param == "memory":
        from fsspec.implementations.memory import MemoryFileSystem

        MemoryFileSystem.store.clear()


def test_what_was_written_is_read_replaced_and_deleted(store: Store) -> None:
    assert store.read(NAME) is None
    store.write(NAME, b"first")
    store.write("behaviour-1/other.state", b"")
    store.write(NAME, b"second, longer")
    assert store.read(NAME) == b"second, longer"
    assert store.read(NAME, 6) == b"second"
    assert store.read(NAME, 600) == b"second, longer"
    assert store.read("behaviour-1/other.state") == b""
    store.delete(NAME)
    store.delete(NAME)
    store.delete("no-such-view/default.state")
    assert store.read(NAME) is None


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/../x", "/etc/x", "a//b", "a/", ".x", "a/.x", "a\0b", "a b", "a\n", "ä", "a/b/c/d/e"],
)
def test_a_name_never_leaves_the_store(store: Store, name: str) -> None:
    for use in (lambda: store.read(name), lambda: store.write(name, b"x"), lambda: store.delete(name)):
        with pytest.raises(StoreError, match="name of a checkpoint"):
            use()


@pytest.mark.parametrize("url", ["s3://me:hunter2@bucket/x", "s3://me@bucket", "s3://bucket/x?secret=hunter2"])
def test_credentials_in_the_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="environment") as refusal:
        open_store(url)
    assert "hunter2" not in str(refusal.value)


def test_an_unknown_kind_of_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a store of checkpoints"):
        open_store("nosuch://bucket/x")


class Bucket:
    """Objects over S3's HTTP interface on this machine, whoever signs; silent if told so."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.is_silent = False

    async def answer(self, request: web.BaseRequest) -> web.Response:
        self.asked.append(request.method)
        if "Expect" in request.headers and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        content, key = await request.read(), request.path
        if self.is_silent:
            while self.is_silent:
                await asyncio.sleep(0.05)
            return web.Response(status=500)
        if request.method == "PUT":
            self.objects[key] = content
            return web.Response(headers={"ETag": '"0"'})
        if request.method == "DELETE":
            self.objects.pop(key, None)
            return web.Response(status=204)
        if key not in self.objects:
            text = "<Error><Code>NoSuchKey</Code><Message>none</Message></Error>"
            return web.Response(status=404, text=text, content_type="application/xml")
        part = request.http_range
        return web.Response(status=206 if part.stop else 200, body=self.objects[key][part])


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bucket]:
    """What `s3://` leads to, by the environment."""
    from s3fs import S3FileSystem

    bucket = Bucket()

    async def listen() -> web.ServerRunner:
        runner = web.ServerRunner(web.Server(bucket.answer), shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    loop = asyncio.new_event_loop()
    runner = loop.run_until_complete(listen())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*runner.addresses[0][:2]))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "anybody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    S3FileSystem.clear_instance_cache()
    yield bucket
    bucket.is_silent = False
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    S3FileSystem.clear_instance_cache()


def test_an_object_store_is_where_the_environment_says_and_asked_only_when_used(bucket: Bucket) -> None:
    store = open_store("s3://bucket/prefix")
    assert bucket.asked == []
    assert store.read(NAME) is None
    store.write(NAME, b"first")
    store.write(NAME, b"second, longer")
    assert bucket.objects == {f"/bucket/prefix/{NAME}": b"second, longer"}
    bucket.objects[f"/bucket/prefix/{NAME}"] = b"another replica's"  # nothing is remembered from before
    assert (store.read(NAME), store.read(NAME, 7)) == (b"another replica's", b"another")
    store.delete(NAME)
    store.delete(NAME)
    assert store.read(NAME) is None and bucket.objects == {}


def test_an_object_store_that_is_not_there_fails_soon(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = open_store("s3://bucket/prefix")
    begin = time.monotonic()
    for use in (lambda: store.read(NAME), lambda: store.write(NAME, b"x"), lambda: store.delete(NAME)):
        with pytest.raises(StoreError, match="in the store of checkpoints"):
            use()
    assert time.monotonic() - begin < 20


def test_an_object_store_that_never_answers_is_given_up(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowsentry.serving.store.LONGEST_SECONDS", 0.5)
    store = open_store("s3://bucket/prefix")
    bucket.is_silent = True
    for use in (lambda: store.read(NAME), lambda: store.write(NAME, b"x"), lambda: store.delete(NAME)):
        begin = time.monotonic()
        with pytest.raises(StoreError, match="TimeoutError"):
            use()
        assert time.monotonic() - begin < 3
    bucket.is_silent = False
    store.write(NAME, b"x")
    assert store.read(NAME) == b"x"


def test_others_on_the_machine_cannot_read_a_checkpoint(tmp_path: Path) -> None:
    open_store(tmp_path / "state").write(NAME, b"x")
    assert (tmp_path / "state" / NAME).stat().st_mode & 0o077 == 0
    assert (tmp_path / "state" / NAME).parent.stat().st_mode & 0o077 == 0


def test_a_folder_that_is_a_file_is_a_store_that_fails(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a folder")
    store = open_store(tmp_path / "state")
    with pytest.raises(StoreError, match="cannot write"):
        store.write(NAME, b"x")
    with pytest.raises(StoreError, match="cannot read"):
        store.read(NAME)


def test_the_old_content_survives_a_full_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(NAME, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StoreError, match="cannot write"):
            store.write(NAME, bytes(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.read(NAME) == b"old"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["default.state"]


WRITER = """
import itertools, sys
from flowsentry.serving.store import open_store
store = open_store(sys.argv[1])
for number in itertools.count():
    store.write(sys.argv[2], bytes([number % 251]) * 4_000_000)
    print(number, flush=True)
"""


def test_a_reader_sees_one_whole_content_whenever_the_writer_is_killed(tmp_path: Path) -> None:
    draw = random.Random(0)
    store = open_store(tmp_path)
    for _ in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), NAME], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(3):
            writer.stdout.readline()
        time.sleep(draw.uniform(0, 0.02))
        writer.kill()
        reported = [int(line) for line in writer.stdout]
        writer.wait()
        writer.stdout.close()
        content = store.read(NAME)
        assert content is not None and len(content) == 4_000_000 and len(set(content)) == 1
        assert content[0] >= max([2, *reported])  # what was reported is on the disk


def test_what_a_killed_writer_left_is_removed_after_an_hour(tmp_path: Path) -> None:
    old, fresh = tmp_path / "behaviour-1" / ".a.state.00.part", tmp_path / "behaviour-1" / ".a.state.11.part"
    old.parent.mkdir()
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    open_store(tmp_path)
    assert not old.exists()
    assert fresh.exists()
