"""Two ranks under torchrun: the first fails, the second waits where no signal reaches it."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch.distributed

from trainer.train.fellows import Fellows

signal.signal(signal.SIGTERM, signal.SIG_IGN)
torch.distributed.init_process_group("gloo")
rank = int(os.environ["RANK"])
fellows = Fellows(rank)
if rank == 0:
    fellows.failed(ZeroDivisionError("of the test"))
    raise ZeroDivisionError("of the test")
time.sleep(600)
