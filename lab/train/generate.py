"""Pictures from prompts with the trained base, for looking at it and for measuring it."""

from __future__ import annotations

import torch

from microworld.config import IMAGE_SIZE

from .text import tokenize
from .unet import TextToImage, alphas_cumprod
from .vae import Autoencoder


@torch.no_grad()
def generate(
    model: TextToImage,
    vae: Autoencoder,
    prompts: list[str],
    *,
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
) -> torch.Tensor:
    """DDIM with classifier-free guidance; uint8 [B, 128, 128, 3]."""
    count = len(prompts)
    alphas = alphas_cumprod()
    context, pooled = model.text(tokenize([*prompts, *[""] * count]))
    ids = torch.tensor([[IMAGE_SIZE, IMAGE_SIZE, 0, 0, IMAGE_SIZE, IMAGE_SIZE]] * (2 * count))
    side = IMAGE_SIZE // 8
    latents = torch.randn(count, 4, side, side, generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(999, 0, steps + 1).round().long()
    for now, then in zip(times, times[1:], strict=False):
        noise = model.unet(
            torch.cat([latents, latents]),
            now,
            context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
        ).sample
        told, empty = noise.chunk(2)
        noise = empty + guidance * (told - empty)
        clean = (latents - (1 - alphas[now]).sqrt() * noise) / alphas[now].sqrt()
        after = alphas[then] if then > 0 else torch.tensor(1.0)
        latents = after.sqrt() * clean + (1 - after).sqrt() * noise
    # BCHW -> BHWC
    return (vae.decode(latents).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
