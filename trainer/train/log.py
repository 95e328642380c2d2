"""What a run tells of itself: a progress bar, and what its trackers are given."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infinite_id_core.sdxl.schedule import TIMESTEPS

from ..config import TrainConfig
from .bands import band_name
from .scalars import FILE, ScalarFile
from .trackers import Trackers

logger = logging.getLogger("trainer")


def bar(label: str, things: Iterable[Any], count: int) -> Iterable[Any]:
    """``things`` with a progress bar on the main process's terminal."""
    shown: Iterable[Any] = tqdm(things, total=count, desc=label, dynamic_ncols=True)
    return shown


def no_bar(label: str, things: Iterable[Any], count: int) -> Iterable[Any]:
    """``things`` as they are: for the other processes."""
    return things


class RunLog:
    """Means over windows of steps. Only the main process has one that does anything."""

    def __init__(self, config: TrainConfig, first_step: int, *, main: bool) -> None:
        """Raises ``MissingPackageError``, ``TrackerError``."""
        self.config = config
        self.main = main
        self.late = float("nan")  # the last entry's mean loss
        self.file = ScalarFile(Path(config.run.output) / FILE, first_step) if main else None
        self.trackers = Trackers(config, first_step) if main else None
        self.bar = tqdm(
            total=config.run.steps, initial=first_step, desc="train", dynamic_ncols=True,
            disable=not main,
        )  # fmt: skip
        self._clear()

    def _clear(self) -> None:
        bands = self.config.log.bands
        self.sums, self.counts = torch.zeros(bands), torch.zeros(bands)
        self.norms: list[float] = []
        self.started = time.monotonic()

    def step(self, step: int, losses: Tensor, timesteps: Tensor, norm: float, rate: float) -> None:
        """One finished step (counted from 1): plain losses ``[G]`` at timesteps ``[G]``."""
        if not self.main:
            return
        bands = self.config.log.bands
        which = (timesteps.long() * bands // TIMESTEPS).cpu()
        self.sums.index_add_(0, which, losses.cpu())
        self.counts.index_add_(0, which, torch.ones_like(losses.cpu()))
        self.norms.append(norm)
        self.bar.update(1)
        if step % self.config.log.every == 0 or step == self.config.run.steps:
            self._write(step, rate)

    def _write(self, step: int, rate: float) -> None:
        seconds = time.monotonic() - self.started
        mean = self.late = float(self.sums.sum() / self.counts.sum())
        images = float(self.counts.sum()) / max(seconds, 1e-9)
        self.bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{images:.1f}", refresh=False)
        values = {
            "loss/all": mean,
            "gradient_norm": sum(self.norms) / len(self.norms),
            "images_per_second": images,
            "rate": rate,
        }
        for band in range(self.config.log.bands):
            if self.counts[band]:
                name = f"loss/{band_name(band, self.config.log.bands)}"
                values[name] = float(self.sums[band] / self.counts[band])
        self.scalars(step, values)
        self._clear()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time that is not the steps': saving, validation, previews."""
        before = time.monotonic()
        try:
            yield
        finally:
            self.started += time.monotonic() - before

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write some numbers of a step."""
        if self.file is not None:
            self.file.add(step, values)
        if self.trackers is not None:
            self.trackers.scalars(step, values)

    def validated(self, step: int, numbers: dict[str, float], best: bool) -> None:
        """Write an evaluation, and say it beside the training loss."""
        self.scalars(step, numbers)
        if self.main:
            bands = ", ".join(f"{value:.4f}" for value in list(numbers.values())[1:])
            logger.info(
                "Step %d: validation %.4f (by band %s), training %.4f of late%s.",
                step, numbers["validation/all"], bands, self.late,
                "; the best so far" if best else "",
            )  # fmt: skip

    def pictures(self, step: int, names: Sequence[str], pictures: Sequence[Tensor]) -> None:
        """Write pictures ``[3, H, W]`` in [0, 1] of a step."""
        if self.trackers is not None:
            named = (f"preview/{name}" for name in names)
            self.trackers.pictures(step, dict(zip(named, pictures, strict=True)))

    def close(self) -> None:
        """Write what is left and let the terminal go."""
        self.bar.close()
        if self.trackers is not None:
            self.trackers.close()
