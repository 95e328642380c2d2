"""Several processes of one run: when one fails, all end within seconds.

A process that waits in a collective operation for one that is gone cannot be told so by a signal:
Python answers signals between two of its own steps. A thread watches instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from typing import Any

_KEY = "infinite-id/failed"
_EVERY = 0.5  # seconds between two looks
_GRACE = 4.0  # seconds for a process to end with words of its own


class Fellows:
    """Tells the other processes that this one failed, and ends this one when another did."""

    def __init__(self, rank: int) -> None:
        from torch.distributed import distributed_c10d

        self._store: Any = distributed_c10d._get_default_store()
        self._rank = rank
        self._done = threading.Event()
        self._own = False
        threading.Thread(target=self._watch, name="fellows", daemon=True).start()

    def close(self) -> None:
        """This process has finished; nothing is watched any more."""
        self._done.set()

    def failed(self, error: BaseException) -> None:
        """This process ends with ``error``; it goes even where its libraries wait for others."""
        self._own = True
        try:
            if not self._store.check([_KEY]):
                words = f"{type(error).__name__}: {error}".strip()
                self._store.set(_KEY, f"Process {self._rank} failed with {words[:2000]}")
        except RuntimeError:  # the store is gone with the process that held it
            pass

    def _watch(self) -> None:
        while (found := self._look()) is None:
            if self._done.wait(_EVERY):
                return
        if self._done.wait(_GRACE):
            return
        if not self._own:
            sys.stderr.write(f"RankLostError: {found}. This one ends too.\n")
        sys.stderr.flush()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(1)

    def _look(self) -> str | None:
        try:
            return self._store.get(_KEY).decode() if self._store.check([_KEY]) else None
        except RuntimeError as error:
            return f"The process that holds the run together is gone ({str(error).splitlines()[0]})"
