"""`python -m flowsentry download`: the published files of the AssureMOSS dataset, with checksums and resume.

The files are those of article 20463687 of 4TU.ResearchData (licence CC-BY-4.0): the listing gives size and MD5 of each
(`GET /v2/articles/<id>/files`, the Figshare API). MD5 guards against damage, not against a hostile publisher.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit

from flowsentry.errors import DownloadError

BASE_URL: Final = "https://data.4tu.nl"
ARTICLE: Final = 20463687
FILES: Final = (
    "elastic_february2022_data.csv",
    "elastic_may2022_data.csv",
    "elastic_may2021_benign_data.csv",
    "elastic_may2021_malicious_data.csv",
)

_TIMEOUT_SECONDS: Final = 60
_ATTEMPTS: Final = 4
_BLOCK: Final = 1 << 20
_PROGRESS_SECONDS: Final = 5.0
_LISTING_BYTES: Final = 1 << 22
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,199}")


@dataclass(frozen=True)
class RemoteFile:
    """A file as the article lists it."""

    name: str
    url: str
    size: int
    md5: str


def download(
    folder: Path,
    names: Sequence[str] = FILES,
    *,
    base_url: str = BASE_URL,
    on_progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Fetch published files into a folder; those that are there already and whole are left alone.

    A file is written as `<name>.part` and renamed once its size and checksum are right. What is left of an
    interrupted download is continued where it stopped, if the server allows it.

    Args:
        folder: made if it is missing.
        names: which of the article's files.
        base_url: where the repository's API is.
        on_progress: is told what happens to each file, and every few seconds how far it is.

    Returns:
        The files' paths, in the order of `names`.

    Raises:
        DownloadError: the server cannot be reached or does not have a file, a checksum is wrong, a file of that name
            with another content is in the way, or the folder cannot be written.
    """
    say = on_progress or (lambda message: None)
    listed = listing(base_url)
    missing = [name for name in names if name not in listed]
    if missing:
        raise DownloadError(f"{base_url} does not list {missing[0]}; it has {', '.join(sorted(listed)) or 'no files'}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return [_fetch(listed[name], folder, say) for name in names]
    except OSError as error:
        raise DownloadError(
            f"{folder} cannot be written: {error.strerror or error}; choose another with --to"
        ) from error


def listing(base_url: str = BASE_URL) -> dict[str, RemoteFile]:
    """The article's files by name.

    Raises:
        DownloadError: the server cannot be reached, or its answer is not a listing of files.
    """
    url = f"{base_url.rstrip('/')}/v2/articles/{ARTICLE}/files?page_size=100"
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{base_url} is no web address; give one that begins with https://")
    try:
        with _open(url) as answer:
            entries = json.loads(answer.read(_LISTING_BYTES))
        files = [
            RemoteFile(str(e["name"]), str(e["download_url"]), int(e["size"]), str(e["computed_md5"] or "").lower())
            for e in entries
            if not e.get("is_link_only")
        ]
    except (OSError, http.client.HTTPException) as error:
        raise DownloadError(f"{url} cannot be fetched: {_why(error)}; try again later") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(f"{url} does not answer with a listing of files; check the address") from error
    schemes = ("https",) if base_url.startswith("https:") else ("http", "https")
    for file in files:
        if not _PLAIN_NAME.fullmatch(file.name) or urlsplit(file.url).scheme not in schemes:
            raise DownloadError(f"{url} lists a file with an unsafe name or address: {file.name[:80]!r}")
    return {file.name: file for file in files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.add_argument(
        "names",
        nargs="*",
        default=list(FILES),
        metavar="NAME",
        help=f"files to fetch (default: all of {', '.join(FILES)}; 763 MB)",
    )
    parser.add_argument("--to", type=Path, default=Path("data"), metavar="FOLDER", help="default: %(default)s")
    parser.add_argument("--url", default=BASE_URL, help="address of the repository (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Download and say where the files are."""
    for path in download(args.to, args.names, base_url=args.url, on_progress=lambda text: print(text, flush=True)):
        print(path)


def _open(url: str, begin: int = 0) -> Any:
    headers = {"User-Agent": "flowsentry"} | ({"Range": f"bytes={begin}-"} if begin else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)


def _why(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error or type(error).__name__)


def _fetch(file: RemoteFile, folder: Path, say: Callable[[str], None]) -> Path:
    target, part = folder / file.name, folder / f"{file.name}.part"
    if target.exists():
        if not _is_whole(target, file):
            raise DownloadError(f"{target} is in the way: its content is not the published one; move it elsewhere")
        say(f"{file.name} is here already")
        return target
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            _append(file, part, say)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                raise DownloadError(f"{file.name} cannot be fetched: {_why(error)}; try again later") from error
            if attempt == _ATTEMPTS:
                raise DownloadError(
                    f"{file.name} cannot be fetched: {_why(error)}; run the command again to continue"
                ) from error
        if part.exists() and part.stat().st_size >= file.size:
            break
        if attempt == _ATTEMPTS:
            raise DownloadError(f"{file.name} ended early {_ATTEMPTS} times; run the command again to continue")
        time.sleep(min(0.2 * 2**attempt, 5.0))
    if not _is_whole(part, file):
        part.unlink()
        raise DownloadError(f"{file.name} has a wrong size or checksum and was deleted; run the command again")
    part.replace(target)
    say(f"{file.name} is whole: {file.size:,} bytes, MD5 {file.md5 or 'not published'}")
    return target


def _append(file: RemoteFile, part: Path, say: Callable[[str], None]) -> None:
    """Continue the unfinished file, or begin it if there is none or the server cannot continue."""
    have = part.stat().st_size if part.exists() else 0
    if have > file.size:
        part.unlink()
        have = 0
    if have == file.size:
        return
    with _open(file.url, have) as answer:
        continues = answer.status == http.client.PARTIAL_CONTENT
        if continues and not str(answer.headers.get("Content-Range")).startswith(f"bytes {have}-"):
            raise http.client.HTTPException("the server continues at another place")
        begin = have if continues else 0
        if begin:
            say(f"{file.name} continues at {begin:,} bytes")
        with part.open("ab" if begin else "wb") as out:
            _copy(answer, out, file, begin, say)


def _copy(answer: Any, out: IO[bytes], file: RemoteFile, begin: int, say: Callable[[str], None]) -> None:
    told = time.monotonic()
    # One byte more than published is enough to see that the file is another one.
    while begin <= file.size and (block := answer.read(min(_BLOCK, file.size + 1 - begin))):
        out.write(block)
        begin += len(block)
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            say(f"{file.name}: {begin / 1e6:,.0f} of {file.size / 1e6:,.0f} MB")
    out.flush()
    os.fsync(out.fileno())


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size:
        return False
    with path.open("rb") as content:
        digest = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return not file.md5 or digest == file.md5
