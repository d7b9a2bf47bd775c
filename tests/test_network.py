from __future__ import annotations

from pathlib import Path

import pytest

from tests.network import run_offline


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import urllib.request; urllib.request.urlopen('http://example.invalid')", "socket.getaddrinfo"),
        ("import socket; socket.create_connection(('192.0.2.1', 9))", "socket.getaddrinfo 192.0.2.1"),
        ("import socket; socket.socket().connect(('192.0.2.1', 9))", "socket.connect ('192.0.2.1', 9)"),
        (
            "import subprocess, sys;"
            "subprocess.run([sys.executable, '-c', 'import socket; socket.getaddrinfo(\"a.invalid\", 1)'], check=True)",
            "socket.getaddrinfo a.invalid",
        ),
    ],
)
def test_a_program_that_reaches_out_is_stopped_and_told_of(tmp_path: Path, program: str, expected: str) -> None:
    done, reached = run_offline(["-c", program], scratch=tmp_path, cwd=tmp_path, environment={}, timeout=60)
    assert done.returncode != 0
    assert reached[0].startswith(expected)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_program_that_stays_at_home_runs(tmp_path: Path, host: str) -> None:
    program = (
        f"import socket; listening = socket.create_server(('127.0.0.1', 0));"
        f"socket.create_connection(({host!r}, listening.getsockname()[1])); print(6 * 7)"
    )
    done, reached = run_offline(["-c", program], scratch=tmp_path, cwd=tmp_path, environment={}, timeout=60)
    assert (done.returncode, done.stdout, reached) == (0, "42\n", [])
