"""The attention patches that one sampling run puts into ComfyUI's SDXL.

They are made for one set of model calls at a time and composed with whatever other packs put into
the same blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import PatchConflictError
from ..method.attention import IdentityTerm, Kernel, mixed_attention
from ..method.placement import Size, mask_tokens
from ..method.rows import Rows, cross_attention_over, self_attention_over
from ..method.run import IdentityRun
from ..sdxl.layers import BlockKey, CrossAttentionLayer
from .comfyui_adapter import AppliedIdentity
from .comfyui_calls import Call, CallState
from .comfyui_low_rank import LowRankPatches
from .comfyui_others import Options, name_of
from .comfyui_rows import fit_rows, in_window

AttentionPatch = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
Others = dict[str, dict[Any, AttentionPatch]]

_log = logging.getLogger(__name__)


class AttentionPatches:
    """What the attention of a run's model calls does; the same objects at each step."""

    def __init__(
        self,
        applied: Sequence[AppliedIdentity],
        layers: Sequence[CrossAttentionLayer],
        identities: IdentityRun,
        state: CallState,
    ) -> None:
        self.applied = applied
        self.layers = layers
        self.identities = identities
        self.state = state
        self.low_rank = LowRankPatches(applied, layers, identities.options, state)
        self._patches: dict[Any, Others] = {}
        self._areas: dict[Any, Sequence[int]] | None = None
        self._warned: set[str] = set()

    def close(self) -> None:
        """Free what was made."""
        self._patches.clear()
        self.low_rank.close()

    def options(self, model_options: Options, call: Call) -> Options:
        """A copy of the options with the patches of ``call``."""
        transformer = model_options["transformer_options"]
        others = transformer.get("patches_replace", {})
        ours = self._patches_for(call, others)
        merged = {**others, **{k: {**others.get(k, {}), **p} for k, p in ours.items()}}
        options = self.low_rank.options({**transformer, "patches_replace": merged}, call)
        return {**model_options, "transformer_options": options}

    def _patches_for(self, call: Call, others: Others) -> Others:
        """Our patches, the same objects at each step so that compiled models do not recompile."""
        present = tuple(
            (k, b, id(self.state.twins.original(p)))
            for k in ("attn1", "attn2")
            for b, p in others.get(k, {}).items()
        )
        key = (call, present)
        if key not in self._patches:
            self._patches[key] = {
                kind: {
                    layer.block: partial(patch, call, layer, _other(others, kind, layer.block))
                    for layer in self.layers
                }
                for kind, patch in self._kinds(call)
            }
        return self._patches[key]

    def _kinds(self, call: Call) -> list[tuple[str, Callable[..., Tensor]]]:
        kinds: list[tuple[str, Callable[..., Tensor]]] = [("attn2", self.cross_attention)]
        # Where nobody reads the text stream, self-attention is the model's own.
        kinds = kinds if call.rows == "one" else [("attn1", self.self_attention), *kinds]
        return [(kind, self.low_rank.around(kind, call, patch)) for kind, patch in kinds]

    def self_attention(
        self,
        call: Call,
        layer: CrossAttentionLayer,
        other: AttentionPatch | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Options,
    ) -> Tensor:
        """attn1: text rows plain, identity rows mixed (Eq. 5)."""
        if other is not None:
            # Its result need not be attention at all (PAG returns v), so it cannot be given
            # the doubled keys; each stream keeps to itself in this block.
            self._warn_once(other)
            return self._others(call, other, q, k, v, extra)
        kernel, options = _kernel(extra), self.identities.options
        chunks = len(extra["cond_or_uncond"])
        self._check_rows(call, extra)
        if call.rows == "both":
            return self_attention_over(Rows.both(chunks), q, k, v, options, kernel)
        record = self.state.record
        if call.rows == "text":
            if record is not None:
                record.keep(layer.block, extra["uuids"], k, v)
            return kernel(q, k, v)
        if record is None:
            return kernel(q, k, v)
        k_t, v_t = record.take(layer.block, extra["uuids"], k)
        return mixed_attention(q, k, v, k_t, v_t, options, kernel)

    def cross_attention(
        self,
        call: Call,
        layer: CrossAttentionLayer,
        other: AttentionPatch | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        extra: Options,
    ) -> Tensor:
        """attn2: text rows plain, identity rows merged (Eq. 6, 7).

        Another pack's replacement computes the text term of both streams, so what it adds (an
        image prompt, say) stays.
        """
        kernel, conds = _kernel(extra), extra["cond_or_uncond"]
        text_out = kernel(q, k, v) if other is None else self._others(call, other, q, k, v, extra)
        if text_out.shape != q.shape:
            raise _wrong_shape(other, layer.path, text_out, q)
        if call.rows == "text":
            return text_out

        def terms(chunk: int, q: Tensor) -> list[IdentityTerm]:
            return self._terms(call, layer.path, conds[chunk], chunk, q, extra)

        if call.rows == "one":
            self._check_rows(call, extra)
        rows = (Rows.both if call.rows == "both" else Rows.alone)(len(conds))
        options = self.identities.options
        heads = extra["n_heads"]
        return cross_attention_over(rows, q, k, v, text_out, terms, options, kernel, heads)

    def _check_rows(self, call: Call, extra: Options) -> None:
        """Raises ``PatchConflictError`` where a wrapper gave the model another batch than ours.

        Its rows could not be told apart: who is the person, and which prompt is whose.
        """
        found = extra["original_shape"][0]
        wanted = len(extra["cond_or_uncond"]) * self.state.asked_rows
        if call.rows != "both" and found != wanted:
            raise PatchConflictError(
                f"Another node called the model with {found} rows; expected {wanted}. If it cuts "
                "the picture into tiles, set its tile batch size to 1; else bypass it or "
                "Infinite-ID."
            )

    def _others(
        self, call: Call, other: AttentionPatch, q: Tensor, k: Tensor, v: Tensor, extra: Options
    ) -> Tensor:
        """Another pack's replacement, with one stream's rows at a time."""
        original: AttentionPatch = self.state.twins.original(other)
        twin: AttentionPatch = self.state.twins.of(original)
        if call.rows != "both":
            return (twin if call.rows == "text" else original)(q, k, v, extra)
        chunks = len(extra["cond_or_uncond"])
        rows = Rows.both(chunks)
        split = [[torch.cat(part) for part in rows.split(x)] for x in (q, k, v)]
        (q_t, k_t, v_t), (q_id, k_id, v_id) = zip(*split, strict=True)
        text_out = twin(q_t, k_t, v_t, extra)
        identity_out = original(q_id, k_id, v_id, extra)
        if text_out.shape != q_t.shape or identity_out.shape != q_id.shape:
            return identity_out  # of a wrong shape: the caller says so
        return rows.join(text_out.chunk(chunks), identity_out.chunk(chunks))

    def _terms(
        self, call: Call, path: str, cond: int, chunk: int, q: Tensor, extra: Options
    ) -> list[IdentityTerm]:
        null = call.roles[cond] if cond < len(call.roles) else cond == 1
        return [
            self.identities.term(
                index,
                path,
                q,
                null=null,
                adapter=self.applied[index].adapter.in_call(self.state.guider, extra),
                mask=self.mask(index, call, chunk, q, extra),
            )
            for index in call.active
        ]

    # --- masks ---

    def mask(self, index: int, call: Call, chunk: int, q: Tensor, extra: Options) -> Tensor | None:
        """An identity's mask at this layer's resolution, ``[1 or rows, N, 1]``."""
        mask = self.applied[index].mask
        if mask is None:
            return None
        height, width = extra["original_shape"][-2:]
        if call.rows != "both" and (height, width) != self.state.canvas and not self.areas():
            raise PatchConflictError(
                f"Another node cuts the picture of {list(self.state.canvas)} into tiles of "
                f"{[height, width]}, and Infinite-ID cannot tell where in the mask a tile lies. "
                "Bypass the node that wraps the model, or connect no mask."
            )
        uuids = extra.get("uuids") or ()
        area = self.areas().get(uuids[chunk]) if chunk < len(uuids) else None
        window = extra.get("context_window")
        shown = window and (str(window.index_list), getattr(window, "causal_anchor_index", None))
        key = (index, q.shape[:2], q.device, q.dtype, height, width, str(area), shown)

        def make(mask: Tensor = mask) -> Tensor:
            if window is not None:
                mask = in_window(mask, window, self.state.rows)
            mask = mask.to(device=q.device, dtype=torch.float32)
            if area is not None:
                mask = _cut_to_area(mask, area, (height, width), self.state.canvas)
            tokens = mask_tokens(mask, (height, width), q.shape[1])
            return fit_rows(tokens, q.shape[0]).to(q.dtype)

        return self.identities.masked(key, make)

    def areas(self) -> dict[Any, Sequence[int]]:
        """Area (sizes, then offsets, in latent pixels) of each area cond, by the cond's uuid."""
        if self._areas is None:  # first asked for in a model call, when the host has resolved them
            conds = [c for cs in self.state.guider.conds.values() for c in cs]
            self._areas = {c["uuid"]: c["area"] for c in conds if c.get("area") is not None}
        return self._areas

    def _warn_once(self, other: AttentionPatch) -> None:
        name = name_of(other)
        if name not in self._warned:
            self._warned.add(name)
            _log.warning(
                "Infinite-ID: %s replaces self-attention in some blocks; there the identity "
                "stream does not read the text stream.",
                name,
            )


def _kernel(extra: Options) -> Kernel:
    """The user's choice of attention, looked up at each call as other packs replace it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = host_attention.optimized_attention(
            q,
            k,
            v,
            extra["n_heads"],
            mask=bias,
            attn_precision=extra.get("attn_precision"),
            transformer_options=extra,
        )
        return out

    return attend


def _other(others: Others, kind: str, block: BlockKey) -> AttentionPatch | None:
    """Another pack's patch for a block: with the transformer's index, else for all of them."""
    patches = others.get(kind, {})
    return patches.get(block, patches.get(block[:2]))


def _wrong_shape(other: Any, path: str, found: Tensor, q: Tensor) -> PatchConflictError:
    return PatchConflictError(
        f"{name_of(other)} replaced the cross-attention of {path} and returned shape "
        f"{list(found.shape)}; expected {list(q.shape)}. It cannot run together with "
        "Infinite-ID; bypass one of the two."
    )


def _cut_to_area(mask: Tensor, area: Sequence[int], size: Size, canvas: Size) -> Tensor:
    """The part of a picture mask that lies in an area cond: ``[m, H, W]`` -> ``[m, *size]``."""
    top, left = area[len(area) // 2 :][-2:]
    on_canvas = interpolate(mask[:, None], size=canvas, mode="bilinear")[:, 0]
    return on_canvas[:, top : top + size[0], left : left + size[1]]
