"""A small image encoder of the class that PuLID's is of."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva

BLOCKS = (0, 1, 2, 3, 4)
WIDTH, HEAD = 32, 20


def tower(seed: int = 1, size: int = 336) -> Any:
    """timm's class as EVA02-CLIP-L is of it, small."""
    torch.manual_seed(seed)
    made = Eva(
        img_size=size, patch_size=14, embed_dim=WIDTH, depth=6, num_heads=2, num_classes=HEAD,
        mlp_ratio=2.0, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False,
        use_rot_pos_emb=True, ref_feat_shape=(16, 16), global_pool="token",
    )  # fmt: skip
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made
