"""The processes of one training: who does what, who was asked to stop, who is gone."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from infinite_id_core.errors import InfiniteIDError
from infinite_id_core.packages import require

from ..config import TrainConfig
from ..errors import RankLostError
from ..files import locked
from . import state
from .checks import check_device
from .fellows import Fellows

Thing = TypeVar("Thing")


class Processes:
    """accelerate's view of this process among the others, and the signals they get."""

    def __init__(self, config: TrainConfig) -> None:
        accelerate = require("accelerate", "to train", "accelerate")
        check_device(config.run.device)
        # Autocast is the loop's own: the configuration alone decides, not the launcher.
        self.accelerator: Any = accelerate.Accelerator(
            mixed_precision="no", cpu=config.run.device == "cpu"
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.main = self.rank == 0
        self.stop = False
        self._folder = state.checkpoint_folder(config)
        self._before: dict[int, Any] = {}
        self._others = Fellows(self.rank) if self.world > 1 else None

    def __enter__(self) -> Processes:
        for number in (signal.SIGTERM, signal.SIGINT):
            # Signals reach only the main thread; elsewhere the caller keeps its own.
            with contextlib.suppress(ValueError):
                self._before[number] = signal.signal(number, self._ask_to_stop)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._others is not None:
            if error is None:
                self._others.close()
            else:
                self._others.failed(error)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask_to_stop(self, number: int, _frame: FrameType | None) -> None:
        """Finish the step, save, end. A second Ctrl-C ends at once."""
        if number == signal.SIGINT and self.stop:
            raise KeyboardInterrupt
        self.stop = True

    def any_stop(self) -> bool:
        """Whether any process was asked to stop; all of them call this together."""
        flag = torch.tensor([float(self.stop)], device=self.device)
        return bool(self.gather(flag).any())

    def gather(self, values: Tensor) -> Tensor:
        """``[n]`` of every process -> ``[world, n]``."""
        if self.world == 1:
            return values[None]
        gathered: Tensor = self.accelerator.gather(values[None])
        return gathered

    def gather_objects(self, things: list[Any]) -> list[Any]:
        """Lists of every process, one after another."""
        if self.world == 1:
            return things
        from accelerate.utils import gather_object

        gathered: list[Any] = gather_object(things)
        return gathered

    def from_main(self, thing: Any) -> Any:
        """The main process's ``thing`` on every process."""
        if self.world == 1:
            return thing
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([thing])[0]

    def agreed(self, do: Callable[[], Thing]) -> Thing:
        """What ``do`` gives on the main process; all get it, or the named error it raised."""
        found: Thing | InfiniteIDError | None = None
        if self.main:
            try:
                found = do()
            except InfiniteIDError as error:
                found = error
        found = self.from_main(found)
        if isinstance(found, InfiniteIDError):
            raise found
        return cast(Thing, found)

    @contextlib.contextmanager
    def alone_in(self, folder: Path) -> Iterator[None]:
        """Hold the folder for this run. Raises ``BusyError`` on every process."""
        with contextlib.ExitStack() as stack:
            self.agreed(lambda: stack.enter_context(locked(folder, "training")))
            yield

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def losses_named(self) -> Iterator[None]:
        """Another process that is gone shows as an error of the communication library: name it."""
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            names = ("gloo", "NCCL", "Connection", "Socket", "peer")
            if self.world == 1 or not any(name in text for name in names):
                raise
            raise RankLostError(
                f"Another process of this run is gone ({text.splitlines()[0]}). Start all of them "
                f"again with the same command; {state.last_checkpoint(self._folder)}."
            ) from error
