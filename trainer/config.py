"""Everything ``python -m trainer train`` can be told: one TOML section, one dataclass.

It names the section's keys, their defaults and ranges. ``config_file.py`` reads them from a file.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from infinite_id_core.faces.align import DEFAULT_PADDING
from infinite_id_core.method.attention import Mixing, StreamOptions, Style
from infinite_id_core.method.face_clip import ClipLayer, Embedding
from infinite_id_core.sdxl.schedule import TIMESTEPS, Scheduler

from .config_checks import below, each_of, in_range, not_empty, one_of
from .data_index import Filters
from .errors import ConfigValueError

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
LOWEST_PRODIGY_RATE = 0.01  # below, a rate meant for Adam was left standing


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
        in_range("run", self, steps=(1, 10**9), seed=(0, 2**63 - 1))
        one_of("run", self, device=Device, dtype=FileDtype)
        not_empty("run", self, "output")


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
        in_range("model", self, head_width=(1, 1024))
        one_of("model", self, prediction=PredictionChoice, unet_dtype=UNetDtype)
        not_empty("model", self, "unet")

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
        one_of("encoder", self, clip_layer=ClipLayer, embedding=Embedding)
        in_range("encoder", self, padding=(0.0, 1.0))
        not_empty("encoder", self, "clip_model")
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
    """An adapter file to go on from, as a new run: one of ours (e.g. 1024 px after 512 px), or a
    published one (IP-Adapter, FaceID, InstantID, PuLID), whose K/V and like mappers are taken."""

    def __post_init__(self) -> None:
        in_range("adapter", self, face_tokens=(1, 64))


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
        in_range(
            "data", self, resolution=(64, 4096), bucket_step=(8, 512), max_aspect=(1.0, 4.0),
            crops_per_photo=(1, 1000), min_face=(0.01, 1.0), max_face=(0.01, 1.0),
            max_upscale=(1.0, 100.0), workers=(0, 256),
        )  # fmt: skip
        not_empty("data", self, "folder")
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
        one_of("objective", self, mode=Mode, pooled=PooledText)
        in_range(
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
        one_of("optimiser", self, kind=OptimiserKind, schedule=RateSchedule, precision=Precision)
        in_range(
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
        in_range("checkpoints", self, every=(1, 10**9), keep=(1, 10**6))


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
        in_range("log", self, every=(1, 10**9), bands=(1, TIMESTEPS))
        each_of("log", self, trackers=Tracker)
        not_empty("log", self, "project")


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
        in_range(
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
        in_range(
            "previews", self, every=(0, 10**9), people=(1, 64), steps=(1, TIMESTEPS),
            guidance=(0.0, 100.0), sheet_side=(32, 2048),
        )  # fmt: skip
        one_of("previews", self, scheduler=Scheduler, mixing=Mixing, style=Style)

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
        below("optimiser.warmup", self.optimiser.warmup, "run.steps", self.run.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints and logs."""
        return cast(dict[str, Any], json.loads(json.dumps(asdict(self))))
