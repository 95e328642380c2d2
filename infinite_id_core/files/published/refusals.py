"""Files that are known, and cannot be used as an adapter here: by name, with what to do."""

from __future__ import annotations

from collections.abc import Set

from ..checked import Shapes
from ..safetensors_file import Header
from .parts import Parts, without_wrapper

_TEXT_ENCODERS = {"text_model", "text_projection", "logit_scale"}
_CLIP = {"vision_model", "visual", "visual_projection"}
_UNET = {
    "down_blocks", "up_blocks", "mid_block", "input_blocks", "output_blocks", "middle_block",
    "model", "diffusion_model", "first_stage_model", "conditioner", "cond_stage_model", "unet",
}  # fmt: skip
_ELSEWHERE = "Nothing here can read it; use its authors' own nodes."


def refusal(header: Header, parts: Parts) -> str | None:
    """What a file is and what to do with it, where it is known and not an adapter of SDXL's
    cross-attention; else None."""
    groups = {without_wrapper(name).partition(".")[0] for name in header.tensors}
    return (
        _other_models(header, groups)
        or other_projector(parts.shapes(header))
        or (None if parts.projector else _no_adapter(header, groups, parts))
    )


def _other_models(header: Header, groups: Set[str]) -> str | None:
    """Adapters that are built otherwise."""
    if groups & {"pulid_encoder", "pulid_ca"}:
        return f"is PuLID for FLUX; expected an adapter for SDXL. {_ELSEWHERE}"
    if groups & {"ip_adapter_proj_model", "double_blocks", "single_blocks"}:
        return f"is an IP-Adapter for FLUX; expected an adapter for SDXL. {_ELSEWHERE}"
    if {"id_encoder", "lora_weights"} <= groups:
        return _photomaker(header)
    return None


def _photomaker(header: Header) -> str:
    words = (
        "which writes the person into the prompt and brings no keys and values; expected an "
        "adapter of cross-attention."
    )
    if any("qformer_perceiver." in name for name in header.tensors):
        return (
            f"is PhotoMaker v2, {words} ComfyUI's own PhotoMaker nodes read v1 only: use them with "
            "PhotoMaker v1's file, or nodes made for v2."
        )
    return f"is PhotoMaker v1, {words} Use ComfyUI's own PhotoMaker nodes."


def other_projector(shapes: Shapes) -> str | None:
    """Adapters with K/V of our shape whose projector makes something else, by its tensors."""
    if "resample.latents" in shapes and "bg_embed" in shapes:
        return (
            "is StoryMaker, which needs a mask of each person and tokens of the background; "
            f"expected a face adapter. {_ELSEWHERE}"
        )
    perceiver = shapes.get("perceiver_resampler.proj_in.weight", ())
    latents, proj_in = shapes.get("latents", ()), shapes.get("proj_in.weight", ())
    plus = len(latents) == 3 and latents[2] == 2048 and len(proj_in) == 2 and proj_in[1] == 1024
    if (len(perceiver) == 2 and perceiver[0] == 4096) or plus:
        kind = "plus" if plus else "FaceID plus"
        return (
            f"is IP-Adapter {kind} for Kolors, whose layers have SDXL's shapes and whose tokens "
            f"are made for another text encoder; expected an adapter for SDXL. {_ELSEWHERE}"
        )
    return None


def _no_adapter(header: Header, groups: Set[str], parts: Parts) -> str | None:
    """Models, and halves of files."""
    names = [without_wrapper(name) for name in header.tensors]
    if parts.attention and not groups & {"unet"}:
        return (
            "has keys and values and no projector (image_proj.*); expected both in one file. It is "
            "half of an adapter: download it again, or convert the original again."
        )
    if names and all(name.startswith(("lora_unet_", "lora_te")) for name in names):
        return (
            "is a LoRA, as the LoRA half of a FaceID file is; expected keys and values and a "
            "projector. FaceID's .bin file holds its LoRA too: use that, and no LoRA beside it."
        )
    if any(name.startswith(("controlnet_", "control_model.")) for name in names):
        return (
            "is a ControlNet, as InstantID's IdentityNet is; expected an adapter. Load it with a "
            "ControlNet loader; InstantID's adapter is its other file, ip-adapter.bin."
        )
    if groups & _CLIP and not groups & _UNET:
        return (
            "is a CLIP image encoder; expected an adapter. Put it into models/clip_vision and load "
            "it there."
        )
    if groups & _UNET:
        return (
            "is a UNet or a whole checkpoint, without an adapter in it; expected an adapter. Load "
            "it with a checkpoint or diffusion model loader."
        )
    if groups & _TEXT_ENCODERS:
        return "is a text encoder; expected an adapter. Put it into models/text_encoders."
    return None
