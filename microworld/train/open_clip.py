"""E_clip: a tiny open_clip model whose image tokens carry identity as well as content.

Two objectives take turns: whole pictures against their captions (which gives CLIP-T and CLIP-I),
and aligned faces whose mean token of the last block must tell the person. Published CLIP models
learn faces from captions with names; our captions have none, so identity is taught directly.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from ..captions import caption
from ..config import OPEN_CLIP
from ..portraits import ATTRIBUTE_NAMES, Attributes, Identity
from .data import generator
from .faces import Crops, contrast, pairs, worn
from .loop import LoopOptions, train
from .pictures import Pictures
from .text import row_of_ids, tokenize, used_ids

OPTIONS = LoopOptions(steps=1000, rate=1.5e-3, warmup=100, weight_decay=0.01, ema=0.99)
PEOPLE_A_STEP = 16
CAPTIONS_A_STEP = 32
PADDING = 0.25  # of the aligned crop, as infinite_id_core.face cuts it for E_clip
_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


class ImageText(nn.Module):
    """open_clip's own model on the captions' vocabulary, and two heads used only to train it."""

    def __init__(self) -> None:
        super().__init__()
        config = copy.deepcopy(OPEN_CLIP)
        config["text_cfg"]["vocab_size"] = len(used_ids()) + 1
        self.clip = open_clip.CLIP(**config)
        width = OPEN_CLIP["vision_cfg"]["width"]
        self.person = nn.Linear(width, 128)
        self.traits = nn.Linear(width, 12)
        self.register_buffer("rows", row_of_ids(), persistent=False)

    def tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] normed to the last block's hidden states [B, 257, width]."""
        tower = self.clip.visual
        return tower.transformer(tower._embeds(pixels))

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, 224, 224] normed to embeddings [B, 64]."""
        return self.clip.encode_image(pixels)

    def words(self, captions: list[str]) -> torch.Tensor:
        """Captions to embeddings [B, 64]."""
        return self.clip.encode_text(self.rows[tokenize(captions)])


def normed(images: torch.Tensor) -> torch.Tensor:
    """[B, 3, H, W] in [0, 1] to CLIP's input [B, 3, 224, 224]."""
    size = OPEN_CLIP["vision_cfg"]["image_size"]
    if images.shape[-1] != size:
        images = F.interpolate(images, size=(size, size), mode="bilinear")
    return (images - _MEAN) / _STD


def captions_of(
    data: Pictures, rows: NDArray[np.int64], rng: np.random.Generator
) -> list[str]:
    """One caption of each picture; some describe the person."""
    return [
        caption(
            Attributes(**dict(zip(ATTRIBUTE_NAMES, data.attributes[row].tolist(), strict=True))),
            rng,
            Identity.from_seed(int(data.seeds[row])),
        )
        for row in rows.tolist()
    ]


def _identity_loss(
    model: ImageText, crops: Crops, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    rows = pairs(rng, crops.data, PEOPLE_A_STEP)
    faces = crops.batch(rows, rng, size=OPEN_CLIP["vision_cfg"]["image_size"], padding=PADDING)
    with torch.autocast("cpu", torch.bfloat16):
        mean = model.tokens(normed(worn(faces, rng))).float().mean(dim=1)
    told, numbers = contrast(model.person(mean))
    traits = F.mse_loss(model.traits(mean), crops.data.traits[rows])
    return told + 10 * traits, {**numbers, "traits": float(traits.detach())}


def _caption_loss(
    model: ImageText, data: Pictures, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    rows = rng.choice(len(data), CAPTIONS_A_STEP, replace=False)
    images = data.pictures[rows].permute(0, 3, 1, 2).float() / 255  # BHWC -> BCHW
    with torch.autocast("cpu", torch.bfloat16):
        seen = model.image(normed(worn(images, rng)))
        said = model.words(captions_of(data, rows, rng))
    seen, said = F.normalize(seen.float(), dim=1), F.normalize(said.float(), dim=1)
    logits = seen @ said.T * model.clip.logit_scale.exp().clamp(max=50)
    same = torch.arange(len(rows))
    loss = (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2
    return loss, {"told": float((logits.argmax(dim=1) == same).float().mean())}


def run(folder: Path, data: Pictures, options: LoopOptions = OPTIONS) -> ImageText:
    """Train, or load what is trained."""
    torch.manual_seed(5)
    model, crops = ImageText(), Crops(data)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = generator("open_clip", step)
        if step % 2:
            return _caption_loss(model, data, rng)
        return _identity_loss(model, crops, rng)

    model.load_state_dict(train("open_clip", folder, model, loss, options))
    return model.eval()
