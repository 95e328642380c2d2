"""The embedded default model: every workflow runs without a download."""

from __future__ import annotations

from comfy_api.latest import io

from ..microworld import comfy_models


class InfiniteIDMicroModel(io.ComfyNode):
    """A tiny SDXL-shaped model that ships with the pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDMicroModel",
            display_name="Infinite-ID Micro Model (embedded)",
            category="Infinite-ID",
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


NODES: list[type[io.ComfyNode]] = [InfiniteIDMicroModel]
