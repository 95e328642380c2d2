"""InstantID's ControlNet: the face where a photo has it, and the person in its attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..infinite_id_core.errors import WrongInputError
from ..infinite_id_core.faces.keypoints import pose_drawings
from ..infinite_id_core.method.attention import MAX_STRENGTH
from .inputs import checked
from .kit import Kit
from .models import IdentityType
from .page import KEEPS_PREVIEW, found_by
from .simple import KitType

if TYPE_CHECKING:
    from ..infinite_id_core.method.identity import Identity

PIXELS = 8
"""Of a picture, to one of its latent's, on each side."""


class InfiniteIDFacePose(io.ComfyNode):
    """InstantID's ControlNet on both conditionings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDFacePose",
            display_name="Infinite-ID Face Pose",
            category="Infinite-ID/advanced",
            description="Gives InstantID's ControlNet the person and the place of the face, as "
            "InstantID's authors advise. Optional: the adapter works without it.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="What to paint."),
                io.Conditioning.Input("negative", tooltip="What not to paint."),
                io.ControlNet.Input(
                    "control_net",
                    tooltip="InstantID's ControlNet, from Load ControlNet Model.",
                ),
                KitType.Input(
                    "infinite_id", tooltip="From Infinite-ID Loader, with InstantID's adapter."
                ),
                IdentityType.Input("identity", tooltip="Who: from Person, Load Identity or Mix."),
                io.Image.Input(
                    "pose",
                    tooltip="The photo whose largest face says where the face is and how it is "
                    "turned: the person's own, or any other. One for all pictures, or one each.",
                ),
                io.Latent.Input(
                    "latent", tooltip="The one that KSampler gets: it tells the picture's size."
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How strongly the ControlNet acts. 0 leaves it out.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the ControlNet begins to act, as a part of the sampling.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="When the ControlNet stops acting. Ending early frees the pose.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For KSampler."),
                io.Conditioning.Output(display_name="negative", tooltip="For KSampler."),
                io.Image.Output(
                    display_name="drawing", tooltip="What the ControlNet sees: five points."
                ),
            ],
            **KEEPS_PREVIEW,
            **found_by("instantid", "identitynet", "controlnet", "keypoints", "pose"),
        )

    @classmethod
    @checked
    def execute(
        cls,
        positive: list[Any],
        negative: list[Any],
        control_net: Any,
        infinite_id: Kit,
        identity: Identity,
        pose: Tensor,
        latent: dict[str, Any],
        strength: float,
        start_percent: float,
        end_percent: float,
    ) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui_pose import PoseOptions, add_pose, check_instantid

        options = PoseOptions(
            strength=strength, start_percent=start_percent, end_percent=end_percent
        )
        check_instantid(infinite_id.adapter.adapter)
        drawings = _drawings(infinite_id, pose, latent["samples"])
        made = add_pose(
            positive, negative, control_net, infinite_id.adapter, identity, drawings, options
        )
        return io.NodeOutput(*made, drawings, ui=ui.PreviewImage(drawings, cls=cls))


def _drawings(kit: Kit, pose: Tensor, samples: Tensor) -> Tensor:
    """The faces of photos, as many as there are pictures at most, in the pictures' size."""
    if samples.ndim != 4 or 0 in samples.shape:
        raise WrongInputError(
            f"latent: expected [pictures, channels, height, width], got {list(samples.shape)}. "
            "Connect the latent of an SDXL picture, from Empty Latent Image or VAE Encode."
        )
    height, width = (PIXELS * side for side in samples.shape[-2:])
    faces = kit.faces(pose[: len(samples)])
    return pose_drawings(faces, (pose.shape[2], pose.shape[1]), (width, height))


NODES: list[type[io.ComfyNode]] = [InfiniteIDFacePose]
