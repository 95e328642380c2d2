"""The method's face in ComfyUI: thin V3 nodes, one file per family."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io
from typing_extensions import override

from . import apply, detail, face, folders, identity, micro, models, pose, score, simple, style


class InfiniteIDExtension(ComfyExtension):
    """All nodes of the pack."""

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *simple.NODES,
            *models.NODES,
            *face.NODES,
            *identity.NODES,
            *detail.NODES,
            *apply.NODES,
            *pose.NODES,
            *micro.NODES,
            *style.NODES,
            *score.NODES,
        ]


async def comfy_entrypoint() -> InfiniteIDExtension:
    """Called by ComfyUI once, when the pack is loaded."""
    folders.register()  # not in `on_load`: ComfyUI 0.3.64 defines it and never calls it
    return InfiniteIDExtension()
