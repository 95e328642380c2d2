"""Pictures of held-out people while training, and how much they are like them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from infinite_id_core.hosts.diffusers_sample import (
    AppliedIdentity,
    Prompt,
    SamplingOptions,
    sample,
)
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.face_clip import CLIP_TOKENS, IdentityConfig, face_clip_identity
from infinite_id_core.method.identity import Identity
from infinite_id_core.sdxl.schedule import NoiseSchedule

from ..config import TrainConfig
from ..likeness import InsightFaceRecogniser, Likeness, Recogniser, likeness
from ..models.unet import LoadedUNet
from ..models.vae import load_vae
from ..prompts import read_prompts
from ..sheets import save_image
from .draws import Purpose, generator
from .features import reference_row
from .preview_sheet import Preview, as_tensor, preview_sheet
from .samples import LATENT_CHANNELS, LATENT_STRIDE, Caches, Keys, Plan


class Previewer:
    """Makes the same pictures again and again: same people, prompts and noise."""

    def __init__(
        self,
        held_out: Plan,
        keys: Keys,
        caches: Caches,
        loaded: LoadedUNet,
        device: torch.device,
        recogniser: Recogniser | None = None,
    ) -> None:
        """``recogniser`` None loads ``previews.face_models``, if given.

        Raises what reading the prompts, the autoencoder and the face models raises.
        """
        self.plan, self.keys, self.caches = held_out, keys, caches
        self.config: TrainConfig = held_out.config
        self.device = device
        self.schedule: NoiseSchedule = loaded.schedule
        self.vae = load_vae(self.config.model.vae_source)
        self.prompts, self.negative = self._prompts(loaded)
        options = self.config.previews
        if recogniser is None and options.face_models:
            recogniser = InsightFaceRecogniser(options.face_models)
        self.recogniser = recogniser
        self.people = held_out.dataset.identities[: options.people]

    def _prompts(self, loaded: LoadedUNet) -> tuple[dict[str, Prompt], Prompt]:
        path = self.config.previews.prompts
        if path:
            prompts = read_prompts(path)
            prompts.check(loaded.context_width, loaded.pooled_width)
            return dict(zip(prompts.texts, prompts.positive, strict=True)), prompts.negative
        nothing = Prompt(
            context=torch.zeros(1, 1, loaded.context_width),
            pooled=torch.zeros(1, loaded.pooled_width),
        )
        return {"identity stream alone": nothing}, nothing

    def make(self, unet: Any, adapter: Adapter, part: tuple[int, int] = (0, 1)) -> list[Preview]:
        """This process's part of the previews. ``part``: (this process, how many)."""
        jobs = [(n, text) for n in range(len(self.people)) for text in self.prompts]
        self.vae.module.to(self.device)
        previews = [self._one(unet, adapter, n, text) for n, text in jobs[part[0] :: part[1]]]
        self.vae.module.to("cpu")
        return previews

    def write_sheet(self, step: int, previews: Sequence[Preview]) -> Tensor:
        """Write all processes' previews as one PNG into ``previews`` of the output folder.

        Returns its pixels, ``[3, H, W]`` in [0, 1]. Raises ``DiskFullError``, and what reading
        the reference photos raises.
        """
        dataset = self.plan.dataset
        references = {name: dataset.photo(reference_row(dataset, name)) for name in self.people}
        sheet = preview_sheet(
            previews,
            references,
            tuple(self.prompts),
            self.config.previews.sheet_side,
            scored=self.recogniser is not None,
        )
        save_image(sheet, Path(self.config.run.output) / "previews" / f"step-{step:08d}.png")
        return as_tensor(sheet)

    def _one(self, unet: Any, adapter: Adapter, number: int, text: str) -> Preview:
        options = self.config.previews
        name = self.people[number]
        row_number = reference_row(self.plan.dataset, name)
        raw = torch.from_numpy(self.plan.dataset.face(row_number))
        latents = sample(
            unet,
            [AppliedIdentity(adapter=adapter, identity=self._identity(name, row_number, raw))],
            self.prompts[text],
            self.negative,
            self._noise(number).to(self.device),
            options=options.options,
            sampling=SamplingOptions(
                steps=options.steps, guidance=options.guidance, scheduler=options.scheduler
            ),
            schedule=self.schedule,
        )
        picture = self.vae.decode(latents)[0].cpu()
        cosine = None
        if self.recogniser is not None:
            score = likeness(self.recogniser, [picture.permute(1, 2, 0)], [raw])
            cosine = score.cosines[0]
        return Preview(person=name, prompt=text, picture=picture, cosine=cosine)

    def _identity(self, name: str, row_number: int, raw: Tensor) -> Identity:
        encoder, row = self.config.encoder, self.plan.dataset.row(row_number)
        face = normalize(raw, dim=0) if encoder.embedding == "normed" else raw
        clip = self.caches.clip.read(self.keys.clip(row), (CLIP_TOKENS, None))
        return face_clip_identity(
            face=face[None].to(self.device),
            clip=clip[None].to(self.device),
            weight=torch.ones(1),
            config=IdentityConfig(
                recogniser=self.plan.dataset.info.recogniser,
                embedding=encoder.embedding,
                clip_model=encoder.clip_model.removesuffix("-quickgelu"),
                clip_layer=encoder.clip_layer,
                name=name,
            ),
        )

    def _noise(self, number: int) -> Tensor:
        side = self.config.data.resolution // LATENT_STRIDE
        rng = generator(self.config.run.seed, number, Purpose.PREVIEW)
        noise = rng.standard_normal((1, LATENT_CHANNELS, side, side), dtype=np.float32)
        return torch.from_numpy(noise)


def scores(previews: Sequence[Preview]) -> dict[str, float]:
    """Likeness over all previews, for the log."""
    return Likeness(cosines=tuple(p.cosine for p in previews)).numbers()
