"""``python -m trainer`` with a fault: on rank RANK, the loss of step 3 raises.

Run as ``failing_train.py RANK KIND MARK ARGUMENT ...``, by itself or under torchrun. When the
fault comes, the time is written to the file MARK. KIND: ``plain``, an exception that is none of
ours, ``memory``, the accelerator's own "out of memory", or ``killed``: its readers are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FAULTY_STEP = 3


def main() -> int:
    """See the module."""
    rank, kind, mark, *arguments = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    from trainer.__main__ import main as trainer
    from trainer.train.objective import DenoisingLoss

    losses, calls = DenoisingLoss.losses, [0]

    def losses_or_fault(self: DenoisingLoss, *inputs: Any) -> Any:
        calls[0] += 1
        if calls[0] == FAULTY_STEP and int(os.environ.get("RANK", "0")) == int(rank):
            Path(mark).write_text(str(time.time()), encoding="utf-8")
            if kind == "killed":
                for reader in multiprocessing.active_children():
                    os.kill(reader.pid or 0, signal.SIGKILL)
                return losses(self, *inputs)
            if kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            raise ZeroDivisionError("a fault of the test")
        return losses(self, *inputs)

    DenoisingLoss.losses = losses_or_fault  # type: ignore[method-assign]
    return trainer(arguments)


if __name__ == "__main__":
    sys.exit(main())
