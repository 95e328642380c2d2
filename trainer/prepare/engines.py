"""Who runs the tasks: this machine's processes, or Ray Data. Same functions, same output."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol

from infinite_id_core.packages import require

from ..errors import EngineError
from .options import RunOptions
from .stages import Outcome, Task, run_task

_RAY = ("for --engine ray", '"ray[data]"')


class Engine(Protocol):
    """Runs tasks in any order; yields each outcome as it comes."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """Raises ``EngineError`` where a worker is lost."""
        ...


@contextmanager
def open_engine(options: RunOptions) -> Iterator[Engine]:
    """The engine of the options; its processes end with the block.

    Raises ``MissingPackageError`` for Ray without its package.
    """
    if options.engine == "ray":
        with _ray_engine(options) as ray_engine:
            yield ray_engine
    elif options.worker_count == 1:
        yield InProcess()
    else:
        # Not fork: model runtimes and their threads do not survive it.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.worker_count, context, _watch_parent) as pool:
            try:
                yield Processes(pool)
            finally:
                pool.shutdown(cancel_futures=True)


class InProcess:
    """One worker needs no process of its own."""

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """See ``Engine``."""
        return map(run_task, tasks)


class Processes:
    """A pool of processes on this machine."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """See ``Engine``."""
        try:
            pending: set[Future[Outcome]] = {self._pool.submit(run_task, task) for task in tasks}
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise EngineError(
                "A worker process ended abruptly (out of memory is the usual cause: fewer "
                "--workers need less). Finished parts are kept; run the same command again."
            ) from error


def _watch_parent() -> None:
    """End a worker whose parent was killed; it would wait for work forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


# --- Ray -------------------------------------------------------------------------------------


@contextmanager
def _ray_engine(options: RunOptions) -> Iterator[Engine]:
    # Ray's usage statistics would phone home; nothing here does unasked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", *_RAY)
    require("ray.data", *_RAY)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        address = options.ray_address or os.environ.get("RAY_ADDRESS")
        local = {} if address else {
            "num_cpus": max(2, options.worker_count), "include_dashboard": False
        }  # fmt: skip
        try:
            ray.init(address=address, logging_level="warning", log_to_driver=False, **local)
        except Exception as error:  # Ray's own are bare ones
            raise EngineError(
                f"Ray did not start ({str(error).strip() or type(error).__name__}). Check "
                "--ray-address, or take --engine local, which gives the same dataset."
            ) from error
    try:
        yield RayData(options)
    finally:
        if ours:
            ray.shutdown()


class RayData:
    """A pool of Ray actors, on one machine or many that see the same files."""

    def __init__(self, options: RunOptions) -> None:
        self._options = options

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
        """See ``Engine``."""
        if not tasks:
            return
        ray, data = require("ray", *_RAY), require("ray.data", *_RAY)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False  # ours counts photos
        items = [{"task": pickle.dumps(task)} for task in tasks]
        size = min(self._options.worker_count, len(items))
        dataset = data.from_items(items, override_num_blocks=len(items)).map_batches(
            RayWorker,
            batch_size=1,
            compute=data.ActorPoolStrategy(size=size),
            num_cpus=1,
            num_gpus=self._options.gpus_per_worker or None,
        )
        try:
            for row in dataset.iter_rows():
                yield pickle.loads(row["outcome"])
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"Ray lost a task ({str(error).strip().splitlines()[-1]}). Finished parts are "
                "kept; run the same command again."
            ) from error


class RayWorker:
    """One actor: its process keeps the models it has loaded."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the tasks of a batch: ``{"task": [pickled]}`` -> ``{"outcome": [pickled]}``."""
        return {"outcome": [pickle.dumps(run_task(pickle.loads(task))) for task in batch["task"]]}
