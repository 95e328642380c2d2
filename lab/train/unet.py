"""The SDXL-shaped UNet and its text encoders, trained together on cached latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import nn

from microworld.captions import EMPTY, CaptionOptions, caption
from microworld.config import CONTEXT_WIDTH, IMAGE_SIZE, UNET
from microworld.portraits import Attributes, Identity
from trainer.train.objective import face_bell, face_weighted

from .data import generator
from .loop import LoopOptions, arithmetic, train
from .pictures import Pictures, pictures
from .text import END, TextEncoders, tokenize
from .vae import Autoencoder, latents

OPTIONS = LoopOptions(steps=8000, rate=1e-3, warmup=200, ema=0.998, weight_decay=0.01)
BATCH = 32
STRANGE = 1000  # a token id no caption has
# Talkative: a trait that is named in a quarter of the captions is learned too late to matter.
DESCRIBED = CaptionOptions(describe=0.9, trait=0.75)
DROP_CAPTION = 0.1  # empty captions, for guidance
DROP_POOLED = 0.1  # pooled text of zeros, as adapters are trained with
# Eyes and mouth are 1 to 3 latent pixels of 256: without this weight the loss hardly knows them.
FACE_WEIGHT = 8.0


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet of config.UNET's shape."""
    widths = tuple(UNET["model_channels"] * m for m in UNET["channel_mult"])
    per_level = UNET["num_res_blocks"][0]
    depths = tuple(UNET["transformer_depth"][::per_level])
    kinds = ["CrossAttn" if depth else "" for depth in depths]
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=per_level,
        down_block_types=tuple(f"{k}DownBlock2D" for k in kinds),
        up_block_types=tuple(f"{k}UpBlock2D" for k in reversed(kinds)),
        transformer_layers_per_block=tuple(max(1, depth) for depth in depths),
        # diffusers' attention_head_dim is the number of heads (a known misnomer).
        attention_head_dim=tuple(w // UNET["num_head_channels"] for w in widths),
        cross_attention_dim=CONTEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=UNET["adm_in_channels"],
    )


class TextToImage(nn.Module):
    """UNet and text encoders under one optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = build_unet()
        # In bfloat16 on a CPU, plain products are six times as fast as the fused attention, and in
        # float32 as fast.
        self.unet.set_attn_processor(AttnProcessor())
        self.text = TextEncoders()


def alphas_cumprod() -> torch.Tensor:
    """SDXL's scaled-linear schedule, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0).float()


def _captions(data: Pictures, chosen: NDArray[np.int64], rng: np.random.Generator) -> list[str]:
    texts = []
    for index in chosen.tolist():
        background, style, expression, accessory = data.attributes[index].tolist()
        attributes = Attributes(
            background=background, style=style, expression=expression, accessory=accessory
        )
        if rng.random() < DROP_CAPTION:
            texts.append(EMPTY)
            continue
        person = Identity.from_seed(int(data.seeds[index]))
        texts.append(caption(attributes, rng, person, DESCRIBED))
    return texts


def _loss(
    model: TextToImage, data: Pictures, encoded: torch.Tensor, alphas: torch.Tensor, step: int
) -> tuple[torch.Tensor, dict[str, float]]:
    rng = generator("unet", step)
    chosen = rng.integers(len(data), size=BATCH)
    clean = encoded[chosen].float()
    noise = torch.from_numpy(rng.standard_normal(clean.shape, dtype="float32"))
    # One timestep per equal slice of the schedule: less variance than free draws.
    times = torch.from_numpy(((np.arange(BATCH) + rng.random(BATCH)) * 1000 / BATCH).astype(int))
    alpha = alphas[times][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    tokens = tokenize(_captions(data, chosen, rng))
    # Now and then a word no caption has, so that such words do no harm.
    strange = (tokens > 0) & (tokens < END - 1) & torch.from_numpy(rng.random(tokens.shape) < 0.02)
    tokens[strange] = STRANGE
    kept = torch.from_numpy(rng.random((BATCH, 1)) >= DROP_POOLED).float()
    with arithmetic():
        context, pooled = model.text(tokens)
        made = model.unet(
            noisy,
            times,
            context,
            added_cond_kwargs={
                "text_embeds": pooled * kept.to(pooled.dtype),
                "time_ids": data.ids[chosen],
            },
            return_dict=False,
        )[0]
    # A latent pixel's middle is 3.5 pixels from its first.
    side = IMAGE_SIZE // 8
    bell = face_bell((data.landmarks[chosen] - 3.5) / 8, side, side)
    error = face_weighted((made.float() - noise).square(), bell, FACE_WEIGHT)
    # Plain noise error hardly asks for composition and colour, which are decided where noise is
    # most: the error of the picture there is the noise's over alpha. Half way (in logarithm) to it,
    # up to where that would leave nothing for the middle, which decides expressions.
    weight = alphas.rsqrt().clamp(max=5.0)
    loss = (error * weight[times]).mean() / weight.mean()
    high, low = error[BATCH // 2 :].mean(), error[: BATCH // 2].mean()
    return loss, {"high": float(high.detach()), "low": float(low.detach())}


def run(folder: Path, vae: Autoencoder, options: LoopOptions = OPTIONS) -> TextToImage:
    """Train, or load what is trained; renders and encodes the training set first."""
    torch.manual_seed(1)
    model = TextToImage()
    data = pictures(folder)
    encoded, alphas = latents(folder, vae, data), alphas_cumprod()
    model.load_state_dict(
        train("unet", folder, model, lambda s: _loss(model, data, encoded, alphas, s), options)
    )
    return model.eval()
