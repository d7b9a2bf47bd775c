"""`python -m flowsentry.serving.drain`: called in a pod of the service before it is stopped.

The service stores its streams and closes each connection with the next answer on it; then it goes on answering until
nobody comes any more, because the cluster needs some time to lead everybody elsewhere.
"""

from __future__ import annotations

import http.client
import os
import sys
import time
from pathlib import Path
from typing import Final

PORT: Final = 3000
SECONDS: Final = 6.0
"""That it takes."""


def drain(port: int = PORT, seconds: float = SECONDS) -> None:
    """Have the service of this pod let go of its streams and connections, then wait."""
    begin = time.monotonic()
    token = Path(os.environ["FLOWSENTRY_SERVICE_TOKEN_FILE"]).read_text(encoding="ascii").strip()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2 * seconds)
    try:
        connection.request("POST", "/v1/release", headers={"Authorization": f"Bearer {token}"})
        connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        print(f"flowsentry: not drained: {error}", file=sys.stderr)  # it is dead already, or hangs
        return
    finally:
        connection.close()
    time.sleep(max(begin + seconds - time.monotonic(), 0.0))


if __name__ == "__main__":
    drain()
