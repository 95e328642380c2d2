"""The embedded default: a model and people it can paint, so that workflows run at once."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..microworld import comfy_models, people
from .inputs import checked
from .page import KEEPS_PREVIEW


class InfiniteIDMicroModel(io.ComfyNode):
    """A tiny SDXL-shaped model that ships with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDMicroModel",
            display_name="Infinite-ID Micro Model (embedded)",
            category="Infinite-ID/embedded",
            description=(
                "A tiny SDXL-shaped model that ships with the pack, so that every workflow runs "
                "without a download. Use 128 x 128 pixels. It knows procedural portraits only: "
                "for real pictures, load an SDXL checkpoint instead."
            ),
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="The tiny UNet; goes wherever an SDXL model goes."),
                io.Clip.Output(tooltip="Its two tiny text encoders, for CLIP Text Encode."),
                io.Vae.Output(tooltip="Its tiny autoencoder, for VAE Encode and VAE Decode."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            comfy_models.load_unet(), comfy_models.load_clip(), comfy_models.load_vae()
        )


class InfiniteIDMicroPortrait(io.ComfyNode):
    """A reference photo for the Micro Model: a synthetic person whom it has never seen."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDMicroPortrait",
            display_name="Infinite-ID Micro Portrait (embedded)",
            category="Infinite-ID/embedded",
            description=(
                "A drawn portrait of a synthetic person whom the Micro Model has never seen: a "
                "reference for it that is always there. For your own photo use Load Image."
            ),
            inputs=[
                io.Int.Input(
                    "person",
                    default=0,
                    min=0,
                    max=999_999,
                    tooltip="Who: every number is another person, and always the same one.",
                ),
                io.Int.Input(
                    "size",
                    default=256,
                    min=128,
                    max=1024,
                    step=64,
                    tooltip="Side of the portrait, pixels.",
                ),
            ],
            outputs=[io.Image.Output(tooltip="The portrait; goes wherever a photo goes.")],
            **KEEPS_PREVIEW,
        )

    @classmethod
    @checked
    def execute(cls, person: int, size: int) -> io.NodeOutput:
        drawn = torch.from_numpy(people.reference_picture(person, size)).float()[None] / 255.0
        return io.NodeOutput(drawn, ui=ui.PreviewImage(drawn, cls=cls))


NODES: list[type[io.ComfyNode]] = [InfiniteIDMicroModel, InfiniteIDMicroPortrait]
