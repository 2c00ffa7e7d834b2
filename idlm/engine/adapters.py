"""`Adapters`: the adapters of an engine by name. They may come and go while it runs.

An adapter has an index, which running requests and their slots hold. A name that is removed is gone
at once; its adapter is detached when no request uses it any more.
"""

from __future__ import annotations

from collections.abc import Sequence

from idlm.engine.products import Products
from idlm.errors import InputError
from idlm.models.check import check_adapter
from idlm.models.idlm_model import Idlm
from idlm.models.more_adapters import Loaded, attach_loaded, detach_loaded

MOST = 64
"""The most adapters: each costs time in every step, also if no request uses it."""


class Adapters:
    """Args:
    names: by index; None: an index without adapter, whose requests decode AR.
    """

    def __init__(self, idlm: Idlm, names: Sequence[str | None]) -> None:
        self.idlm = idlm
        self._numbers = {name: index for index, name in enumerate(names) if name is not None}
        self._empty = {index for index, name in enumerate(names) if name is None}
        self.retired: set[int] = set()
        """The adapters without a name that are still attached."""

    def index(self, name: str | None) -> int:
        """The index of an adapter; None: the first.

        Raises:
            InputError: there is no such adapter.
        """
        if name is None:
            return 0
        if name not in self._numbers:
            names = ", ".join(self._numbers) or "(none)"
            raise InputError(f"adapter {name!r} is not loaded; use one of {names}")
        return self._numbers[name]

    def drafts(self, index: int) -> bool:
        """Whether requests of this index have something to draft with."""
        return index not in self._empty

    def add(self, name: str, loaded: Loaded, products: Products) -> None:
        """Attach an adapter. After an error nothing has changed.

        Raises:
            InputError: the name is taken, there are too many, or the model cannot run with it.
        """
        if name in self._numbers:
            raise InputError(f"adapter {name!r} is loaded already; unload it first")
        if len(self._numbers) + len(self.retired) >= MOST:
            raise InputError(f"there are {MOST} adapters, the most; unload one first")
        with products.use():
            index = attach_loaded(self.idlm, loaded)
            self.idlm.model.requires_grad_(False)  # a recording wants no gradients
            try:
                check_adapter(self.idlm, index)
            except InputError:
                detach_loaded(self.idlm, index)
                raise
        self._numbers[name] = index

    def remove(self, name: str) -> None:
        """Forget a name. Its running requests go on; `release` detaches the adapter.

        Raises:
            InputError: there is no such adapter.
        """
        index = self.index(name)
        del self._numbers[name]
        self.retired.add(index)
        if index == 0:
            self._empty.add(index)  # what names no adapter decodes AR from now on

    def release(self, index: int) -> None:
        """Detach a retired adapter that no request uses any more."""
        detach_loaded(self.idlm, index)
        self.retired.discard(index)
