"""Everything ``python -m trainer train`` can be told: one TOML section, one dataclass.

A section's dataclass names its keys, their defaults and their ranges, and is checked once, here.
``--set section.key=value`` overrides the file; ``value`` is TOML (a bare word is taken as text).
"""

from __future__ import annotations

import difflib
import json
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from infinite_id_core.errors import OptionError
from infinite_id_core.faces.align import DEFAULT_PADDING
from infinite_id_core.method.attention import MIXING, STYLE, Mixing, StreamOptions, Style
from infinite_id_core.method.face_clip import CLIP_LAYER, EMBEDDING, ClipLayer, Embedding
from infinite_id_core.sdxl.schedule import SCHEDULER, TIMESTEPS, Scheduler

from .data_index import Filters
from .errors import ConfigSyntaxError, ConfigValueError, UnknownKeyError
from .toml_files import parse_toml, read_toml

Mode = Literal["identity", "entangled"]
PooledText = Literal["zeros", "empty"]
Precision = Literal["bf16", "fp16", "fp32"]
Device = Literal["auto", "cpu", "cuda", "mps"]
OptimiserKind = Literal["adamw", "adamw8bit", "adafactor", "prodigy"]
RateSchedule = Literal["fixed", "cosine"]
PredictionChoice = Literal["auto", "epsilon", "v"]
UNetDtype = Literal["precision", "fp8"]
FileDtype = Literal["float32", "float16", "bfloat16"]
Tracker = Literal["tensorboard", "wandb"]
MODES: tuple[Mode, ...] = get_args(Mode)
POOLED_TEXTS: tuple[PooledText, ...] = get_args(PooledText)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
DEVICES: tuple[Device, ...] = get_args(Device)
OPTIMISERS: tuple[OptimiserKind, ...] = get_args(OptimiserKind)
LOWEST_PRODIGY_RATE = 0.01  # below, a rate meant for Adam was left standing
RATE_SCHEDULES: tuple[RateSchedule, ...] = get_args(RateSchedule)
PREDICTIONS: tuple[PredictionChoice, ...] = get_args(PredictionChoice)
UNET_DTYPES: tuple[UNetDtype, ...] = get_args(UNetDtype)
FILE_DTYPES: tuple[FileDtype, ...] = get_args(FileDtype)
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)


@dataclass(frozen=True, kw_only=True)
class Run:
    """How long, where to, and on what."""

    output: str
    """Folder for checkpoints, logs and the finished ``adapter.safetensors``."""
    steps: int
    """Optimiser steps in all."""
    seed: int = 0
    """Every random choice derives from it and the sample's number."""
    device: Device = "auto"
    """``auto``: the accelerator if there is one; ``cuda`` and ``mps``: that one or an error."""
    dtype: FileDtype = "float16"
    """Number format of the finished adapter file; training itself keeps float32."""
    licence_note: str = ""
    """Written into the adapter: what its data and face model allow."""

    def __post_init__(self) -> None:
        _in_range("run", self, steps=(1, 10**9), seed=(0, 2**63 - 1))
        _one_of("run", self, device=DEVICES, dtype=FILE_DTYPES)
        _not_empty("run", self, "output")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The frozen models."""

    unet: str
    """SDXL: a safetensors checkpoint or UNet as ComfyUI loads it, a diffusers folder, or
    ``microworld``, the embedded tiny model."""
    vae: str = ""
    """Its autoencoder: the same kinds of source; empty takes the one inside ``unet``."""
    text_encoders: str = ""
    """Only where ``objective`` reads text; empty takes those inside ``unet``."""
    head_width: int = 64
    """Width of one attention head: 64 in every SDXL; it is not in the tensors."""
    prediction: PredictionChoice = "auto"
    """What the UNet predicts; ``auto`` takes the file's own mark, else the noise."""
    zero_terminal_snr: bool = False
    """The base was trained down to pure noise (some v-prediction bases)."""
    unet_dtype: UNetDtype = "precision"
    """How the frozen UNet's weights are stored: as ``optimiser.precision``, or in 8 bits, which
    takes half the memory of bf16 and is widened layer by layer where it multiplies."""

    def __post_init__(self) -> None:
        _in_range("model", self, head_width=(1, 1024))
        _one_of("model", self, prediction=PREDICTIONS, unet_dtype=UNET_DTYPES)
        _not_empty("model", self, "unet")

    @property
    def vae_source(self) -> str:
        """Where the autoencoder comes from."""
        return self.vae or self.unet

    @property
    def text_source(self) -> str:
        """Where the text encoders come from."""
        return self.text_encoders or self.unet


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """E_clip and what is recorded with the adapter. E_face comes with the prepared data."""

    clip_model: str
    """open_clip's name, e.g. ``ViT-H-14``, or ``microworld``."""
    clip_weights: str = ""
    """safetensors file in open_clip's or transformers' naming; not needed for ``microworld``."""
    clip_layer: ClipLayer = "last"
    """Which hidden states."""
    embedding: Embedding = "normed"
    """Whether the face embedding is brought to unit length."""
    padding: float = DEFAULT_PADDING
    """How far the aligned crop reaches beyond ArcFace's, in parts of its side; the nodes'
    default is the same, and inference must match training."""

    def __post_init__(self) -> None:
        _one_of("encoder", self, clip_layer=CLIP_LAYER, embedding=EMBEDDING)
        _in_range("encoder", self, padding=(0.0, 1.0))
        _not_empty("encoder", self, "clip_model")
        if not self.clip_weights and self.clip_model != "microworld":
            raise ConfigValueError(
                f"encoder.clip_weights is empty. Give the safetensors file of {self.clip_model}, "
                "in open_clip's or transformers' naming."
            )


@dataclass(frozen=True, kw_only=True)
class AdapterSection:
    """The part that learns."""

    face_tokens: int = 4
    """T: tokens the face embedding becomes."""
    start_from: str = ""
    """An adapter file to go on from, as a new run (e.g. 1024 px after 512 px)."""

    def __post_init__(self) -> None:
        _in_range("adapter", self, face_tokens=(1, 64))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Targets: which photos, cut how."""

    folder: str
    """A folder that ``python -m trainer prepare`` finished."""
    cache: str = ""
    """Folder for latents and features; empty is ``cache`` inside ``folder``."""
    resolution: int = 1024
    """Side of a square of the targets' area, pixels."""
    bucket_step: int = 64
    """Sides of targets are multiples of this, pixels."""
    max_aspect: float = 2.0
    """Longest side over shortest of the targets' buckets; 1 is squares only."""
    crops_per_photo: int = 4
    """How many random crops of each photo are encoded and kept."""
    min_face: float = 0.15
    """Smallest face height over target height. The share is drawn between the two, evenly in the
    logarithm, as far as the photo allows."""
    max_face: float = 0.6
    """Largest face height over target height."""
    max_upscale: float = 1.5
    """A crop is enlarged at most this much, where the photo has more to give."""
    workers: int = 4
    """Processes that read samples; any number gives the same training."""

    def __post_init__(self) -> None:
        _in_range(
            "data", self, resolution=(64, 4096), bucket_step=(8, 512), max_aspect=(1.0, 4.0),
            crops_per_photo=(1, 1000), min_face=(0.01, 1.0), max_face=(0.01, 1.0),
            max_upscale=(1.0, 100.0), workers=(0, 256),
        )  # fmt: skip
        _not_empty("data", self, "folder")
        if self.min_face > self.max_face:
            raise ConfigValueError(
                f"data.min_face {self.min_face} is above data.max_face {self.max_face}."
            )
        if self.bucket_step % 8 or self.resolution % self.bucket_step:
            raise ConfigValueError(
                f"data.bucket_step {self.bucket_step} must be a multiple of 8 (the autoencoder's "
                f"stride) and divide data.resolution {self.resolution}."
            )

    @property
    def cache_folder(self) -> Path:
        """Where cached tensors lie."""
        return Path(self.cache) if self.cache else Path(self.folder) / "cache"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is learned (Eq. 3)."""

    mode: Mode = "identity"
    """``identity``: text attention off, as in the paper; ``entangled``: its ablation, with the
    photos' captions."""
    pooled: PooledText = "zeros"
    """Pooled text where captions are off: ``zeros``, as in the paper, or that of the ``empty``
    prompt, for which the text encoder is read once."""
    drop_identity: float = 0.1
    """Share of samples with the null identity, for guidance."""
    drop_text: float = 0.05
    """Share of samples with an empty caption (entangled only)."""
    min_snr: float = 0.0
    """Min-SNR weighting's gamma (5 is usual); 0 weighs all timesteps alike, as the paper."""
    noise_offset: float = 0.0
    """Share of noise that is equal over the whole picture; 0 is the paper's."""
    face_weight: float = 0.0
    """How much more than the rest the middle of the face counts in the loss; 0 weighs the whole
    picture alike, as the paper."""

    def __post_init__(self) -> None:
        _one_of("objective", self, mode=MODES, pooled=POOLED_TEXTS)
        _in_range(
            "objective", self, drop_identity=(0.0, 1.0), drop_text=(0.0, 1.0),
            min_snr=(0.0, 100.0), noise_offset=(0.0, 1.0), face_weight=(0.0, 1000.0),
        )  # fmt: skip

    @property
    def reads_text(self) -> bool:
        """Whether anything of a text encoder is learned from."""
        return self.mode == "entangled" or self.pooled == "empty"


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How it is learned."""

    kind: OptimiserKind = "adamw"
    """``adamw8bit`` keeps Adam's moments in 8 bits and needs bitsandbytes; ``adafactor`` keeps
    almost none; ``prodigy`` finds the rate by itself and needs prodigyopt."""
    rate: float = 1e-4
    """Learning rate after warm-up; for ``prodigy`` a factor of the one it finds, usually 1."""
    schedule: RateSchedule = "fixed"
    """``cosine`` falls to ``final_rate`` of ``rate`` at the last step."""
    warmup: int = 0
    """Steps of linear warm-up."""
    final_rate: float = 0.1
    """For ``cosine``: the last rate over ``rate``."""
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    """Gradients above this norm are scaled down; 0 leaves them."""
    batch: int = 4
    """Samples per device and forward pass."""
    accumulation: int = 1
    """Forward passes per optimiser step."""
    precision: Precision = "bf16"
    """Arithmetic of the frozen UNet; what learns is float32 in any case."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third slower."""
    ema: float = 0.0
    """Decay of the averaged weights that previews and the finished file use; 0 is none."""

    def __post_init__(self) -> None:
        _one_of("optimiser", self, kind=OPTIMISERS, schedule=RATE_SCHEDULES, precision=PRECISIONS)
        _in_range(
            "optimiser", self, rate=(0.0, 1.0), warmup=(0, 10**9), final_rate=(0.0, 1.0),
            weight_decay=(0.0, 1.0), beta1=(0.0, 0.9999999), beta2=(0.0, 0.9999999),
            epsilon=(1e-16, 1e-2), clip_norm=(0.0, 1e9), batch=(1, 4096),
            accumulation=(1, 4096), ema=(0.0, 0.9999999),
        )  # fmt: skip
        if self.kind == "prodigy" and self.rate < LOWEST_PRODIGY_RATE:
            raise ConfigValueError(
                f"optimiser.rate {self.rate} is a factor of the rate that 'prodigy' finds by "
                f"itself, expected {LOWEST_PRODIGY_RATE} to 1. Set optimiser.rate = 1.0."
            )

    def rate_at(self, step: int, steps: int) -> float:
        """Learning rate of a step, counted from 0, of ``steps``."""
        if step < self.warmup:
            return self.rate * (step + 1) / (self.warmup + 1)
        if self.schedule == "fixed":
            return self.rate
        done = (step - self.warmup) / max(1, steps - 1 - self.warmup)
        low = self.rate * self.final_rate
        return low + (self.rate - low) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """What a resumed run starts from."""

    every: int = 1000
    """Steps between checkpoints; one is also made on SIGTERM and at the end."""
    keep: int = 3
    """How many are kept, newest first."""

    def __post_init__(self) -> None:
        _in_range("checkpoints", self, every=(1, 10**9), keep=(1, 10**6))


@dataclass(frozen=True, kw_only=True)
class Log:
    """Where numbers and pictures go, and how often."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """``tensorboard`` writes event files to ``logs`` in the output folder; ``wandb`` sends to
    Weights & Biases, or with ``WANDB_MODE=offline`` writes to ``wandb`` in the output folder."""
    project: str = "infinite-id"
    """wandb's project; the run's name is the output folder's."""
    every: int = 50
    """Steps between entries; each is the mean since the last."""
    bands: int = 4
    """The loss is shown for this many equal ranges of timesteps."""

    def __post_init__(self) -> None:
        _in_range("log", self, every=(1, 10**9), bands=(1, TIMESTEPS))
        _each_of("log", self, trackers=TRACKERS)
        _not_empty("log", self, "project")


@dataclass(frozen=True, kw_only=True)
class Validation:
    """The loss on people held out of training, on the same samples at every evaluation."""

    every: int = 0
    """Steps between evaluations; one is also made at the end; 0 makes none. The weights with the
    best one are kept, as a checkpoint and as ``best.safetensors``."""
    people: int = 4
    """How many held-out people; fewer are an error."""
    pairs: int = 4
    """How many pairs of photos of each, or as many as there are. Each pair is asked once in every
    band of timesteps."""
    bands: int = 4
    """Equal ranges of timesteps, each with as many samples and a loss of its own."""
    seed: int = 0
    """Pairs, crops, noise and timesteps derive from it, and not from ``run.seed``: runs that differ
    in that are evaluated alike."""

    def __post_init__(self) -> None:
        _in_range(
            "validation", self, every=(0, 10**9), people=(1, 10**4), pairs=(1, 10**3),
            bands=(1, TIMESTEPS), seed=(0, 2**63 - 1),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Previews:
    """Pictures of people held out of training."""

    every: int = 0
    """Steps between previews; 0 makes none."""
    people: int = 4
    """How many held-out people."""
    steps: int = 20
    guidance: float = 5.0
    scheduler: Scheduler = "normal"
    mixing: Mixing = "mixed"
    style: Style = "adain_mean"
    prompts: str = ""
    """File of ``python -m trainer generate --save-prompts``; empty shows the identity stream
    alone, as it is trained (no text encoder is loaded in training)."""
    sheet_side: int = 384
    """Pixels of a picture in the sheet of each step: references and all prompts in one image."""
    face_models: str = ""
    """Folder ``.../models/<pack>`` of the recogniser that scores likeness; empty scores none."""

    def __post_init__(self) -> None:
        _in_range(
            "previews", self, every=(0, 10**9), people=(1, 64), steps=(1, TIMESTEPS),
            guidance=(0.0, 100.0), sheet_side=(32, 2048),
        )  # fmt: skip
        _one_of("previews", self, scheduler=SCHEDULER, mixing=MIXING, style=STYLE)

    @property
    def options(self) -> StreamOptions:
        """The identity stream by itself where there is no prompt."""
        if not self.prompts:
            return StreamOptions(mixing="off", style="off", merge_text=False, text_stream="shared")
        return StreamOptions(mixing=self.mixing, style=self.style)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All sections. Raises ``ConfigValueError`` where they do not go together."""

    run: Run
    model: Model
    encoder: Encoder
    data: Data
    adapter: AdapterSection = field(default_factory=AdapterSection)
    filters: Filters = field(default_factory=Filters)
    objective: Objective = field(default_factory=Objective)
    optimiser: Optimiser = field(default_factory=Optimiser)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    log: Log = field(default_factory=Log)
    validation: Validation = field(default_factory=Validation)
    previews: Previews = field(default_factory=Previews)

    def __post_init__(self) -> None:
        if self.run.device == "cpu" and self.optimiser.precision == "fp16":
            raise ConfigValueError(
                "optimiser.precision 'fp16' does not run on the CPU; use 'bf16' or 'fp32'."
            )
        if self.optimiser.warmup >= self.run.steps:
            raise ConfigValueError(
                f"optimiser.warmup {self.optimiser.warmup} is not below run.steps {self.run.steps}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints and logs."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))


# --- reading ---------------------------------------------------------------------------------


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
    return parse_config(values, str(path))


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


# --- checks ----------------------------------------------------------------------------------


def _in_range(section: str, values: Any, **ranges: tuple[float, float]) -> None:
    for name, (low, high) in ranges.items():
        value = getattr(values, name)
        if not low <= value <= high:
            raise ConfigValueError(f"{section}.{name} must lie in [{low}, {high}], got {value!r}.")


_SYNONYMS = {"gpu": "cuda", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def _one_of(section: str, values: Any, **choices: Sequence[str]) -> None:
    for name, allowed in choices.items():
        _is_one_of(f"{section}.{name} must be", getattr(values, name), allowed)


def _each_of(section: str, values: Any, **choices: Sequence[str]) -> None:
    for name, allowed in choices.items():
        for value in getattr(values, name):
            _is_one_of(f"{section}.{name}: each must be", value, allowed)


def _is_one_of(what: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(_SYNONYMS.get(value, str(value)), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigValueError(f"{what} one of {', '.join(allowed)}; got {value!r}.{hint}")


def _not_empty(section: str, values: Any, *names: str) -> None:
    for name in names:
        if not getattr(values, name):
            raise ConfigValueError(f"{section}.{name} must not be empty.")
