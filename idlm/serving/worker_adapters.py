"""The adapters of the engine's process, which come and go while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from idlm.engine.llm import LLM
from idlm.errors import InputError
from idlm.models.more_adapters import Loaded, read_more
from idlm.serving.wire import Changed, LoadAdapter, UnloadAdapter

log = logging.getLogger("idlm.serving")


@dataclass(frozen=True)
class AdapterRead:
    """An adapter whose files have been read, or refused with the error in `read`."""

    message: LoadAdapter
    read: Loaded | InputError


class WorkerAdapters:
    """The adapters of an engine by name and folder.

    Args:
        started: those that the engine was built with.
        put: gives the loop of the engine an adapter that a thread has read.
    """

    def __init__(
        self, llm: LLM, started: Mapping[str, str], put: Callable[[AdapterRead], None]
    ) -> None:
        self.folders = dict(started)
        self._llm, self._put = llm, put
        self._reader = ThreadPoolExecutor(1)

    def restore(self, loaded: Mapping[str, str]) -> None:
        """Load what the process before had loaded; what cannot be loaded any more is left out."""
        for name, folder in loaded.items():
            changed = self._attach(self._files(LoadAdapter("", name, folder)))
            if changed.error is not None:
                log.error("adapter %r is not loaded again: %s", name, changed.error)

    def act(self, message: LoadAdapter | UnloadAdapter | AdapterRead) -> list[Changed]:
        """Act on a message between two steps. Files are read beside the steps, and come back as an
        `AdapterRead`."""
        if isinstance(message, LoadAdapter):
            self._reader.submit(lambda: self._put(self._files(message)))
            return []
        if isinstance(message, AdapterRead):
            return [self._attach(message)]
        try:
            self._llm.engine.unload_adapter(message.name)
            self.folders.pop(message.name, None)
        except InputError as error:
            return [Changed(message.id, self.folders, str(error))]
        return [Changed(message.id, self.folders)]

    def _files(self, message: LoadAdapter) -> AdapterRead:
        try:
            return AdapterRead(message, read_more(self._llm.idlm, Path(message.folder)))
        except InputError as error:
            return AdapterRead(message, error)
        except Exception:  # the requests that run must not suffer from a file
            log.exception("an adapter could not be read")
            refused = InputError(f"adapter {message.folder!r} cannot be read; the log says why")
            return AdapterRead(message, refused)

    def _attach(self, found: AdapterRead) -> Changed:
        id, name, folder = found.message.id, found.message.name, found.message.folder
        try:
            if isinstance(found.read, InputError):
                raise found.read
            self._llm.engine.load_adapter(name, found.read)
        except InputError as error:
            return Changed(id, self.folders, str(error))
        self.folders[name] = folder
        return Changed(id, self.folders)
