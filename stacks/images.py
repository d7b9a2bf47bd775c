"""`make images`: build the two images of docker/Dockerfile and push them to the site's registry.

Their tag is a digest of all that they are made from (`site.image_tag`), so what the registry has is not built again. A
tag that the site names says nothing of what is behind it, so such images are always built; the engine's cache helps.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final, cast

import flowsentry
from flowsentry.errors import FlowSentryError, StackError
from stacks import site

TARGETS: Final = ("serving", "pipeline")
"""In the order of the Dockerfile: the second finds the layers of the first."""
_LINES: Final = 25
"""Of the engine's output when it fails."""


def main() -> int:
    """Build and push what is missing; prints names, sizes and times."""
    try:
        here = site.load()
        names = {"serving": here.serving_image, "pipeline": here.pipeline_image}
        is_named = here.tag != site.image_tag()
        for target in TARGETS:
            ensure(target, names[target], again=is_named)
    except FlowSentryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def ensure(target: str, name: str, *, again: bool = False) -> bool:
    """Have an image in its registry.

    Args:
        target: of the Dockerfile.
        name: registry, repository and tag.
        again: build it even if the registry has one of this name.

    Returns:
        Whether it was built.

    Raises:
        StackError: there is no container engine, or it could not build or push.
    """
    if shutil.which("docker") is None:
        raise StackError("images are built by docker, which is not installed here; run make images where it is")
    if not again and (manifest := _manifest(name)) is not None:
        print(f"{name} is in the registry ({_compressed(manifest)})", flush=True)
        return False
    print(f"{name}: building (some minutes at first) ...", flush=True)
    begin = time.monotonic()
    _docker(
        *("build", "--quiet", "--file", str(site.ROOT / "docker" / "Dockerfile"), "--target", target, "--tag", name),
        *("--build-arg", f"VERSION={flowsentry.__version__}"),
        *(("--label", f"org.opencontainers.image.revision={revision}") if (revision := _revision()) else ()),
        str(site.ROOT),
    )
    built = time.monotonic()
    _docker("push", name)
    size = int(_docker("image", "inspect", "--format", "{{.Size}}", name))
    print(
        f"{name}: built in {built - begin:.0f} s, pushed in {time.monotonic() - built:.0f} s, "
        f"{size / 1e6:.0f} MB on disk, {_compressed(_manifest(name))}",
        flush=True,
    )
    return True


def _docker(*arguments: str) -> str:
    done = _run("docker", *arguments)
    if done.returncode != 0:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-_LINES:])
        raise StackError(f"docker {arguments[0]} failed:\n{said}")
    return done.stdout.strip()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, cwd=site.ROOT)


def _manifest(name: str) -> dict[str, Any] | None:
    """What the registry says of an image, asked with the engine's credentials; None if it has none, or is silent."""
    insecure = ("--insecure",) if _is_loopback(name.partition("/")[0]) else ()
    done = _run("docker", "manifest", "inspect", *insecure, name)
    return cast(dict[str, Any], json.loads(done.stdout)) if done.returncode == 0 else None


def _is_loopback(registry: str) -> bool:
    """The engine itself speaks without TLS to these."""
    host = registry.rpartition(":")[0] or registry
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _compressed(manifest: dict[str, Any] | None) -> str:
    layers = (manifest or {}).get("layers")
    return f"{sum(layer['size'] for layer in layers) / 1e6:.0f} MB to pull" if layers else "size to pull unknown"


def _revision() -> str:
    """The commit, `-dirty` behind it if files differ; empty outside a repository."""
    if not (Path(site.ROOT) / ".git").exists():
        return ""
    done = _run("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    sys.exit(main())
