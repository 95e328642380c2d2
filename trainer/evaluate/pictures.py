"""Pictures for an evaluation, made in this process: people x prompts x seeds x methods.

A picture's file name holds a hash of everything it depends on. So what is there is never made
again, and a changed setting never meets an old picture.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infinite_id_core.errors import OptionError
from infinite_id_core.hosts.diffusers_sample import AppliedIdentity
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.identity import Identity

from ..errors import disk_errors
from ..files import sampled_sha256
from ..generate import save_png
from ..models.source import MICROWORLD, source_of
from ..painter import (
    IdentityReader,
    Painter,
    Picture,
    Sources,
    encode_texts,
    joined,
    load_adapter,
    load_painter,
)
from ..photos import read_reference
from .manifest import Row
from .measure import Progress
from .methods import NO_ADAPTER, Method
from .people import Person
from .prompt_sets import EvalPrompt


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all methods of a run share. Raises ``OptionError``."""

    sources: Sources
    face_models: str = MICROWORLD
    """For the identity, as the adapter was trained: a pack's folder or ``microworld``."""
    clip_weights: str = ""
    """For the identity: the image encoder the adapter names."""
    width: int = 1024
    height: int = 1024
    batch: int = 4
    """Pictures of one person sampled together."""
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 256:
            raise OptionError(f"batch must lie in [1, 256], got {self.batch}.")
        Picture(width=self.width, height=self.height)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One picture to make."""

    method: Method
    person: Person
    prompt: EvalPrompt
    seed: int
    path: Path

    @property
    def row(self) -> Row:
        """The finished picture in a manifest."""
        return Row(
            image=self.path,
            reference=self.person.photos[0],
            identity=self.person.name,
            prompt=self.prompt.text,
            seed=str(self.seed),
            method=self.method.name,
            category=self.prompt.category,
        )


def plan(
    folder: Path,
    setting: Setting,
    methods: Sequence[Method],
    people: Sequence[Person],
    prompts: Sequence[EvalPrompt],
    seeds: Sequence[int],
) -> list[Task]:
    """Every picture of the run, made or not, in the order they are made.

    Raises ``OptionError`` for a method's name given twice, ``FileMissingError``.
    """
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise OptionError(f"Each method needs a name of its own; got {', '.join(names)}.")
    sources = setting.sources
    models = (sources.unet, sources.vae, sources.text_encoders, setting.face_models,
              setting.clip_weights)  # fmt: skip
    base = [*map(_print_of, models), setting.width, setting.height, str(setting.dtype)]
    photos = {photo: sampled_sha256(photo) for person in people for photo in person.photos}
    tasks = []
    for method, person in itertools.product(methods, people):
        adapter = "" if method.adapter == NO_ADAPTER else _print_of(method.adapter)
        shown = [photos[photo] for photo in person.photos[: method.references]]
        for (number, prompt), seed in itertools.product(enumerate(prompts), seeds):
            mark = [*base, method.settings(), adapter, shown, prompt.text, seed]
            digest = hashlib.sha256(json.dumps(mark).encode()).hexdigest()[:12]
            name = f"{number:03d}_{slug(prompt.text)}_{seed}_{digest}.png"
            path = folder / slug(method.name) / slug(person.name) / name
            tasks.append(Task(method=method, person=person, prompt=prompt, seed=seed, path=path))
    return tasks


def _print_of(source: str) -> str:
    """Changes when a model does: a fingerprint of its files, otherwise its name."""
    if not source:
        return ""
    path = Path(source)
    if source == MICROWORLD:
        place = source_of(source, "unet").path.parent
        found = [*place.glob("*.safetensors"), *place.glob("insightface/models/*/*.onnx")]
    elif path.is_dir():
        found = [file for end in ("safetensors", "onnx") for file in path.rglob(f"*.{end}")]
    else:
        found = [path] if path.is_file() else []
    return sampled_sha256(*sorted(found)) if found else source


def slug(text: str) -> str:
    """For a file name: short, in ASCII, unlike other texts' where that had to be cut."""
    kept = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()
    if kept == text and len(kept) <= 40:
        return kept
    return f"{kept[:40].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}".strip("-")


def make_missing(tasks: Sequence[Task], setting: Setting, progress: Progress | None = None) -> int:
    """Make the pictures that are not there; how many those were.

    Each is written atomically as soon as its batch is done. Raises what models and photos raise.
    """
    missing = [task for task in tasks if not task.path.is_file()]
    if not missing:
        return 0
    pictures = _Pictures(setting, missing)
    for _, group in itertools.groupby(missing, key=lambda t: (t.method.name, t.person.name)):
        for some in _chunks(list(group), setting.batch):
            for task, picture in zip(some, pictures.of(some), strict=True):
                task.path.parent.mkdir(parents=True, exist_ok=True)
                with disk_errors(task.path):
                    save_png(picture, task.path)
                if progress is not None:
                    progress()
    return len(missing)


def _chunks(tasks: Sequence[Task], size: int) -> Iterator[Sequence[Task]]:
    return (tasks[start : start + size] for start in range(0, len(tasks), size))


class _Pictures:
    """The loaded models, and who was read already."""

    def __init__(self, setting: Setting, tasks: Sequence[Task]) -> None:
        self.setting = setting
        texts = [text for task in tasks for text in (task.prompt.text, task.method.negative)]
        self.prompts = encode_texts(setting.sources, texts, setting.device)
        self.adapters: dict[str, Adapter] = {}
        self.reader = IdentityReader(setting.face_models, setting.clip_weights)
        self.identities: dict[tuple[Any, ...], Identity] = {}

    @cached_property
    def painter(self) -> Painter:
        setting = self.setting
        return load_painter(setting.sources, setting.device, setting.dtype)

    def of(self, tasks: Sequence[Task]) -> Tensor:
        """Pictures ``[n, 3, H, W]`` of tasks of one method and one person."""
        method, setting = tasks[0].method, self.setting
        size = {"width": setting.width, "height": setting.height}
        return self.painter.paint(
            joined([self.prompts[task.prompt.text] for task in tasks]),
            self.prompts[method.negative],
            torch.cat([Picture(seed=task.seed, **size).noise() for task in tasks]),
            self._applied(tasks[0]),
            options=method.options(),
            sampling=method.sampling(),
            negative_pass=method.negative_pass(),
        )

    def _applied(self, task: Task) -> list[AppliedIdentity]:
        method = task.method
        if method.adapter == NO_ADAPTER or method.strength == 0.0:
            return []
        if method.adapter not in self.adapters:
            self.adapters = {method.adapter: load_adapter(method.adapter).to(self.setting.device)}
        adapter = self.adapters[method.adapter]
        identity = self._identity(adapter, task.person.photos[: method.references])
        return [AppliedIdentity(adapter=adapter, identity=identity, strength=method.strength)]

    def _identity(self, adapter: Adapter, photos: tuple[Path, ...]) -> Identity:
        key = (photos, *sorted((name, repr(reading)) for name, reading in adapter.needs.items()))
        if key not in self.identities:
            read = {str(photo): read_reference(photo) for photo in photos}
            self.identities[key] = self.reader.read(adapter, read)
        return self.identities[key]
