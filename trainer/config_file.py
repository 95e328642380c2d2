"""The training's configuration from a TOML file and the command line.

``--set section.key=value`` overrides the file; ``value`` is TOML (a bare word is taken as text).
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

from infinite_id_core.errors import OptionError

from .config import TrainConfig
from .errors import ConfigSyntaxError, ConfigValueError, UnknownKeyError
from .toml_files import parse_toml, read_toml


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """A TOML file with ``section.key=value`` overrides.

    Relative paths in it are relative to the working directory. Raises ``FileMissingError``,
    ``UnreadableError``, ``ConfigSyntaxError``, ``UnknownKeyError`` (naming the nearest valid key),
    ``ConfigValueError``.
    """
    path = Path(path)
    values = read_toml(path)
    for override in overrides:
        _override(values, override)
    return parse_config(values, f"{path} with --set" if overrides else str(path))


def parse_config(values: Mapping[str, Any], source: str = "configuration") -> TrainConfig:
    """``{section: {key: value}}`` as a checked configuration. Raises as ``read_config``."""
    types_of = typing.get_type_hints(TrainConfig)
    _check_names(source, "", values, list(types_of))
    sections: dict[str, Any] = {}
    for name, cls in types_of.items():
        entries = values.get(name, {})
        if not isinstance(entries, Mapping):
            raise ConfigValueError(f"{source}: [{name}] must be a section, got {entries!r}.")
        sections[name] = _section(source, name, cls, entries)
    try:
        return TrainConfig(**sections)
    except OptionError as error:
        raise ConfigValueError(f"{source}: {error}") from error


def _section(source: str, name: str, cls: type[Any], entries: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in fields(cls)}
    _check_names(source, name, entries, list(known))
    required = {f.name for f in fields(cls) if f.default is f.default_factory}
    missing = sorted(required - entries.keys())
    if missing:
        raise ConfigValueError(f"{source}: [{name}] needs {', '.join(missing)}.")
    checked = {
        key: _typed(f"{source}: {name}.{key}", value, known[key]) for key, value in entries.items()
    }
    try:
        return cls(**checked)
    except OptionError as error:
        raise ConfigValueError(f"{source}: {error}") from error


def _check_names(source: str, section: str, found: Mapping[str, Any], known: list[str]) -> None:
    """``section`` is empty for the names of sections."""
    what = f"key of [{section}]" if section else "section"
    for name in found:
        if name not in known:
            near = _nearest(name, section, known)
            hint = f"Did you mean {near!r}?" if near else f"Known: {', '.join(known)}."
            raise UnknownKeyError(f"{source}: {name!r} is no {what}. {hint}")


# What other trainers call it.
_ELSEWHERE = {
    "lr": "optimiser.rate",
    "learning_rate": "optimiser.rate",
    "batch_size": "optimiser.batch",
    "train_batch_size": "optimiser.batch",
    "gradient_accumulation_steps": "optimiser.accumulation",
    "grad_accum": "optimiser.accumulation",
    "gradient_checkpointing": "optimiser.checkpointing",
    "mixed_precision": "optimiser.precision",
    "max_grad_norm": "optimiser.clip_norm",
    "lr_scheduler": "optimiser.schedule",
    "lr_warmup_steps": "optimiser.warmup",
    "use_8bit_adam": "optimiser.kind",
    "max_train_steps": "run.steps",
    "max_steps": "run.steps",
    "epochs": "run.steps",
    "output_dir": "run.output",
    "num_workers": "data.workers",
    "dataloader_num_workers": "data.workers",
    "train_data_dir": "data.folder",
    "image_size": "data.resolution",
    "checkpointing_steps": "checkpoints.every",
    "save_every": "checkpoints.every",
    "snr_gamma": "objective.min_snr",
    "tensorboard": "log.trackers",
    "wandb": "log.trackers",
    "report_to": "log.trackers",
    "log_with": "log.trackers",
    "tracker_project_name": "log.project",
    "pretrained_model_name_or_path": "model.unet",
}
_SECTIONS = {"train": "run", "training": "run", "dataset": "data", "optimizer": "optimiser"}


def _nearest(name: str, section: str, known: Sequence[str]) -> str | None:
    """The key that was meant, with its section where that is another one.

    ``section`` is empty where ``name`` is a section itself. ``learning_rate`` means ``rate``,
    though ``final_rate`` looks more like it.
    """
    if not section:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        return _SECTIONS.get(name) or (close[0] if close else None)
    words = name.split("_")
    within = [key for key in known if key in words]
    if within:
        return within[0]
    if name in _ELSEWHERE:
        return _ELSEWHERE[name].removeprefix(f"{section}.")
    others = {
        f"{other}.{f.name}": f.name
        for other, cls in typing.get_type_hints(TrainConfig).items()
        for f in fields(cls)
    }
    same = [place for place, key in others.items() if key == name]
    own = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    inside = [place for place, key in others.items() if key in words]
    close = difflib.get_close_matches(name, others.values(), n=1, cutoff=0.7)
    found = same or own or inside or [p for p, key in others.items() if key in close]
    return found[0] if found else None


def _typed(where: str, value: Any, wanted: Any) -> Any:
    origin = typing.get_origin(wanted)
    if origin is Literal:
        return value  # the section itself says which words it takes
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigValueError(f"{where} must be a list, got {value!r}.")
        return tuple(_typed(where, entry, get_args(wanted)[0]) for entry in value)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is int and type(value) is float and value.is_integer():
        return int(value)  # steps = 1e5
    if type(value) is not wanted:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        raise ConfigValueError(f"{where} must be {names.get(wanted, wanted)}, got {value!r}.")
    return value


def _override(values: dict[str, Any], text: str) -> None:
    place, equals, raw = text.partition("=")
    section, dot, key = place.strip().partition(".")
    if not equals or not dot or not key:
        raise ConfigSyntaxError(f"--set expects section.key=value, got {text!r}.")
    try:
        value = parse_toml(f"value = {raw}", "--set")["value"]
    except ConfigSyntaxError:
        value = raw.strip().strip("\"'")  # a bare word or path
    entries = values.setdefault(section, {})
    if isinstance(entries, dict):
        entries[key] = value
