"""One process of a training run, for the tests that kill it.

Run with ``runpy.run_path`` in a fresh process (``train_world.Child``), which hands in ``arguments``
of ``python -m trainer``, ``environment`` and ``log``, a file for everything it prints.
"""

from __future__ import annotations

import multiprocessing
import os
import sys

arguments: list[str] = globals()["arguments"]
environment: dict[str, str] = globals()["environment"]
log: str = globals()["log"]

if __name__ == "__main__":
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    if "fork" in multiprocessing.get_all_start_methods():
        # As in a process of its own; this one was started by a fork server, whose data workers
        # would each import everything anew.
        multiprocessing.set_start_method("fork", force=True)
    import torch

    torch.set_num_threads(1)
    from trainer.__main__ import main

    sys.exit(main(arguments))
