"""`Supervisor`: keeps an engine process running and reads its messages.

spawn -> loading -> ready -> gone (killed, crashed, stalled) -> spawn again
            |
         Failed: it cannot start as configured; if none ever was ready, the server ends
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from idlm.errors import InputError
from idlm.serving.config import WorkerConfig
from idlm.serving.wire import Failed, FromEngine, Ready, read

log = logging.getLogger("idlm.serving")

STALL_SECONDS = 120.0
"""A ready engine that sends nothing for this long is killed. It sends a message every second,
except within a step; the longest step, a prefill of 2048 tokens of a large model on a CPU, takes up
to a minute."""
END_SECONDS = 1.0
FIRST_DELAY, LONGEST_DELAY = 0.5, 10.0


class Supervisor:
    """Runs one engine process after the other.

    Args:
        receive: called with each message of the process.
        lost: called as soon as a process ends or is given up.
    """

    def __init__(
        self, config: WorkerConfig, receive: Callable[[FromEngine], None], lost: Callable[[], None]
    ) -> None:
        self.config = config
        self._receive, self._lost = receive, lost
        self._writer: asyncio.StreamWriter | None = None
        self._ready = self._ever_ready = False

    def send(self, framed: bytes) -> None:
        """Send frames to the process, which must be ready.

        It never waits: the quota bounds what is buffered.
        """
        if self._writer is not None:
            self._writer.write(framed)

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            InputError: the engine cannot start as configured and never did.
        """
        delay = 0.0
        while True:
            self._ready = False
            await self._life()
            delay = 0.0 if self._ready else delay
            log.warning("starting the engine again in %g s", delay)
            await asyncio.sleep(delay)
            delay = min(max(FIRST_DELAY, 2 * delay), LONGEST_DELAY)

    async def _life(self) -> None:
        """Start a process and read from it until it ends."""
        try:
            async with self._worker() as reader:
                await self._listen(reader)
        except (EOFError, ConnectionError):
            log.error("the engine's process has ended")
        except TimeoutError:
            log.error(
                "the engine's process has said nothing for %g s and was killed", STALL_SECONDS
            )
        except InputError as error:
            if not self._ever_ready:
                raise
            log.error("the engine cannot start: %s", error)
        except Exception:  # after any error the server still needs an engine
            log.exception("the engine's process was given up")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                async with asyncio.timeout(STALL_SECONDS if self._ready else None):
                    messages = await read(reader)
                for message in messages:
                    self._hear(message)
        finally:
            self._lost()

    def _hear(self, message: FromEngine) -> None:
        if isinstance(message, Failed):
            raise InputError(message.reason)
        if isinstance(message, Ready):
            self._ready = self._ever_ready = True
        self._receive(message)

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[asyncio.StreamReader]:
        """A process that is ended at exit; gives the reader of its messages."""
        ours, theirs = socket.socketpair()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=2**20)
        process: Process | None = None
        try:
            with theirs:
                arguments = str(theirs.fileno()), msgspec.json.encode(self.config).decode()
                command = sys.executable, "-m", "idlm.serving.worker", *arguments
                process = await asyncio.create_subprocess_exec(
                    *command, pass_fds=[theirs.fileno()], stdin=DEVNULL
                )
            yield reader
        finally:
            self._writer.close()
            if process is not None:
                await _end(process)


async def _end(process: Process) -> None:
    """Wait for a process that ends because its socket is closed; kill it after `END_SECONDS`."""
    try:
        async with asyncio.timeout(END_SECONDS):
            status = await process.wait()
    except TimeoutError:
        process.kill()
        status = await process.wait()
    log.info("the engine's process %d ended with status %d", process.pid, status)
