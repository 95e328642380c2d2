"""Pictures of held-out people while training, and how much they are like them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from infinite_id_core.hosts.diffusers_sample import AppliedIdentity, Prompt, SamplingOptions
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.face_clip import CLIP_TOKENS, IdentityConfig, face_clip_identity
from infinite_id_core.method.identity import Identity
from infinite_id_core.scores.metrics import detected_only, zero_filled
from infinite_id_core.scores.score import FaceReader

from ..config import TrainConfig
from ..models.unet import LoadedUNet
from ..models.vae import load_vae
from ..painter import Painter
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
        recogniser: FaceReader | None = None,
    ) -> None:
        """``recogniser`` None scores none. Raises what reading the prompts and the autoencoder
        raises."""
        self.plan, self.keys, self.caches = held_out, keys, caches
        self.config: TrainConfig = held_out.config
        self.device = device
        self.painter = Painter(
            loaded=loaded, vae=load_vae(self.config.model.vae_source), device=device
        )
        self.prompts, self.negative = self._prompts(loaded)
        self.recogniser = recogniser
        self.people = held_out.dataset.identities[: self.config.previews.people]

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

    def make(self, adapter: Adapter, part: tuple[int, int] = (0, 1)) -> list[Preview]:
        """This process's part of the previews. ``part``: (this process, how many)."""
        jobs = [(n, text) for n in range(len(self.people)) for text in self.prompts]
        self.painter.vae.module.to(self.device)
        previews = [self._one(adapter, n, text) for n, text in jobs[part[0] :: part[1]]]
        self.painter.vae.module.to("cpu")
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

    def _one(self, adapter: Adapter, number: int, text: str) -> Preview:
        options = self.config.previews
        name = self.people[number]
        row_number = reference_row(self.plan.dataset, name)
        raw = torch.from_numpy(self.plan.dataset.face(row_number))
        applied = AppliedIdentity(adapter=adapter, identity=self._identity(name, row_number, raw))
        (picture,) = self.painter.paint(
            self.prompts[text],
            self.negative,
            self._noise(number),
            [applied],
            options=options.options,
            sampling=SamplingOptions(
                steps=options.steps, guidance=options.guidance, scheduler=options.scheduler
            ),
        )
        found = None if self.recogniser is None else self.recogniser.read(picture.permute(1, 2, 0))
        cosine = None if found is None else float(cosine_similarity(found.embedding, raw, dim=0))
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
    """Likeness over all previews, for the log: the share of pictures with a face, the mean cosine
    with 0 where there is none, and that of pictures with one."""
    cosines = np.array([np.nan if p.cosine is None else p.cosine for p in previews])
    found = detected_only(cosines)
    values = {
        "likeness/detected": len(found) / len(cosines),
        "likeness/zero_filled": float(zero_filled(cosines).mean()),
    }
    return {**values, "likeness/detected_only": float(found.mean())} if len(found) else values
