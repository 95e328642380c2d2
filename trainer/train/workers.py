"""Data workers: processes that answer no signal themselves, and that never outlive their loader."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from infinite_id_core.errors import FileError

from ..errors import WorkerDiedError

_PATIENCE = 3.0  # seconds for a worker to end what it is reading
_ERROR = "error"


@contextmanager
def batches(loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
    """What a ``DataLoader`` gives, in order. However this is left, its workers are gone then.

    Workers ignore SIGTERM, and the interpreter waits for its children: one that was left over
    would keep a failed run alive for ever. A ``FileError`` that a worker met is raised here.
    Raises ``WorkerDiedError`` where the system ended one.
    """
    before = set(multiprocessing.active_children())
    iterator: Any = iter(())
    try:
        iterator = iter(loader)
        yield _sound(iterator)
    except RuntimeError as error:  # torch raises it wherever this thread is just then
        if "DataLoader worker" not in str(error):
            raise
        raise _died(error) from error
    finally:
        _end(iterator, before)


def leave_signals(_worker: int) -> None:
    """SIGTERM and Ctrl-C reach the whole process group; only the main process answers them."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def refused(error: FileError) -> dict[str, Any]:
    """What a dataset gives in place of a sample it cannot read.

    Raised in the worker, the error's type would not survive the way out of it.
    """
    return {_ERROR: error}


def is_refused(sample: Any) -> bool:
    """Whether a sample or batch is one of ``refused``."""
    return _ERROR in sample


def _sound(iterator: Iterator[Any]) -> Iterator[Any]:
    for batch in iterator:
        if is_refused(batch):
            raise batch[_ERROR]
        yield batch


def _died(error: RuntimeError) -> WorkerDiedError:
    told = str(error).splitlines()[0]
    if "Bus error" in told or "shared memory" in told:
        advice = (
            "The shared memory (/dev/shm) is too small: give it more (docker run --shm-size 8g), "
            "or set fewer data.workers, or 0"
        )
    else:
        advice = (
            "The system ends processes where the memory is full: close other programs, or set "
            "fewer data.workers, or a smaller optimiser.batch"
        )
    return WorkerDiedError(
        f"A process that reads samples is gone ({told}). {advice}. The same command goes on from "
        "the last checkpoint."
    )


def _end(iterator: Any, before: set[Any]) -> None:
    children = set(multiprocessing.active_children()) - before
    if not children:
        return
    killer = threading.Timer(_PATIENCE, _kill, [children])
    killer.daemon = True
    killer.start()
    try:
        # torch raises in this thread where a worker dies of a signal, of ours too.
        with contextlib.suppress(RuntimeError):
            getattr(iterator, "_shutdown_workers", _nothing)()
    finally:
        killer.cancel()
        _kill(children)


def _kill(children: Iterable[Any]) -> None:
    for child in children:
        if child.is_alive():
            child.kill()


def _nothing() -> None:
    pass
