"""Scores of a batch: who is shown, and how well the prompt is followed."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..infinite_id_core.scores.score import PackReader, score_batch
from .inputs import checked
from .models import FaceAnalysis, IdentityType


class InfiniteIDScore(io.ComfyNode):
    """Likeness and prompt scores; the best of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDScore",
            display_name="Infinite-ID Score",
            category="Infinite-ID",
            description="Tells how much each picture of a batch looks like a person, and how well "
            "it follows the prompt; gives back the best one and all of them by rank.",
            inputs=[
                io.Image.Input("images", tooltip="The pictures to score, as one batch."),
                FaceAnalysis.Input(
                    "face_analysis",
                    tooltip="Reads the faces. For an identity: the face models it was made with. "
                    "For a fair measure: others than those, with a reference picture.",
                ),
                IdentityType.Input(
                    "identity",
                    optional=True,
                    tooltip="Who the pictures should show. Connect this or a reference.",
                ),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="One or more photos of the person, in place of the identity. Beside "
                    "it, they serve CLIP-I alone.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For CLIP-I (with a reference) and CLIP-T (with a prompt). CLIP-T "
                    "needs one from Infinite-ID Load open_clip.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="What the pictures should show, for CLIP-T. Empty: left out.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="table",
                    tooltip="M_face, CLIP-I and CLIP-T of each picture, the most alike first.",
                ),
                io.Image.Output(display_name="best", tooltip="The picture most like the person."),
                io.Image.Output(
                    display_name="ranked", tooltip="All pictures, the most alike first."
                ),
                io.Float.Output(
                    display_name="likeness",
                    tooltip="M_face of the best picture, from -1 to 1; 0 where no face was found.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls, images: Tensor, face_analysis: Any, **person: Any) -> io.NodeOutput:
        scores = score_batch(PackReader(face_analysis), images, **person)
        order, table = scores.ranking(), scores.table()
        ranked = images[torch.tensor(order, device=images.device)]
        likeness = float(scores.m_face[order[0]]) if scores.found[order[0]] else 0.0
        return io.NodeOutput(table, ranked[:1], ranked, likeness, ui=ui.PreviewText(table))


NODES: list[type[io.ComfyNode]] = [InfiniteIDScore]
