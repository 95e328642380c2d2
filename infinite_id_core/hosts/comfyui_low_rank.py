"""A FaceID file's LoRA on the identity stream's rows alone, inside ComfyUI's attention.

What a LoRA adds to a linear layer needs the layer's input. ComfyUI gives it to ``attn1_patch`` and
``attn2_patch``, before the projections; what ``to_out`` gets is what our own replacement returns,
and ``attn1_output_patch`` and ``attn2_output_patch`` see its output. On all rows a LoRA is a patch
of the weights instead (``comfyui_lora``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..method.adapter import Adapter
from ..method.attention import StreamOptions
from ..method.low_rank import LowRankRun
from ..method.rows import Rows
from ..sdxl.layers import BlockKey, CrossAttentionLayer
from .comfyui_adapter import AppliedIdentity
from .comfyui_calls import Call, CallState
from .comfyui_others import Options

Inputs = tuple[Tensor, Tensor, Tensor]
_KINDS = ("attn1", "attn2")


class LowRankPatches:
    """The LoRAs of a run's people in its model calls; the same objects at each step."""

    def __init__(
        self,
        applied: Sequence[AppliedIdentity],
        layers: Sequence[CrossAttentionLayer],
        options: StreamOptions,
        state: CallState,
    ) -> None:
        self.applied = applied
        self.state = state
        self.run = LowRankRun(
            [one.low_rank for one in applied], [one.adapter.adapter for one in applied], options
        )
        self._paths = {layer.block: layer.path for layer in layers}
        self._patches: dict[Call, dict[str, list[Any]]] = {}
        # By attention and device: several GPUs run the same patches at the same time.
        self._inputs: dict[tuple[str, torch.device], Inputs] = {}
        self._outputs: dict[tuple[str, torch.device], Tensor] = {}

    def close(self) -> None:
        """Free what was made."""
        for kept in (self._patches, self._inputs, self._outputs):
            kept.clear()

    def acts(self, call: Call) -> bool:
        """Whether a LoRA changes rows of this call."""
        return call.rows in ("both", "identity") and bool(self.run.active(call.active))

    def options(self, transformer: Options, call: Call) -> Options:
        """``transformer_options`` with our patches behind those of other packs."""
        if not self.acts(call):
            return transformer
        if call not in self._patches:
            self._patches[call] = {
                **{f"{kind}_patch": [partial(self._keep_inputs, kind)] for kind in _KINDS},
                **{f"{kind}_output_patch": [partial(self._output, kind, call)] for kind in _KINDS},
            }
        others = transformer.get("patches", {})
        ours = {k: [*others.get(k, []), *p] for k, p in self._patches[call].items()}
        return {**transformer, "patches": {**others, **ours}}

    def around(self, kind: str, call: Call, patch: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A replacement of attention that gets changed q, k, v, and whose result is kept."""
        return partial(self._changed, kind, patch) if self.acts(call) else patch

    def _keep_inputs(
        self, kind: str, n: Tensor, context: Tensor, value: Tensor, extra: Options
    ) -> Inputs:
        self._inputs[kind, n.device] = (n, context, value)
        return n, context, value

    def _changed(
        self,
        kind: str,
        patch: Callable[..., Tensor],
        call: Call,
        layer: CrossAttentionLayer,
        other: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Options,
    ) -> Tensor:
        inputs = self._inputs.pop((kind, q.device))
        change = partial(self._on_people, f"{layer.path}.{kind}", call, extra)
        changed = [
            change(linear, y, x)
            for linear, y, x in zip(("to_q", "to_k", "to_v"), (q, k, v), inputs, strict=True)
        ]
        out = patch(call, layer, other, *changed, extra)
        self._outputs[kind, q.device] = out
        return out

    def _output(self, kind: str, call: Call, n: Tensor, extra: Options) -> Tensor:
        x = self._outputs.pop((kind, n.device), None)
        if x is None:  # another pack's block, which ours is not around
            return n
        path = self._paths[_block(extra)]
        return self._on_people(f"{path}.{kind}", call, extra, "to_out.0", n, x)

    def _on_people(
        self, attention: str, call: Call, extra: Options, linear: str, y: Tensor, x: Tensor
    ) -> Tensor:
        rows = (Rows.both if call.rows == "both" else Rows.alone)(len(extra["cond_or_uncond"]))

        def adapter_of(index: int) -> Adapter:
            return self.applied[index].adapter.in_call(self.state.guider, extra)

        people = self.run.active(call.active)
        return self.run.on_people(f"{attention}.{linear}", y, x, rows, people, adapter_of)


def _block(extra: Options) -> BlockKey:
    name, number = extra["block"]
    return name, number, extra.get("block_index", 0)
