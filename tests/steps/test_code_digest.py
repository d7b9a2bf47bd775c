from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steps import code_digest


@pytest.fixture
def digest_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    for folder in ("flowsentry", "materializers", "requirements", "steps", "tests"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "code.py").write_text("a = 1\n")
    (tmp_path / "flowsentry" / "page.html.j2").write_text("<p>")
    monkeypatch.setattr(code_digest, "ROOT", tmp_path)

    def computed() -> str:
        code_digest.code_digest.cache_clear()
        return code_digest.code_digest()

    yield computed
    code_digest.code_digest.cache_clear()


@pytest.mark.parametrize(
    "file", ["flowsentry/code.py", "materializers/code.py", "steps/code.py", "flowsentry/page.html.j2"]
)
def test_a_change_in_what_steps_call_changes_it(digest_of: Callable[[], str], tmp_path: Path, file: str) -> None:
    before = digest_of()
    (tmp_path / file).write_text("a = 2\n")
    assert digest_of() != before
    assert len(before) == 64


def test_a_file_more_or_with_another_name_changes_it(digest_of: Callable[[], str], tmp_path: Path) -> None:
    digests = {digest_of()}
    (tmp_path / "steps" / "more.py").touch()
    digests.add(digest_of())
    (tmp_path / "steps" / "more.py").rename(tmp_path / "steps" / "other.py")
    digests.add(digest_of())
    assert len(digests) == 3


def test_other_locked_requirements_or_another_python_change_it(
    digest_of: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = {digest_of()}
    for lock in ("runtime.txt", "serving.txt"):  # the second goes into every bundle
        for content in ("pandas==2.3.0", "pandas==2.3.1"):
            (tmp_path / "requirements" / lock).write_text(content)
            digests.add(digest_of())
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    digests.add(digest_of())
    assert len(digests) == 6


@pytest.mark.parametrize("file", ["tests/code.py", "README.md", "flowsentry/__pycache__/code.cpython-311.pyc"])
def test_what_steps_do_not_call_does_not_matter(digest_of: Callable[[], str], tmp_path: Path, file: str) -> None:
    before = digest_of()
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("changed")
    assert digest_of() == before
