"""Loading an adapter."""

from __future__ import annotations

from comfy_api.latest import io

from . import folders
from .face import EMBEDDED
from .inputs import checked
from .micro import embedded_adapter

Adapter = io.Custom("INFINITE_ID_ADAPTER")


class InfiniteIDAdapterLoader(io.ComfyNode):
    """An adapter file from ``models/infinite_id``, or the embedded one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfiniteIDAdapterLoader",
            display_name="Infinite-ID Load Adapter",
            category="Infinite-ID",
            description="Loads the trained part of Infinite-ID from models/infinite_id.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[EMBEDDED, *folders.adapter_files()],
                    tooltip="An adapter file (.safetensors) in models/infinite_id. "
                    f"'{EMBEDDED}' goes with the Micro Model node.",
                ),
            ],
            outputs=[Adapter.Output(display_name="adapter", tooltip="For Infinite-ID Apply.")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return file == EMBEDDED or folders.check(file, folders.adapter_path)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str | float:
        return EMBEDDED if file == EMBEDDED else folders.mark(file, folders.adapter_path)

    @classmethod
    @checked
    def execute(cls, file: str) -> io.NodeOutput:
        from ..infinite_id_core.hosts.comfyui import load_adapter

        if file == EMBEDDED:
            return io.NodeOutput(embedded_adapter())
        return io.NodeOutput(load_adapter(folders.adapter_path(file)))


NODES: list[type[io.ComfyNode]] = [InfiniteIDAdapterLoader]
