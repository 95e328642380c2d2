"""The embedded default model: every workflow runs without a download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comfy_api.latest import io

from ..microworld import comfy_models, files, random_weights

if TYPE_CHECKING:
    from ..infinite_id_core.host_comfyui import LoadedAdapter


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


def embedded_adapter() -> LoadedAdapter:
    """The adapter that goes with the Micro Model: the trained file, else seeded random weights."""
    import comfy.ops

    from ..infinite_id_core.adapter import Adapter, AdapterConfig
    from ..infinite_id_core.host_comfyui import LoadedAdapter, load_adapter, model_layers

    if files.ADAPTER.is_file():
        return load_adapter(files.ADAPTER)
    adapter = Adapter(
        AdapterConfig(**random_weights.adapter_config()),
        {layer.path: layer.width for layer in model_layers(comfy_models.load_unet())},
        comfy.ops.manual_cast,
    )
    adapter.load_state_dict(random_weights.seeded_state_dict(adapter.state_dict(), seed=0))
    return LoadedAdapter(adapter.requires_grad_(False))


NODES: list[type[io.ComfyNode]] = [InfiniteIDMicroModel]
