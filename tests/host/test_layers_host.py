"""The layer table against the real classes: ComfyUI's SDXL UNet and diffusers', without weights."""

from __future__ import annotations

from typing import Any

import comfy.sample
import pytest
import torch

from microworld.comfy_models import unet_reference

from ..core.method.test_layers import table
from .tiny_sdxl import UNET_CONFIG, conditioning, latent, tiny_model

Depths = dict[str, Any]
SHAPES = {
    "SDXL": (
        {
            "transformer_depth": [0, 0, 2, 2, 10, 10],
            "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        },
        {"transformer_layers_per_block": [1, 2, 10]},
        70,
    ),
    "SSD-1B": (
        {
            "transformer_depth": [0, 0, 2, 2, 4, 4],
            "transformer_depth_middle": -1,
            "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        },
        {
            "transformer_layers_per_block": [[1, 1], [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], [1, 1, 1]],
            "mid_block_type": "UNetMidBlock2D",
        },
        34,
    ),
    "KOALA": (
        {
            "num_res_blocks": [1, 1, 1],
            "transformer_depth": [0, 2, 5],
            "transformer_depth_middle": 5,
            "transformer_depth_output": [0, 0, 2, 2, 5, 5],
        },
        {"transformer_layers_per_block": [1, 2, 5], "layers_per_block": 1},
        26,
    ),
}


def comfy_shapes(depths: Depths) -> dict[str, torch.Size]:
    config = {**UNET_CONFIG, "model_channels": 320, "context_dim": 2048, **depths}
    return {name: tensor.shape for name, tensor in unet_reference(config).items()}


def diffusers_shapes(depths: Depths) -> dict[str, torch.Size]:
    import diffusers

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            **depths,
        )
    return {name: tensor.shape for name, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("name", SHAPES)
def test_both_hosts_have_the_same_layers(pack: Any, name: str) -> None:
    ours = pack.infinite_id_core.sdxl.layers
    ldm, diffusers, count = SHAPES[name]
    found = ours.layers_from_ldm(comfy_shapes(ldm))
    assert len(found) == count
    assert found == ours.layers_from_diffusers(diffusers_shapes(diffusers))
    if name == "SDXL":
        assert [(layer.path, layer.block, layer.width) for layer in found] == table()


def test_the_keys_are_those_comfyui_calls_patches_with(pack: Any) -> None:
    """The middle block's number is 0, whatever its place in the module list."""
    model = tiny_model()
    wanted = {layer.block for layer in pack.infinite_id_core.hosts.comfyui.model_layers(model)}
    called = set()

    def seen(q: Any, k: Any, v: Any, extra: Any) -> Any:
        called.add((*extra["block"], extra["block_index"]))
        return q

    patched = model.clone()
    for side, number, depth in wanted:
        patched.set_model_attn2_replace(seen, side, number, depth)
    noise = latent(1, 8)
    with torch.inference_mode():
        comfy.sample.sample(
            patched, noise, 1, 1.0, "euler", "normal", conditioning(1), conditioning(2),
            torch.zeros_like(noise), seed=1, disable_pbar=True,
        )  # fmt: skip
    assert called == wanted
