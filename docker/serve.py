"""`python serve.py FOLDER [PORT]`: answer at every address of the pod with a bundle, in this process.

The same worker as `bentoml serve` starts, without BentoML's process manager around it: the pod is the process, and
Kubernetes is the manager.
"""

import os
import runpy
import socket
import sys
import tempfile
from pathlib import Path

GRACE_SECONDS = 10


def main(folder: str, port: str = "3000") -> None:
    """Serve until SIGTERM; then requests under way are answered, and streams stored."""
    os.environ.setdefault("BENTOML_HOME", tempfile.mkdtemp(prefix="bentoml-"))
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="metrics-"))
    # our own package lies beside this file for `fetch`; the bundle brings the one that was tested
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != here]
    os.chdir(folder)
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", int(port)), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        listener = socket.create_server(("", int(port)))
    sys.argv = [
        *("serve", folder, "--fd", str(listener.fileno()), "--worker-id", "1"),
        *("--timeout-keep-alive", "75", "--timeout-graceful-shutdown", str(GRACE_SECONDS)),
    ]
    runpy.run_module("_bentoml_impl.worker.service", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
