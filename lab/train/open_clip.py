"""E_clip: a tiny open_clip model whose image tokens carry identity as well as content.

Two objectives take turns: whole pictures against their captions (which gives CLIP-T and CLIP-I),
and aligned faces: every patch's token of the last block must tell what the recogniser's last map
says at its place, and their mean the person's traits and the recogniser's embedding. Published CLIP
models learn faces from captions with names; our captions have none, so identity is taught directly,
and patch by patch, because a mean alone is far too little to learn from.
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

from microworld.captions import caption
from microworld.config import FACE_WIDTH, OPEN_CLIP, RECOGNISER_SIZE
from microworld.portraits import ATTRIBUTE_NAMES, ATTRIBUTE_SIZES, Attributes, Identity

from .data import generator
from .faces import Crops, recogniser, worn
from .loop import LoopOptions, arithmetic, train
from .pictures import Pictures
from .text import row_of_ids, tokenize, used_ids

OPTIONS = LoopOptions(steps=2800, rate=1.2e-3, warmup=100, weight_decay=0.01, ema=0.99)
FACES_A_STEP = 32
CAPTIONS_A_STEP = 32
CAPTIONS_EVERY = 3  # steps; the others teach faces
PADDING = 0.25  # of the aligned crop, as infinite_id_core.faces.align cuts it for E_clip
_CUT = round(RECOGNISER_SIZE * (1 + 2 * PADDING))  # pixels: faces as large as the teacher knows
_MAP_LAYERS = 7  # of the recogniser's body: its last map, stride 16
MAP_WIDTH = 96
_MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
_STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)


class ImageText(nn.Module):
    """open_clip's own model on the captions' vocabulary, and heads used only to train it."""

    def __init__(self) -> None:
        super().__init__()
        config = copy.deepcopy(OPEN_CLIP)
        config["text_cfg"]["vocab_size"] = len(used_ids()) + 1
        self.clip = open_clip.CLIP(**config)
        width = OPEN_CLIP["vision_cfg"]["width"]
        # The norm takes away what all pictures' mean tokens share, which is most of them at first.
        self.person = nn.Sequential(
            nn.BatchNorm1d(width, affine=False), nn.Linear(width, 12 + FACE_WIDTH)
        )
        self.patch = nn.Linear(width, MAP_WIDTH)
        self.seen = nn.Linear(OPEN_CLIP["embed_dim"], sum(ATTRIBUTE_SIZES))
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


def captions_of(data: Pictures, rows: NDArray[np.int64], rng: np.random.Generator) -> list[str]:
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
    model: ImageText, crops: Crops, teacher: nn.Module, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    rows = rng.choice(len(crops.data), FACES_A_STEP, replace=False)
    cut = crops.batch(rows, rng, size=_CUT, padding=PADDING)
    inner = round(RECOGNISER_SIZE * PADDING)
    with torch.no_grad():
        middle = cut[..., inner : inner + RECOGNISER_SIZE, inner : inner + RECOGNISER_SIZE]
        known = F.normalize(teacher(middle * 2 - 1), dim=1)
        map_ = _unit_scale(teacher.body[:_MAP_LAYERS](cut * 2 - 1))
    with arithmetic():
        tokens = model.tokens(normed(worn(cut, rng)))
    tokens = tokens.float()
    traits, face = model.person(tokens.mean(dim=1)).split([12, FACE_WIDTH], dim=1)
    error = F.mse_loss(traits, crops.data.traits[rows])
    cosine = F.cosine_similarity(face, known).mean()
    patches = F.mse_loss(model.patch(tokens[:, 1:]), map_)
    return 10 * error + (1 - cosine) + patches, {
        "traits": float(error.detach()),
        "cosine": float(cosine.detach()),
        "patches": float(patches.detach()),
    }


def _unit_scale(map_: torch.Tensor) -> torch.Tensor:
    """[B, C, h, w] to one row a patch, [B, 256, C], every channel of mean 0 and deviation 1."""
    side = OPEN_CLIP["vision_cfg"]["image_size"] // OPEN_CLIP["vision_cfg"]["patch_size"]
    rows = F.interpolate(map_, size=(side, side), mode="bilinear").flatten(2).mT
    return (rows - rows.mean(dim=(0, 1))) / (rows.std(dim=(0, 1)) + 1e-3)


def _caption_loss(
    model: ImageText, data: Pictures, rng: np.random.Generator
) -> tuple[torch.Tensor, dict[str, float]]:
    rows = rng.choice(len(data), CAPTIONS_A_STEP, replace=False)
    images = data.pictures[rows].permute(0, 3, 1, 2).float() / 255  # BHWC -> BCHW
    with arithmetic():
        seen = model.image(normed(worn(images, rng)))
        said = model.words(captions_of(data, rows, rng))
    logits = model.seen(seen.float()).split(ATTRIBUTE_SIZES, dim=1)
    wanted = data.attributes[rows].unbind(dim=1)
    named = torch.stack([F.cross_entropy(x, y) for x, y in zip(logits, wanted, strict=True)]).sum()
    seen, said = F.normalize(seen.float(), dim=1), F.normalize(said.float(), dim=1)
    cosine = seen @ said.T * model.clip.logit_scale.exp().clamp(max=50)
    same = torch.arange(len(rows))
    loss = (F.cross_entropy(cosine, same) + F.cross_entropy(cosine.T, same)) / 2
    return loss + named, {
        "named": float(named.detach()),
        "told": float((cosine.argmax(dim=1) == same).float().mean()),
    }


def run(folder: Path, data: Pictures, options: LoopOptions = OPTIONS) -> ImageText:
    """Train, or load what is trained."""
    torch.manual_seed(5)
    model, crops, teacher = ImageText(), Crops(data), recogniser(folder, data)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        rng = generator("open_clip", step)
        if step % CAPTIONS_EVERY == 0:
            return _caption_loss(model, data, rng)
        return _identity_loss(model, crops, teacher, rng)

    model.load_state_dict(train("open_clip", folder, model, loss, options))
    return model.eval()
