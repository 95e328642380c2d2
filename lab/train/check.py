"""How good the trained base is: sample pictures of prompts it never saw, and score them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from microworld import files
from microworld.captions import plain_caption
from microworld.portraits import HELD_OUT_SEEDS, Attributes, Identity, Nuisance, Picture, render

from .. import scoring
from .data import generator
from .export import autoencoder, text_to_image
from .generate import generate
from .vae import Autoencoder

_BATCH = 16


def check(folder: Path, out: Path, count: int) -> Iterator[str]:
    """Write a contact sheet of `count` held-out prompts and yield lines of scores."""
    vae = autoencoder(folder)
    yield _reconstruction(vae)
    people = range(HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.start + 300)
    for name, model in (("recogniser", files.RECOGNISER), ("scorer", scoring.SCORER)):
        for exact in (True, False):
            same, other = scoring.real_likeness(
                people, generator("check"), model=str(model), exact=exact
            )
            landmarks = "exact" if exact else "found"
            yield f"{name}, {landmarks} landmarks: same person {same:.3f}, others {other:.3f}"
    rng = generator("check prompts")
    drawn = [Attributes.sample(rng, held_out=True) for _ in range(max(count, 200))]
    real = [
        render(Identity.from_seed(people[i % 300]), a, Nuisance.sample(rng))
        for i, a in enumerate(drawn)
    ]
    prompts = [plain_caption(a) for a in drawn]
    yield f"attributes of held-out renders: {_rates(scoring.prompt_kept(real, prompts))}"
    through = _through(vae, real)
    yield f"the same through the autoencoder: {_rates(scoring.prompt_kept(through, prompts))}"
    model = text_to_image(folder)
    made: list[Picture] = []
    for start in range(0, count, _BATCH):
        batch = prompts[start : min(start + _BATCH, count)]
        made += list(generate(model, vae, batch, seed=start).numpy())
    yield f"attributes of {count} sampled: {_rates(scoring.prompt_kept(made, prompts[:count]))}"
    rows, found = scoring.scorer_embeddings(made)
    yield f"faces found in samples: {found.mean():.3f}"
    references, _ = scoring.scorer_embeddings(real[:count])
    yield f"likeness of the plain base: {scoring.likeness(rows, references).mean():.3f}"
    out.parent.mkdir(parents=True, exist_ok=True)
    wide = 12
    made += [np.zeros_like(made[0])] * (-len(made) % wide)
    sheet = [np.concatenate(made[i : i + wide], axis=1) for i in range(0, len(made), wide)]
    Image.fromarray(np.concatenate(sheet, axis=0)).save(out)
    yield str(out)


@torch.no_grad()
def _through(vae: Autoencoder, pictures: list[Picture]) -> list[Picture]:
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    made = torch.cat([vae.decode(vae.encode(part)) for part in images.split(32)])
    return list((made.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())


def _reconstruction(vae: Autoencoder) -> str:
    rng = generator("check vae")
    pictures = [
        render(
            Identity.from_seed(HELD_OUT_SEEDS.start + i),
            Attributes.sample(rng),
            Nuisance.sample(rng),
        )
        for i in range(64)
    ]
    error = np.stack(_through(vae, pictures)).astype(float) - np.stack(pictures)
    return f"autoencoder: {20 * np.log10(255 / np.sqrt((error**2).mean())):.1f} dB"


def _rates(kept: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:.3f}" for name, rate in kept.items())
