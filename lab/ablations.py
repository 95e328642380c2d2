"""The paper's ablations in the microworld: `python -m lab ablate`.

Every row of the tables is one way of sampling: an adapter (or none), options of the two streams,
and how the reference is shown. All rows draw the same people, prompts and noise. People and
prompt combinations are held out of every training; likeness is judged by the second recogniser.

Work is cut into pieces of one row and five people. A piece is a file, so a killed run goes on
where it was, and several processes share the work (`--part 0/2`, `--part 1/2`).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from microworld import files
from microworld.captions import plain_caption
from microworld.portraits import (
    HELD_OUT_SEEDS,
    STYLES,
    Attributes,
    Identity,
    Nuisance,
    Picture,
    render,
)

from . import scoring

AdapterName = Literal["identity", "entangled", "none"]

PEOPLE = 25
PROMPTS = 8  # of each person: two in each style
STEPS = 16
GUIDANCE = 3.0  # what suits the embedded models, as its sweep says
PIECE = 5  # people
_FIRST = HELD_OUT_SEEDS.start + 5000  # people no other check looks at


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table."""

    name: str
    adapter: AdapterName = "identity"
    streams: Mapping[str, Any] = field(default_factory=dict)
    """Of `StreamOptions`, where they differ from the paper's."""
    strength: float = 1.0
    guidance: float = GUIDANCE
    negative: Mapping[str, Any] = field(default_factory=dict)
    """Of `NegativePass`, where it differs."""
    references: int = 1
    side: int = 128
    """Pixels of the reference photo (Fig. 10)."""
    mix: float = 0.0
    """How far to the next person the identity is interpolated (Fig. 12)."""
    curve: tuple[str, float] | None = None
    """The sweep this row is a point of, and where it lies on it."""
    people: int = PEOPLE


CORE = (
    Row(name="plain base", adapter="none"),
    Row(name="full method"),
    Row(name="entangled training", adapter="entangled"),
    Row(name="without mixed attention", streams={"mixing": "off"}),
    Row(name="mutual instead of mixed", streams={"mixing": "mutual"}),
    Row(name="without cross-attention merge", streams={"merge_text": False}),
    Row(name="AdaIN-mean off", streams={"style": "off"}),
    Row(name="AdaIN instead of AdaIN-mean", streams={"style": "adain"}),
    Row(
        name="one stream, IP-Adapter style",
        adapter="entangled",
        streams={"mixing": "off", "style": "off"},
    ),
)
OPEN = (
    Row(name="text stream shared", streams={"text_stream": "shared"}),
    Row(name="no identity in the negative pass", negative={"identity": "none"}),
    Row(name="no mixing in the negative pass", negative={"mixing": False}),
    Row(name="identity training, one stream", streams={"mixing": "off", "style": "off"}),
    # The merge alone already keeps every style: only without it can AdaIN-mean show what it does.
    Row(name="without merge, AdaIN-mean off", streams={"merge_text": False, "style": "off"}),
)
_SWEPT = 6  # people of a sweep's row


def _point(curve: str, at: float, name: str, **options: Any) -> Row:
    """A row of a sweep; `options`: what it changes."""
    return Row(name=name, curve=(curve, at), people=_SWEPT, **options)


SWEEPS = (
    *(_point("strength", s, f"strength {s}", strength=s) for s in (0.5, 1.5, 2.0)),
    _point("style strength", 0.5, "style strength 0.5", streams={"style_strength": 0.5}),
    *(_point("guidance", g, f"guidance {g}", guidance=g) for g in (2.0, 5.0, 7.5)),
    *(_point("references", n, f"{n} stacked references", references=n) for n in (2, 4, 8)),
    # At 24 px the detector misses two references of six.
    *(_point("reference, px", n, f"reference of {n} px", side=n) for n in (64, 48, 32)),
    *(
        _point("mixed with another", m, f"mixed {m} with another", mix=m)
        for m in (0.25, 0.5, 0.75, 1.0)
    ),
)
# Where "full method" lies on each curve.
DEFAULTS: Mapping[str, float] = {
    "strength": 1.0,
    "style strength": 1.0,
    "guidance": GUIDANCE,
    "references": 1,
    "reference, px": 128,
    "mixed with another": 0.0,
}
ROWS = {row.name: row for row in (*CORE, *OPEN, *SWEEPS)}


# --- people and prompts ----------------------------------------------------------------------


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.default_rng([20261124, *numbers])


def prompts_of(person: int) -> list[Attributes]:
    """Held-out combinations, two in each style."""
    rng = _rng(person, 1)
    found: list[Attributes] = []
    for style in range(len(STYLES)):
        while sum(a.style == style for a in found) < PROMPTS // len(STYLES):
            drawn = Attributes.sample(rng, held_out=True, style=style)
            if drawn not in found:
                found.append(drawn)
    return found


def photos_of(person: int, count: int, side: int = 128) -> list[Picture]:
    """Reference photos of a person, each another picture; `side` pixels worth of detail."""
    rng = _rng(person, 2)
    pictures = []
    for _ in range(count):
        drawn = Attributes(
            background=int(rng.integers(8)),
            style=0,
            expression=int(rng.integers(3)),
            accessory=0,
        )
        picture = render(Identity.from_seed(_FIRST + person), drawn, Nuisance.sample(rng))
        if side < picture.shape[0]:
            whole = picture.shape[:2]
            small = Image.fromarray(picture).resize((side, side), Image.Resampling.BOX)
            picture = np.asarray(small.resize(whole, Image.Resampling.BICUBIC))
        pictures.append(picture)
    return pictures


# --- making pictures -------------------------------------------------------------------------


class Models:
    """All models, loaded once and as real files are: insightface, open_clip, the trainer."""

    def __init__(self, adapters: Mapping[str, str]) -> None:
        """`adapters`: file of each name that rows ask for."""
        from trainer.painter import IdentityReader, Sources, load_adapter, load_painter

        self.sources = Sources(unet="microworld")
        self.painter = load_painter(self.sources)
        self.reader = IdentityReader(face_models())
        self.adapters = {name: load_adapter(path) for name, path in adapters.items()}

    def identity(self, person: int, row: Row, adapter: Any) -> Any:
        """The reference photos, found, aligned and read as the nodes do it."""
        from infinite_id_core.method.identity import interpolate

        own = self._read(person, row, adapter)
        return interpolate(own, self._read(person + 1, row, adapter), row.mix) if row.mix else own

    def _read(self, person: int, row: Row, adapter: Any) -> Any:
        photos = enumerate(photos_of(person, row.references, row.side))
        read = {f"photo {n}": torch.from_numpy(photo).float() / 255 for n, photo in photos}
        return self.reader.read(adapter, read)

    @torch.no_grad()
    def pictures(self, person: int, row: Row) -> NDArray[np.uint8]:
        """The person in all prompts: uint8 [PROMPTS, 128, 128, 3]."""
        from infinite_id_core.hosts.diffusers_sample import (
            AppliedIdentity,
            NegativePass,
            SamplingOptions,
        )
        from infinite_id_core.method.attention import StreamOptions
        from trainer.painter import encode_texts, joined

        applied = []
        if row.adapter != "none":
            adapter = self.adapters[row.adapter]
            identity = self.identity(person, row, adapter)
            applied = [AppliedIdentity(adapter=adapter, identity=identity, strength=row.strength)]
        noise = np.random.default_rng([77, person]).standard_normal((PROMPTS, 4, 16, 16))
        texts = [plain_caption(asked) for asked in prompts_of(person)]
        prompts = encode_texts(self.sources, [*texts, ""])
        made = self.painter.paint(
            joined([prompts[text] for text in texts]),
            prompts[""],
            torch.from_numpy(noise.astype(np.float32)),
            applied,
            options=StreamOptions(**row.streams),
            negative_pass=NegativePass(**row.negative),
            sampling=SamplingOptions(steps=STEPS, guidance=row.guidance),
        )
        # BCHW -> BHWC
        return (made * 255).round().byte().permute(0, 2, 3, 1).numpy()


@lru_cache(maxsize=1)
def face_models() -> Any:
    """The embedded pack."""
    from infinite_id_core.faces.pack import load_face_models

    return load_face_models(files.INSIGHTFACE_PACK, [files.INSIGHTFACE_ROOT], "CPU", threads=1)


@lru_cache(maxsize=1)
def image_encoder() -> Any:
    """The embedded open_clip model."""
    from trainer.models.image_encoder import load_image_encoder

    return load_image_encoder("microworld")


def pieces(rows: Sequence[Row]) -> Iterator[tuple[Row, int]]:
    """(row, first person), row by row."""
    for row in rows:
        for first in range(0, row.people, PIECE):
            yield row, first


def share(rows: Sequence[Row], number: int, count: int) -> list[tuple[Row, int]]:
    """The pieces of part `number` of `count`: dealt so that all have as many people to draw."""
    people, mine = [0] * count, []
    for row, first in pieces(rows):
        part = people.index(min(people))
        people[part] += min(PIECE, row.people - first)
        if part == number:
            mine.append((row, first))
    return mine


def piece_path(folder: Path, row: Row, first: int) -> Path:
    """Where a piece's pictures lie."""
    return folder / f"{row.name.replace(' ', '_').replace(',', '')}.{first:03d}.npz"


def make(folder: Path, rows: Sequence[Row], adapters: Mapping[str, str], part: str) -> None:
    """Make the missing pictures of this part's pieces."""
    number, count = (int(n) for n in part.split("/"))
    todo = share(rows, number, count)
    todo = [(row, first) for row, first in todo if not piece_path(folder, row, first).exists()]
    if not todo:
        return
    folder.mkdir(parents=True, exist_ok=True)
    models = Models(adapters)
    for row, first in tqdm(todo, desc="pieces", dynamic_ncols=True):
        people = range(first, min(first + PIECE, row.people))
        made = np.stack([models.pictures(person, row) for person in people])
        path = piece_path(folder, row, first)
        temporary = path.with_suffix(f".{number}.part")
        with temporary.open("wb") as file:
            np.savez_compressed(file, pictures=made)
        temporary.replace(path)


# --- scores ----------------------------------------------------------------------------------

COLUMNS = (
    "row",
    "person",
    "prompt",
    "style",
    "found",
    "likeness",
    "likeness_other_photos",
    "likeness_next",
    "background_right",
    "style_right",
    "expression_right",
    "accessory_right",
    "clip_t",
    "clip_i",
)


def score(folder: Path, rows: Sequence[Row], out: Path) -> Path:
    """Judge every finished row; one line a picture, to `out` (CSV)."""
    lines: list[list[Any]] = []
    for row in tqdm(rows, desc="scores", dynamic_ncols=True):
        paths = [piece_path(folder, row, first) for _, first in pieces([row])]
        if all(path.exists() for path in paths):
            made = np.concatenate([np.load(path)["pictures"] for path in paths])
            for person, pictures in enumerate(made):
                lines += _scored(row, person, list(pictures))
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(lines)
    return out


def _scored(row: Row, person: int, pictures: list[Picture]) -> list[list[Any]]:
    from infinite_id_core.scores.metrics import clip_i, clip_t

    wanted = prompts_of(person)
    truth, crop = _reference(person)
    landmarks = [scoring.find_landmarks(picture) for picture in pictures]
    embeddings, found = scoring.scorer_embeddings(pictures, landmarks)
    likeness = scoring.likeness(embeddings, np.repeat(truth[:1], len(pictures), axis=0))
    others = embeddings @ truth[1:].mean(axis=0)
    beside = embeddings @ _reference(person + 1)[0][0]  # to whom "mixed with another" leads
    read = scoring.read_attributes(pictures)
    vision = image_encoder()
    images = torch.from_numpy(np.stack(pictures)).float() / 255
    said = clip_t(vision.encode_image(images).image_embeds, _texts(person))
    seen = clip_i(vision.encode_image(_crops(images, landmarks)).image_embeds, crop)
    lines = []
    for i, asked in enumerate(wanted):
        values = (asked.background, asked.style, asked.expression, asked.accessory)
        right = [int(r == v) for r, v in zip(read[i], values, strict=True)]
        lines.append(
            [
                row.name,
                person,
                plain_caption(asked),
                STYLES[asked.style],
                int(found[i]),
                f"{likeness[i]:.4f}" if found[i] else "",
                f"{others[i]:.4f}" if found[i] else "",
                f"{beside[i]:.4f}" if found[i] else "",
                *right,
                f"{said[i]:.4f}",
                f"{seen[i]:.4f}" if found[i] else "",
            ]
        )
    return lines


@lru_cache(maxsize=64)
def _reference(person: int) -> tuple[NDArray[np.float32], Tensor]:
    """The scorer's embeddings of the reference and of three other photos; CLIP-I of the first."""
    photos = photos_of(person, 4)
    landmarks = [scoring.find_landmarks(photo) for photo in photos]
    truth, _ = scoring.scorer_embeddings(photos, landmarks)
    crops = _crops(torch.from_numpy(np.stack(photos[:1])).float() / 255, landmarks[:1])
    embeds: Tensor = image_encoder().encode_image(crops).image_embeds
    return truth, embeds


@lru_cache(maxsize=64)
def _texts(person: int) -> Tensor:
    """E_text of the person's prompts, which all rows share."""
    texts: Tensor = image_encoder().read_texts([plain_caption(a) for a in prompts_of(person)])
    return texts


def _crops(images: Tensor, landmarks: Sequence[NDArray[np.float64] | None]) -> Tensor:
    """Aligned faces [B, 224, 224, 3]; grey where there is none."""
    from infinite_id_core.faces.align import CROP_SIZE, align

    blank = torch.full((CROP_SIZE, CROP_SIZE, 3), 0.5)
    pairs = zip(images, landmarks, strict=True)
    return torch.stack([blank if p is None else align(i, p) for i, p in pairs])
