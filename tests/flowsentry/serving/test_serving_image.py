"""The serving image at work: what it fetches, and that its answers are the offline ones."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flowsentry.learning.candidates import Recipe, train
from flowsentry.learning.families import FAMILIES
from flowsentry.serving import bundle as bundles
from flowsentry.serving.client import Client, StreamClient
from flowsentry.serving.protocol import ARROW
from stacks import site
from tests.flowsentry.serving.local_service import offline, told
from tests.stacks.test_images import make_images

if TYPE_CHECKING:
    from tests.conftest import Cluster
    from tests.flowsentry.conftest import Small


@pytest.mark.cluster
@pytest.mark.slow
def test_verdicts_of_the_serving_image_are_the_offline_ones(
    cluster: Cluster, small: Small, recipe: Recipe, tmp_path: Path
) -> None:
    """The image's machine code is for another processor than this machine's."""
    make_images(cluster)
    detector = train(FAMILIES["effects"], small.views["behaviour"], small.flows, small.splits, recipe).detector
    bundle = bundles.build(detector, "3", tmp_path / "bundle")
    (tmp_path / "store").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    bundles.pack(bundle, tmp_path / "store" / "b.tar.gz")
    reports = small.reports.head(20_000)
    script = (
        f"set -e; python -m flowsentry.serving.fetch /store/b.tar.gz {bundle.digest} /bundle/served; "
        "exec python /opt/flowsentry/serve.py /bundle/served"
    )
    name = docker(
        *("run", "--detach", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
        *("--tmpfs", "/tmp", "--tmpfs", "/bundle:uid=1000", "--publish", "127.0.0.1::3000"),
        *("--volume", f"{tmp_path / 'store'}:/store:ro", "--env", "FLOWSENTRY_SERVICE_STATE=/tmp/state"),
        *("--env", "NUMBA_DEBUG_CACHE=1"),
        *(f"{cluster.registry}/flowsentry-serving:{site.image_tag()}", "sh", "-c", script),
    )
    try:
        address = docker("port", name, "3000/tcp").splitlines()[0]
        with Client(f"http://{address}") as client:
            deadline = time.monotonic() + 120
            while not client.ready():
                assert time.monotonic() < deadline, docker("logs", name)
                time.sleep(0.2)
            assert client.model()["digest"] == bundle.digest
            stream = StreamClient(client, "a", media_type=ARROW)
            rows = [row for at in range(0, len(reports), 5000) for row in stream.send(reports[at : at + 5000]).rows()]
        assert docker("exec", name, "id", "-u") == "1000"
        # the window kernel takes seconds to compile: it was found
        assert "kernel._advance" in (log := docker("logs", name))
        assert "data saved" not in "".join(line for line in log.splitlines() if "kernel." in line)
        docker("stop", name)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", name) == "0"
    finally:
        docker("rm", "--force", name)
    assert [told(row) for row in rows] == offline(detector, reports)


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr if arguments[0] == "logs" else done.stdout).strip()
