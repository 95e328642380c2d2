"""Shapes of every model of the microworld, in one place.

Both sides read this file: the builders that hand the models to ComfyUI and to diffusers, and the
code that trains them. The UNet is SDXL-shaped: no transformer at the first level, text and pooled
text from two CLIP encoders, SDXL's six size and crop ids.
"""

from __future__ import annotations

from typing import Any

IMAGE_SIZE = 128  # pixels; the VAE divides by 8, so latents are 4 x 16 x 16

TEXT_L: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "eos_token_id": 49407,
    "projection_dim": 64,
}
TEXT_G: dict[str, Any] = {**TEXT_L, "hidden_act": "gelu"}

CONTEXT_WIDTH = TEXT_L["hidden_size"] + TEXT_G["hidden_size"]
POOLED_WIDTH = TEXT_G["projection_dim"]

# Keys as in ComfyUI's detect_unet_config for SDXL.
UNET: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "channel_mult": [1, 1, 1],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 2, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2],
    "context_dim": CONTEXT_WIDTH,
    "adm_in_channels": POOLED_WIDTH + 6 * 256,
    "num_head_channels": 32,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "use_checkpoint": False,
    "legacy": False,
}

# open_clip's model config: a ViT with SDXL adapters' 257 tokens (224 px, patch 14, class token).
OPEN_CLIP: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 224,
        "patch_size": 14,
        "width": 96,
        "layers": 4,
        "head_width": 32,
        "mlp_ratio": 4.0,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}

FACE_WIDTH = 512  # the recogniser's embedding, as ArcFace's
RECOGNISER_SIZE = 112  # pixels, ArcFace's aligned crop
