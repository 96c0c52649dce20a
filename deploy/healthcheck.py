"""Exit 0 if the server in this container answers /health with 200: the image's HEALTHCHECK (standard library only)."""

import os
import sys
import urllib.error
import urllib.request

TIMEOUT_SECONDS = 4
"""Below the HEALTHCHECK's own limit, so that the reason gets into its log."""


def check(port: str) -> str | None:
    """None if the server on `port` of this machine is healthy, else the reason in one line."""
    # No proxy from the environment: it could not reach this container's loopback address.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"{error.code}: {error.read(500).decode(errors='replace')}"
    except OSError as error:
        return f"no answer: {error}"


if __name__ == "__main__":
    sys.exit(check(os.environ.get("QUIRE_PORT", "8000")))
