"""Ask a server that runs beside this script for a path, /health or /ready; exit status 0 if it
answers 200.

    python probe.py /ready [http://127.0.0.1:8000]

The key is $IDLM_API_KEY: /ready needs one where there is one, and a Kubernetes httpGet probe cannot
hold a secret.
"""

from __future__ import annotations

import os
import sys
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

SECONDS = 4


def probe(path: str, root: str = "http://127.0.0.1:8000") -> int:
    """The exit status; a failure says why on stderr."""
    request = Request(
        root + path, headers={"Authorization": f"Bearer {os.environ.get('IDLM_API_KEY', '')}"}
    )
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS):
            return 0
    except (URLError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(probe(*sys.argv[1:]))
