"""A program in front of the server, which ends with the script."""

import atexit
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def front(command: list[str], ready: str, seconds: float = 300.0) -> int:
    """Start a program of this environment with `--port`; its port, once `ready` answers 200."""
    port = free_port()
    program = str(Path(sys.executable).with_name(command[0]))
    process = subprocess.Popen(
        [program, *command[1:], "--port", str(port)], stdout=sys.stderr, stderr=sys.stderr
    )
    atexit.register(process.wait)
    atexit.register(process.terminate)
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=10):
                return port
        except OSError:
            time.sleep(0.5)
    raise SystemExit(f"{command[0]} does not answer at {ready}")
