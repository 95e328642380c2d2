"""The adapter, trained by the trainer's own commands on the exported models.

What users run for their people, we run for ours: photos of drawn people, `trainer prepare` with the
embedded detector and recogniser, `trainer train` with `trainer/configs/microworld.toml`. Photos
only, as in the paper: other styles are the base's to know and the mixed attention's to keep.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from microworld import files
from microworld.people import write_people
from microworld.portraits import STYLES

PEOPLE, PHOTOS = 1600, 4
CONFIG = Path(__file__).resolve().parents[2] / "trainer" / "configs" / "microworld.toml"
DATA = "people_data"
PREPARE = ("--held-out", "0.01")
ENTANGLED = ("--set", "objective.mode=entangled")


class TrainerFailedError(RuntimeError):
    """A command of the trainer ended with an error; what it said is above."""


def prepare(folder: Path) -> Path:
    """Photos of synthetic people, detected, aligned, embedded and grouped; resumes."""
    people, data, drawn = (folder / name for name in ("people", DATA, "people.drawn"))
    if not drawn.exists():
        write_people(people, PEOPLE, PHOTOS, size=128, style=STYLES.index("photo"))
        drawn.touch()
    _trainer("prepare", str(people), str(data), "--face-models", str(files.FACE_MODELS), *PREPARE)
    return data


def fill_caches(data: Path) -> None:
    """Compute what the training of any adapter reads again and again: latents, image tokens."""
    _trainer("train", "--config", str(CONFIG), "--set", f"data.folder={data}", "--fill-caches")


def run(folder: Path, name: str, options: Sequence[str] = ()) -> Path:
    """Train one adapter, or resume it; returns its file."""
    output = folder / name
    finished = output / "adapter.safetensors"
    if not finished.exists():
        where = ("--set", f"run.output={output}", "--set", f"data.folder={folder / DATA}")
        _trainer("train", "--config", str(CONFIG), *where, *options)
    return finished


def export(folder: Path) -> Path:
    """weights/adapter.safetensors."""
    part = files.ADAPTER.with_suffix(".part")
    shutil.copyfile(folder / "adapter" / "adapter.safetensors", part)
    part.replace(files.ADAPTER)
    return files.ADAPTER


def _trainer(command: str, *arguments: str) -> None:
    from trainer.__main__ import main

    status = main([command, *arguments])
    if status:
        raise TrainerFailedError(f"python -m trainer {command} {' '.join(arguments)}: {status}")
