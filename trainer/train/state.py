"""Checkpoints: folders ``step-00001000`` that are whole or not there."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from infinite_id_core.errors import FileError
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.files.infinite_id_format import write_adapter
from infinite_id_core.files.system import open_regular, reading

from ..config import TrainConfig
from ..errors import ResumeError, disk_errors
from ..files import read_json
from .state_checks import check_state, check_values

STATE, CONFIG, ADAPTER, AVERAGE = "state.pt", "run.json", "adapter.safetensors", "ema.safetensors"
_NAME = re.compile(r"step-(\d{8})")
_PART = ".part"

# What may differ between a run and its continuation; the rest decides the weights.
_FREE = {
    "run": {"output", "steps", "device", "dtype", "licence_note"},
    "data": {"workers", "folder", "cache"},
    "checkpoints": {"every", "keep"},
    "log": None,
    "model": {"unet", "vae", "text_encoders"},  # their fingerprints are compared instead
    "encoder": {"clip_weights"},
    "validation": None,
    "previews": None,
}

# What may not even be changed where changes were asked for: the weights fit these alone.
_FIXED = {
    "model": None,
    "encoder": None,
    "adapter": {"face_tokens"},
    "optimiser": {"kind"},
}
_STORAGE = {("model", "unet_dtype")}  # how the same frozen weights are stored
_FIXED_FINGERPRINTS = {"unet", "vae", "clip", "text"}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is: it may only be resumed as the same."""

    config: dict[str, Any]
    """``TrainConfig.to_json``."""
    fingerprints: dict[str, str]
    """Of the dataset and the frozen models."""
    world: int | None
    """Processes; None where they are not known, and then not compared."""
    step: int = 0

    changes: tuple[dict[str, Any], ...] = ()
    """Where the run went on with other settings: ``step`` and ``changed``, a list of texts."""
    validated: dict[str, Any] | None = None
    """``Standing.to_json``; None where nothing was evaluated."""

    def following(self, other: RunRecord, path: Path, changed: bool = False) -> RunRecord:
        """This record as a continuation of ``other``, which was read from ``path``.

        Raises ``ResumeError`` where it is another run; with ``changed``, only where the weights
        would not fit.
        """
        found = _differences(other.config, self.config)
        fixed = [_words(d) for d in found if _is_fixed(*d[:2])]
        free = [_words(d) for d in found if not _is_fixed(*d[:2])]
        for name, value in self.fingerprints.items():
            before = other.fingerprints.get(name)
            if before != value:
                # Text that was not read before has no fingerprint yet.
                listed = fixed if before and name in _FIXED_FINGERPRINTS else free
                listed.append(f"the {name} has changed")
        if self.world is not None and self.world != other.world:
            free.append(f"processes: {other.world} then, {self.world} now")
        if fixed or (free and not changed):
            raise ResumeError(_refusal(path, fixed, free))
        made = ({"step": other.step, "changed": free},) if free else ()
        return replace(self, changes=(*other.changes, *made), validated=other.validated)

    def to_json(self) -> dict[str, Any]:
        """What is written; a run that never changed is written as before there were changes."""
        values = dict(vars(self))
        return {k: v for k, v in values.items() if v or k not in ("changes", "validated")}


def _refusal(path: Path, fixed: list[str], free: list[str]) -> str:
    anew = "start anew in another run.output (adapter.start_from takes over the weights)"
    if fixed:
        return (
            f"{path} belongs to a run with other settings. {'; '.join([*fixed, *free])}. The "
            "weights and the optimiser's state need what they were made with "
            f"({'; '.join(fixed)}): set it back to go on, or {anew}."
        )
    return (
        f"{path} belongs to a run with other settings. {'; '.join(free)}. Set them back to go on, "
        f"go on with these by --resume-changed (the optimiser's state is kept), or {anew}."
    )


def _words(difference: tuple[str, str, Any, Any]) -> str:
    section, key, before, after = difference
    return f"{section}.{key}: {before!r} then, {after!r} now"


def _is_fixed(section: str, key: str) -> bool:
    keys = _FIXED.get(section, set())
    return (keys is None or key in keys) and (section, key) not in _STORAGE


def _default(section: str, key: str) -> Any:
    """What a run had from before the key existed: a new option's default changes nothing."""
    return next(f.default for f in fields(get_type_hints(TrainConfig)[section]) if f.name == key)


def _differences(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str, Any, Any]]:
    found = []
    for section, values in after.items():
        free = _FREE.get(section, set())
        if free is None:
            continue
        for key, value in values.items():
            old = before.get(section, {}).get(key, _default(section, key))
            if key not in free and old != value:
                found.append((section, key, old, value))
    # A cosine's shape depends on its end.
    steps = before.get("run", {}).get("steps"), after["run"]["steps"]
    if after["optimiser"]["schedule"] == "cosine" and steps[0] != steps[1]:
        found.append(("run", "steps", *steps))
    return found


_SETTINGS = ("lr", "betas", "eps", "weight_decay")  # of an optimiser; its state is all the rest


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that changes while training."""

    adapter: Any
    """The learning ``Adapter``."""
    optimiser: Any
    average: Any | None
    """The averaged ``Adapter``."""
    scaler: Any | None
    """fp16's loss scale."""

    def load(self, folder: Path, device: torch.device, changed: bool = False) -> None:
        """Take everything from a checkpoint. Raises ``ResumeError``.

        ``changed``: of a run with other settings, which hold on.
        """
        settings = [{k: g[k] for k in _SETTINGS if k in g} for g in self.optimiser.param_groups]
        values = read_state(folder)
        try:
            self.adapter.load_state_dict(read_adapter(folder / ADAPTER).state_dict())
            if self.average is not None:
                begins = changed and not (folder / AVERAGE).exists()
                name = ADAPTER if begins else AVERAGE
                self.average.load_state_dict(read_adapter(folder / name).state_dict())
            groups = [dict(group) for group in self.optimiser.param_groups]
            self.optimiser.load_state_dict(values["optimiser"])
            check_state(self.optimiser, groups, read_record(folder).step > 0)
        except (
            RuntimeError, ValueError, KeyError, TypeError, AttributeError, FileError,
        ) as error:  # fmt: skip
            raise _damaged(folder, error) from error
        if changed:
            for group, entries in zip(self.optimiser.param_groups, settings, strict=True):
                group.update(entries)
        if self.scaler is not None and values["scaler"] is not None:
            self.scaler.load_state_dict(values["scaler"])


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``optimiser`` and ``scaler``, their tensors still on the disk.

    Raises ``ResumeError``.
    """
    path = folder / STATE
    try:
        with reading(path), open_regular(path):
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(values, dict) or not values.keys() >= {"optimiser", "scaler"}:
            raise ValueError(f"{STATE} holds no state of an optimiser")
        check_values(values["optimiser"])
    except (
        FileError, EOFError, RuntimeError, pickle.UnpicklingError, ValueError, KeyError, TypeError,
    ) as error:  # fmt: skip
        raise _damaged(folder, error) from error
    return values


def _damaged(folder: Path, error: Exception) -> ResumeError:
    told = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ResumeError(
        f"{folder}: the checkpoint is damaged ({told}). Delete the folder to go on from the one "
        "before."
    )


def save(folder: Path, record: RunRecord, snapshot: Snapshot) -> Path:
    """Write ``folder/step-...`` in one step and return it. Raises ``DiskFullError``."""
    final = folder / checkpoint_name(record.step)
    part = folder / f".{final.name}{_PART}"
    shutil.rmtree(part, ignore_errors=True)
    try:
        with disk_errors(part):
            part.mkdir(parents=True)
            write_adapter(part / ADAPTER, snapshot.adapter)
            if snapshot.average is not None:
                write_adapter(part / AVERAGE, snapshot.average)
            values = {
                "optimiser": _on_cpu(snapshot.optimiser.state_dict()),
                "scaler": snapshot.scaler.state_dict() if snapshot.scaler is not None else None,
            }
            with (part / STATE).open("wb") as file:
                torch.save(values, file)
                _sync(file.fileno())
            with (part / CONFIG).open("w", encoding="utf-8") as text:
                json.dump(record.to_json(), text, indent=1, sort_keys=True)
                text.flush()
                _sync(text.fileno())
            if final.exists():  # the same step again, after a resume from an older one
                shutil.rmtree(final)
            os.replace(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return final


def _sync(handle: int) -> None:
    os.fsync(handle)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value


def keep_last(folder: Path, count: int, best: int | None = None) -> None:
    """Delete all but the newest ``count`` checkpoints, and what killed runs left half-written.

    The checkpoint of step ``best`` stays as well.
    """
    for path in checkpoints(folder)[:-count]:
        if best is not None and path.name == checkpoint_name(best):
            continue
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".step-*{_PART}"):
        shutil.rmtree(path, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def last_checkpoint(folder: Path) -> str:
    """For messages: which checkpoint there is to go on from."""
    found = checkpoints(folder)
    return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def read_record(path: Path) -> RunRecord:
    """What a checkpoint is of. Raises ``ResumeError``."""
    try:
        values = read_json(path / CONFIG)
        if not isinstance(values, dict):
            raise TypeError(f"{CONFIG} is no object")
        record = RunRecord(**{**values, "changes": tuple(values.get("changes", ()))})
        _check_record(record)
        return record
    except (FileError, ValueError, TypeError) as error:
        raise ResumeError(
            f"{path}: is no checkpoint of this trainer ({error}). Expected a folder step-... with "
            f"{CONFIG}, {STATE} and {ADAPTER}."
        ) from error


def _check_record(record: RunRecord) -> None:
    """Raise ``TypeError`` for what this trainer never writes."""
    step, world = record.step, record.world
    sections = record.config.values() if isinstance(record.config, dict) else [None]
    kept = record.fingerprints
    sound = {
        "config": all(isinstance(section, dict) for section in sections),
        "fingerprints": isinstance(kept, dict) and all(isinstance(v, str) for v in kept.values()),
        "world": world is None or (type(world) is int and world > 0),
        "step": type(step) is int and step >= 0,
        "changes": all(
            isinstance(change, dict)
            and isinstance(change.get("changed"), list)
            and all(isinstance(text, str) for text in change["changed"])
            for change in record.changes
        ),
        "validated": record.validated is None or isinstance(record.validated, dict),
    }
    wrong = [name for name, good in sound.items() if not good]
    if wrong:
        found = repr(getattr(record, wrong[0]))[:100]
        raise TypeError(f"{wrong[0]} of {CONFIG} is damaged: {found}")


def find_checkpoint(config: TrainConfig, resume: str) -> Path | None:
    """The checkpoint to start from: ``auto`` the newest if any, ``none``, or a path.

    Raises ``ResumeError`` for a path without one, and for ``none`` where the output folder has
    checkpoints that a new run would mix with.
    """
    folder = checkpoint_folder(config)
    found = checkpoints(folder)
    if resume == "auto":
        return found[-1] if found else None
    if resume == "none":
        if found:
            raise ResumeError(
                f"{folder} holds {len(found)} checkpoints of another run. Choose another "
                "run.output, or delete them, or resume with --resume auto."
            )
        return None
    read_record(Path(resume))
    return Path(resume)


def checkpoint_folder(config: TrainConfig) -> Path:
    """Where a run's checkpoints lie."""
    return Path(config.run.output) / "checkpoints"
