"""Prompt texts for styles."""

from __future__ import annotations

from comfy_api.latest import io

from ..infinite_id_core.presets import STYLE_NAMES, TWELVE, choose_preset
from .inputs import checked


class InfiniteIDStylePreset(io.ComfyNode):
    """A prompt in one of twelve styles, all of them editable."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDStylePreset",
            display_name="Infinite-ID Style Preset",
            category="Infinite-ID",
            description="Puts a prompt into one of twelve styles. The styles are texts in the "
            "node: edit them, they travel with the workflow.",
            inputs=[
                io.String.Input(
                    "prompt", multiline=True, default="a person", tooltip="What to paint."
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="What to avoid in every style; the style adds its own.",
                ),
                io.Combo.Input("style", options=list(STYLE_NAMES), tooltip="Which style to use."),
                io.String.Input(
                    "presets",
                    multiline=True,
                    default=TWELVE,
                    tooltip="One style a line: name = text with {prompt} | negative text.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="positive", tooltip="For CLIP Text Encode."),
                io.String.Output(display_name="negative", tooltip="For CLIP Text Encode."),
            ],
        )

    @classmethod
    @checked
    def execute(cls, prompt: str, negative: str, style: str, presets: str) -> io.NodeOutput:
        return io.NodeOutput(*choose_preset(presets, style).apply(prompt, negative))


NODES: list[type[io.ComfyNode]] = [InfiniteIDStylePreset]
