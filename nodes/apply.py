"""The model patcher: mixed attention and AdaIN-mean on ComfyUI's SDXL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io
from torch import Tensor

from ..infinite_id_core.method.attention import (
    MAX_STRENGTH,
    MIXING,
    STYLE,
    TEXT_STREAM,
    StreamOptions,
)
from .inputs import checked
from .models import Adapter, IdentityType

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..infinite_id_core.hosts.comfyui_adapter import LoadedAdapter
    from ..infinite_id_core.method.identity import Identity


class InfiniteIDApply(io.ComfyNode):
    """Applies an identity to a model; chain several for several people."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDApply",
            display_name="Infinite-ID Apply",
            category="Infinite-ID/advanced",
            description="Makes the model paint this person while it follows the prompt. "
            "Chain several, each with a mask, for several people.",
            inputs=[
                io.Model.Input("model", tooltip="An SDXL model, or one that has an identity."),
                Adapter.Input("adapter", tooltip="From Infinite-ID Load Adapter."),
                IdentityType.Input("identity", tooltip="Who: from Encode, Load Identity or Mix."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How strongly the person shapes the picture. 0 leaves the model as "
                    "it was.",
                ),
                io.Combo.Input(
                    "mixing",
                    options=list(MIXING),
                    default="mixed",
                    tooltip="What the person's picture reads in self-attention: itself and the "
                    "prompt's picture (mixed, the paper), the prompt's (mutual), or itself (off: "
                    "no prompt's picture is painted, a step costs about what it costs without).",
                ),
                io.Combo.Input(
                    "style",
                    options=list(STYLE),
                    default="adain_mean",
                    tooltip="Alignment with the prompt's style: mean only (adain_mean, keeps the "
                    "face best), mean and deviation (adain, stronger), none (off, for photos).",
                ),
                io.Float.Input(
                    "style_strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far to go with the alignment: 0 none, 1 all the way.",
                ),
                io.Boolean.Input(
                    "merge_text",
                    default=True,
                    tooltip="Add the prompt's own cross-attention to the person's. Off makes the "
                    "prompt weaker.",
                ),
                io.Combo.Input(
                    "text_stream",
                    options=list(TEXT_STREAM),
                    default="own",
                    tooltip="The prompt's picture: painted on its own from the same noise (own), "
                    "or read from the person's picture at each step (shared).",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the person begins to take effect, as a part of the sampling.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the person stops taking effect. Ending early is faster.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture this person is. Nothing connected: everywhere.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="For KSampler, or the next person's Apply."
                )
            ],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: ModelPatcher,
        adapter: LoadedAdapter,
        identity: Identity,
        strength: float,
        start_percent: float,
        end_percent: float,
        mask: Tensor | None = None,
        **stream: Any,
    ) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui import apply_identity

        patched = apply_identity(
            model,
            adapter,
            identity,
            strength=strength,
            options=StreamOptions(**stream),
            start_percent=start_percent,
            end_percent=end_percent,
            mask=mask,
        )
        return io.NodeOutput(patched)


NODES: list[type[io.ComfyNode]] = [InfiniteIDApply]
