"""Where a run's numbers and pictures go: accelerate's trackers, TensorBoard's and wandb's."""

from __future__ import annotations

import os
import re
import typing
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from infinite_id_core.files.atomic import replacing
from infinite_id_core.packages import require

from ..config import Tracker, TrainConfig
from ..errors import TrackerError

RUN_ID = "wandb-run-id"
"""File in ``run.output``: which of wandb's runs a resumed run goes on with."""
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PART_OF_KEY = 80  # letters: wandb names files after a picture's key
_PACKAGES: dict[Tracker, tuple[str, str]] = {
    "tensorboard": ("torch.utils.tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
}


class Trackers:
    """All trackers of ``log.trackers``, as one."""

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        """``first_step``: steps made before; what is there of later ones is superseded.

        Raises ``MissingPackageError``, ``TrackerError``.
        """
        check_packages(config)
        chosen = dict.fromkeys(config.log.trackers)  # each once
        self.trackers = [_START[name](config, first_step) for name in chosen]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write some numbers of a step."""
        for tracker in self.trackers:
            tracker.log(dict(values), step)

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Write pictures ``[3, H, W]`` in [0, 1] of a step, by name."""
        for tracker in self.trackers:
            shaped = _SHAPED[tracker.name]
            tracker.log_images(dict(shaped(*entry) for entry in pictures.items()), step)
            if tracker.name == "tensorboard":
                tracker.tracker.flush()

    def close(self) -> None:
        """Write what is left."""
        for tracker in self.trackers:
            tracker.finish()


def check_trackers(config: TrainConfig) -> None:
    """Whether all trackers could start. Raises ``MissingPackageError``, ``TrackerError``.

    On a terminal wandb asks for its key here, before anything long has begun.
    """
    check_packages(config)
    if "wandb" in config.log.trackers and os.environ.get("RANK", "0") == "0":
        with _wandb_errors() as wandb:
            wandb.login()


def check_packages(config: TrainConfig) -> None:
    """Raises ``MissingPackageError``."""
    for name in config.log.trackers:
        module, package = _PACKAGES[name]
        require(module, f"to log (or leave {name!r} out of log.trackers)", package)


# --- TensorBoard -----------------------------------------------------------------------------


def _start_tensorboard(config: TrainConfig, first_step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # Steps from this one on are superseded; the last one made is not made again.
    tracker: Any = TensorBoardTracker("logs", config.run.output, purge_step=first_step + 1)
    tracker.start()
    return tracker


def _batch_of_one(name: str, picture: Tensor) -> tuple[str, Tensor]:
    return name, picture[None]  # CHW -> NCHW


# --- wandb -----------------------------------------------------------------------------------


def _start_wandb(config: TrainConfig, first_step: int) -> Any:
    """The run that ``run.output`` belongs to; steps it has already are not sent again."""
    from accelerate.tracking import WandBTracker

    output = Path(config.run.output)
    with _wandb_errors():
        tracker: Any = WandBTracker(
            config.log.project, id=run_id(output), name=output.name, resume="allow", dir=str(output)
        )
        tracker.start()
        tracker.store_init_configuration(settings(config))
    return tracker


@contextmanager
def _wandb_errors() -> Iterator[ModuleType]:
    wandb = require("wandb", "to log (or leave 'wandb' out of log.trackers)", "wandb")
    try:
        yield wandb
    except wandb.Error as error:
        raise TrackerError(
            f"wandb could not start ({error}). Log in with `wandb login`, set WANDB_MODE=offline "
            "to keep everything on this machine, or leave 'wandb' out of log.trackers."
        ) from error


def run_id(output: Path) -> str:
    """Of wandb's run for an output folder; a new one is written there. Raises ``TrackerError``."""
    path = output / RUN_ID
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    found = path.read_text(encoding="utf-8", errors="replace").strip()
    if not _ID.fullmatch(found):
        raise TrackerError(
            f"{path}: expected the id of a run of wandb, up to 64 letters and digits; found "
            f"{found[:40]!r}. Write the run's id there, or delete the file to begin a new one."
        )
    return found


def settings(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """What a tracker is told of a run: every choice and number, no text (paths and notes)."""
    sections: dict[str, type[Any]] = typing.get_type_hints(TrainConfig)
    told: dict[str, dict[str, Any]] = {}
    for section, values in config.to_json().items():
        types = typing.get_type_hints(sections[section])
        told[section] = {key: v for key, v in values.items() if types[key] is not str}
    return told


def _for_wandb(name: str, picture: Tensor) -> tuple[str, list[Any]]:
    pixels = (picture.clamp(0.0, 1.0) * 255.0).round().byte().permute(1, 2, 0)  # CHW -> HWC
    parts = (re.sub(r"[^\w ,()-]", "_", part)[:_PART_OF_KEY] for part in name.split("/"))
    return "/".join(parts), [pixels.cpu().numpy()]


_START: dict[Tracker, Callable[[TrainConfig, int], Any]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
}
_SHAPED: dict[Tracker, Callable[[str, Tensor], tuple[str, Any]]] = {
    "tensorboard": _batch_of_one,
    "wandb": _for_wandb,
}
