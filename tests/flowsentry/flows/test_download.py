"""Downloading the published files, against a real server on this machine."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flowsentry.__main__ import main
from flowsentry.errors import DownloadError
from flowsentry.flows import download as module
from flowsentry.flows.download import ARTICLE, download

CONTENT = bytes(range(256)) * 400
NAME = "elastic_february2022_data.csv"


class Repository(ThreadingHTTPServer):
    """A repository with one file; its habits can be changed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.ranges = True
        self.break_after: int | None = None
        self.asked: list[str | None] = []
        self.entry: dict[str, Any] = {
            "name": NAME,
            "size": len(CONTENT),
            "download_url": f"{self.url}/file",
            "computed_md5": hashlib.md5(CONTENT).hexdigest(),
            "is_link_only": False,
        }


class Handler(BaseHTTPRequestHandler):
    server: Repository

    def do_GET(self) -> None:
        if self.path.startswith(f"/v2/articles/{ARTICLE}/files"):
            self.answer(200, json.dumps([self.server.entry]).encode())
        elif self.path == "/file":
            asked = self.headers.get("Range")
            self.server.asked.append(asked)
            if asked and self.server.ranges:
                begin = int(asked.removeprefix("bytes=").removesuffix("-"))
                self.answer(206, CONTENT[begin:], f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
            else:
                self.answer(200, CONTENT)
        else:
            self.send_error(404)

    def answer(self, status: int, body: bytes, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        broken = self.server.break_after if self.path == "/file" else None
        self.wfile.write(body[:broken])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    server = Repository()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_is_fetched_checked_and_renamed(repository: Repository, tmp_path: Path) -> None:
    told: list[str] = []
    paths = download(tmp_path / "new", [NAME], base_url=repository.url, on_progress=told.append)
    assert paths == [tmp_path / "new" / NAME]
    assert paths[0].read_bytes() == CONTENT
    assert [path.name for path in paths[0].parent.iterdir()] == [NAME]
    assert "is whole" in told[-1]
    download(tmp_path / "new", [NAME], base_url=repository.url, on_progress=told.append)
    assert told[-1] == f"{NAME} is here already"
    assert repository.asked == [None]


def test_an_interrupted_download_goes_on_where_it_stopped(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:777])
    (path,) = download(tmp_path, [NAME], base_url=repository.url)
    assert path.read_bytes() == CONTENT
    assert repository.asked == ["bytes=777-"]


def test_a_server_that_cannot_continue_sends_the_file_from_its_beginning(
    repository: Repository, tmp_path: Path
) -> None:
    repository.ranges = False
    (tmp_path / f"{NAME}.part").write_bytes(b"other" * 100)
    (path,) = download(tmp_path, [NAME], base_url=repository.url)
    assert path.read_bytes() == CONTENT


def test_a_broken_connection_is_taken_up_again(repository: Repository, tmp_path: Path) -> None:
    repository.break_after = 40_000
    (path,) = download(tmp_path, [NAME], base_url=repository.url)
    assert path.read_bytes() == CONTENT
    assert repository.asked == [None, "bytes=40000-", "bytes=80000-"]


def test_a_connection_that_keeps_breaking_leaves_the_part_for_the_next_time(
    repository: Repository, tmp_path: Path
) -> None:
    repository.break_after = 1_000
    with pytest.raises(DownloadError, match="run the command again to continue"):
        download(tmp_path, [NAME], base_url=repository.url)
    assert (tmp_path / f"{NAME}.part").read_bytes() == CONTENT[:4_000]
    repository.break_after = None
    assert download(tmp_path, [NAME], base_url=repository.url)[0].read_bytes() == CONTENT


@pytest.mark.parametrize("change", [{"computed_md5": "0" * 32}, {"size": len(CONTENT) - 1}])
def test_a_file_with_a_wrong_checksum_or_size_is_deleted(
    repository: Repository, tmp_path: Path, change: dict[str, Any]
) -> None:
    repository.entry |= change
    with pytest.raises(DownloadError, match="wrong size or checksum"):
        download(tmp_path, [NAME], base_url=repository.url)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_deleted_so_that_the_next_run_begins_anew(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(b"?" * 777)
    with pytest.raises(DownloadError, match="wrong size or checksum"):
        download(tmp_path, [NAME], base_url=repository.url)
    assert download(tmp_path, [NAME], base_url=repository.url)[0].read_bytes() == CONTENT


def test_another_file_of_that_name_is_never_overwritten(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("mine")
    with pytest.raises(DownloadError, match="in the way"):
        download(tmp_path, [NAME], base_url=repository.url)
    assert (tmp_path / NAME).read_text() == "mine"


@pytest.mark.parametrize(
    "change",
    [{"name": "../x"}, {"name": ".bashrc"}, {"download_url": "file:///etc/hostname"}, {"size": "big"}, {"name": ""}],
)
def test_a_hostile_listing_is_refused(repository: Repository, tmp_path: Path, change: dict[str, Any]) -> None:
    repository.entry |= change
    with pytest.raises(DownloadError):
        download(tmp_path, [str(repository.entry["name"])], base_url=repository.url)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_not_there_are_named(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=f"does not list march.csv; it has {NAME}"):
        download(tmp_path, ["march.csv"], base_url=repository.url)
    repository.entry["download_url"] = f"{repository.url}/gone"
    with pytest.raises(DownloadError, match="the server says 404"):
        download(tmp_path, [NAME], base_url=repository.url)
    with pytest.raises(DownloadError, match="the server says 404"):
        download(tmp_path, [NAME], base_url=f"{repository.url}/elsewhere")


def test_a_folder_that_cannot_be_made_is_an_error(repository: Repository, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be written"):
        download(tmp_path / "file" / "data", [NAME], base_url=repository.url)


def test_an_unreachable_server_is_an_error_and_exit_status(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    status = main(["download", NAME, "--to", str(tmp_path), "--url", f"http://127.0.0.1:{port}"])
    assert status == 1
    assert "cannot be fetched: [Errno" in capsys.readouterr().err
    assert main(["download", "--url", "ftp://example.org"]) == 1


def test_the_command_prints_where_the_files_are(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", NAME, "--to", str(tmp_path), "--url", repository.url]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / NAME)


def test_help_names_the_command_and_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["download", "--help"])
    assert stopped.value.code == 0
    assert "--to" in capsys.readouterr().out
