"""One sampling run inside ComfyUI: which rows a model call gets, and what its attention does.

Other packs and the host see one stream's rows: ``own`` evaluates a step once for the text
stream and once for the identity stream, each with its own latent, guidance and conditioning, and
``shared`` once. What reaches the model is one call with the rows of both, the text stream's
before the identity stream's in every cond: what the second evaluation will ask for is known in
the first. Where another pack wrapped the model itself, the two are called apart: the first call
writes the text stream's self-attention keys and values down, the second reads them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import comfy.ldm.modules.attention as host_attention
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import PatchConflictError
from ..method.adapter import Adapter
from ..method.attention import IdentityTerm, Kernel, merged_cross_attention, mixed_attention
from ..method.streams import (
    Size,
    identity_half,
    join_streams,
    mask_tokens,
    split_streams,
    twice,
    two_stream_cross_attention,
    two_stream_self_attention,
)
from ..sdxl.layers import BlockKey, CrossAttentionLayer
from .comfyui_others import (
    Options,
    Twins,
    model_wrappers,
    name_of,
    sampler_functions,
    without_model_wrappers,
)
from .comfyui_rows import (
    Conds,
    HalvedControl,
    fit_conds,
    fit_rows,
    halve_controls,
    in_window,
    uuids_of,
)
from .mirrored_noise import MirroredNoise

if TYPE_CHECKING:
    from .comfyui import TwoStreams

KEY = "infinite_id"
AttentionPatch = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
Others = dict[str, dict[Any, AttentionPatch]]
Evaluate = Callable[[Conds, Tensor, Tensor, Options], list[Tensor]]
"""The host's ``calc_cond_batch`` for one model: conds, latent, timestep, options."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the attention patches of one set of model calls need to know."""

    active: tuple[int, ...]
    """Indices into ``TwoStreams.applied``."""
    roles: tuple[bool, ...]
    """By cond index: True where the cond is negative and gets the null identity."""
    rows: Literal["both", "text", "identity"] = "both"


class Record:
    """The text stream's self-attention keys and values of one set of model calls."""

    def __init__(self) -> None:
        self._kept: dict[tuple[BlockKey, Any], list[tuple[Tensor, Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self._kept)

    def keep(self, block: BlockKey, uuids: Sequence[Any], k: Tensor, v: Tensor) -> None:
        """``k`` and ``v`` ``[len(uuids) * b, N, C]``, by the cond of each chunk."""
        chunks = zip(uuids, k.chunk(len(uuids)), v.chunk(len(uuids)), strict=True)
        for uuid, k_chunk, v_chunk in chunks:
            self._kept.setdefault((block, uuid), []).append((k_chunk, v_chunk))

    def take(self, block: BlockKey, uuids: Sequence[Any], like: Tensor) -> tuple[Tensor, Tensor]:
        """What was kept for these conds, each once and in the order it came."""
        pairs = [self._next(block, uuid) for uuid in uuids]
        k, v = (torch.cat([pair[i] for pair in pairs]).to(like) for i in (0, 1))
        if k.shape != like.shape:
            raise PatchConflictError(
                f"Another node gave the model {list(like.shape)} for the person where it had given "
                f"{list(k.shape)} for the prompt. Bypass the node that wraps the model, or "
                "Infinite-ID."
            )
        return k, v

    def _next(self, block: BlockKey, uuid: Any) -> tuple[Tensor, Tensor]:
        kept = self._kept.get((block, uuid))
        if not kept:
            raise PatchConflictError(
                "Another node called the model more often for the person than for the prompt. "
                "Bypass the node that wraps the model, or Infinite-ID."
            )
        return kept.pop(0)


@dataclass(kw_only=True)
class _TextCall:
    """One evaluation that the text stream asked for, and what is known of its fellow."""

    x: Tensor
    asked: list[list[Any]]
    expected: Tensor | None = None
    """The identity stream's latent that was evaluated along with it."""
    identity: list[Tensor] | None = None
    """What came out for it."""
    record: Record | None = None

    def answers(self, conds: Conds, x: Tensor) -> bool:
        """Whether the identity stream's evaluation has been done along with this one."""
        if self.expected is None or self.asked != uuids_of(conds):
            return False
        return self.expected is x or torch.equal(self.expected, x)


@dataclass(kw_only=True)
class _Step:
    """One model evaluation of the sampler in ``own``, which is two of the guider's."""

    text: Tensor
    identity: Tensor
    stream: Literal["text", "identity", "one"]
    calls: list[_TextCall] = field(default_factory=list)
    answered: int = 0

    def fellow(self, x: Tensor, options: Options, frames: int) -> Tensor | None:
        """The other stream's latent for a stream's ``x``: whole or a context window's rows."""
        mine, other = self.text, self.identity
        if self.stream == "identity":
            mine, other = other, mine
        if x is mine:
            return other
        window = options["transformer_options"].get("context_window")
        if window is None or getattr(window, "dim", 0) != 0:
            return None
        cut = in_window(mine, window, frames)
        same = cut.shape == x.shape and torch.equal(cut, x)
        return in_window(other, window, frames) if same else None


class Run:
    """State of one sampling run: cached tokens and K/V, time ranges, roles of the conds."""

    def __init__(self, streams: TwoStreams, guider: Any, noise_shape: Sequence[int]) -> None:
        self.streams = streams
        self.rows = noise_shape[0]
        self.noise = MirroredNoise([noise_shape[0] * 2, *noise_shape[1:]])
        self.guider = guider
        sampling = guider.model_patcher.get_model_object("model_sampling")
        self.ranges = [
            (sampling.percent_to_sigma(a.start_percent), sampling.percent_to_sigma(a.end_percent))
            for a in streams.applied
        ]
        self.negative: dict[Any, bool] = {
            cond["uuid"]: "negative" in name
            for name, conds in guider.conds.items()
            for cond in conds
            if "uuid" in cond
        }
        self.text_latent: Tensor | None = None
        """Where the text stream starts, if not where the person does: ``[b, C, H, W]``."""
        self.text_result: Tensor | None = None
        """Where the text stream ended."""
        self.begun = False
        self.canvas: Size = (int(noise_shape[-2]), int(noise_shape[-1]))
        self.twins = Twins()
        self.known_functions: frozenset[int] = frozenset()
        self._step: _Step | None = None
        self._record: Record | None = None
        self._tokens: dict[tuple[Adapter, int, bool, torch.device], Tensor] = {}
        self._key_values: dict[
            tuple[Adapter, int, bool, str, torch.device, torch.dtype], tuple[Tensor, Tensor]
        ] = {}
        self._masks: dict[Any, Tensor] = {}
        self._patches: dict[Any, Others] = {}
        self._controls: dict[int, HalvedControl] = {}
        self._asked_rows = 0
        self._areas: dict[Any, Sequence[int]] | None = None
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def close(self) -> None:
        """Free everything; the guider may outlive the run in a user's hands."""
        self.guider = self._step = self._record = self.text_latent = self.text_result = None
        self.twins = Twins()
        for cache in (
            self._tokens,
            self._key_values,
            self._masks,
            self._patches,
            self._controls,
        ):
            cache.clear()

    def start_text_at(self, latent: Tensor) -> None:
        """The text stream goes on from a latent of its own: from now on the two differ."""
        self.text_latent, self.begun = latent, True

    # --- time ---

    def active(self, sigma: float) -> tuple[int, ...]:
        """Identities that speak at this noise level."""
        active = tuple(i for i, (start, end) in enumerate(self.ranges) if end <= sigma <= start)
        self.begun = self.begun or bool(active)
        return active

    def needs_text_rows(self, sigma: float) -> bool:
        """Whether the streams differ and an identity may speak again."""
        return self.begun and any(end <= sigma for _, end in self.ranges)

    # --- rows ---

    def each_stream(
        self,
        predict: Callable[..., Tensor],
        x: Tensor,
        timestep: Tensor,
        model_options: Options,
        seed: int | None,
    ) -> Tensor:
        """One evaluation of the sampler, ``x [2b, C, H, W]``: the guider's for each stream.

        ``predict`` is what the host calls for it, with the options of the stream. Before the
        first identity's range both streams are one, and after the last nobody reads the text
        stream: then one of them is evaluated.
        """
        if x.shape[0] != 2 * self.rows:
            raise PatchConflictError(
                f"The sampler asked for {x.shape[0]} rows; expected {2 * self.rows}, those of the "
                "person and of the prompt. This sampler cannot run two streams: set text_stream "
                "to shared, or use another sampler."
            )
        options, added = sampler_functions(model_options, self.known_functions)
        seen: list[dict[str, Any]] = []
        if added:
            collect = partial(_collect, seen)
            functions = [*options.get("sampler_post_cfg_function", []), collect]
            options = {**options, "sampler_post_cfg_function": functions}
        sigma = float(timestep[0])
        two = bool(self.active(sigma)) or self.needs_text_rows(sigma)
        text, identity = x.chunk(2)
        t = identity_half(timestep) if timestep.shape[0] == x.shape[0] else timestep
        step = _Step(text=text, identity=identity, stream="text" if two else "one")
        self._step = step
        try:
            outs = []
            if two:
                outs.append(predict(text, t, self.twins.options(options, KEY), seed, True))
                step.stream = "identity"
            outs.append(predict(identity, t, options, seed, False))
        finally:
            self._step = None
        out = torch.cat([outs[0], outs[-1]])
        for function in added if seen else ():
            out = function(_joined(seen[0], seen[-1], out))
        return out

    def evaluate(
        self, run: Evaluate, conds: Conds, x: Tensor, timestep: Tensor, options: Options
    ) -> list[Tensor]:
        """What one stream asks of the model, with the other stream's rows where they are read."""
        self.canvas, self._asked_rows = (int(x.shape[-2]), int(x.shape[-1])), x.shape[0]
        active = self.active(float(timestep[0]))
        step = self._step
        if self.streams.own and step is None:  # a guider that goes its own way: both streams' rows
            return self._both(run, conds, x, timestep, options, active)
        if step is not None and step.stream == "one":
            return run(conds, x, timestep, options)
        if step is not None and step.stream == "text":
            return self._text(step, run, conds, x, timestep, options, active)
        if step is None:
            call = _TextCall(x=x, asked=[])
        else:
            call = self._text_call(step, x, options)
            if call.answers(conds, x):
                return call.identity or []
        if not active:
            return run(conds, x, timestep, options)
        if model_wrappers(options, conds, KEY):
            return self._apart(call, run, conds, x, timestep, options, active)
        both = self._both(
            run, conds, torch.cat([call.x, x]), _doubled(timestep, x), options, active
        )
        return [identity_half(out) for out in both]

    def _text(
        self,
        step: _Step,
        run: Evaluate,
        conds: Conds,
        x: Tensor,
        timestep: Tensor,
        options: Options,
        active: tuple[int, ...],
    ) -> list[Tensor]:
        """The text stream's evaluation; the identity stream's along with it where it is known."""
        call = _TextCall(x=x, asked=uuids_of(conds))
        step.calls.append(call)
        wrapped = model_wrappers(options, conds, KEY)
        fellow = None if wrapped else step.fellow(x, options, self.rows)
        if fellow is not None:
            both = self._both(
                run, conds, torch.cat([x, fellow]), _doubled(timestep, x), options, active
            )
            call.expected = fellow
            call.identity = [identity_half(out) for out in both]
            return [out[: x.shape[0]] for out in both]
        if wrapped and active:
            call.record, outs = self._recorded(run, conds, x, timestep, options, active)
            return outs
        return run(conds, x, timestep, options)

    def _text_call(self, step: _Step, x: Tensor, options: Options) -> _TextCall:
        """The text stream's fellow of the identity stream's next evaluation."""
        index, step.answered = step.answered, step.answered + 1
        if index < len(step.calls) and step.calls[index].x.shape == x.shape:
            return step.calls[index]
        # The text stream did not ask (another pack answered from memory), or asked otherwise.
        fellow = step.fellow(x, options, self.rows)
        return _TextCall(x=x if fellow is None else fellow, asked=[])

    def _both(
        self,
        run: Evaluate,
        conds: Conds,
        x: Tensor,
        timestep: Tensor,
        options: Options,
        active: tuple[int, ...],
    ) -> list[Tensor]:
        """Text rows and identity rows ``x [2b, C, H, W]`` in one."""
        if active:
            options = self.patched_options(options, conds, active)
        fitted = halve_controls(fit_conds(conds, x.shape[0] // 2), self._controls)
        return run(fitted, x, timestep, options)

    def _apart(
        self,
        call: _TextCall,
        run: Evaluate,
        conds: Conds,
        x: Tensor,
        timestep: Tensor,
        options: Options,
        active: tuple[int, ...],
    ) -> list[Tensor]:
        """The identity stream's rows alone, with the text stream's keys and values at hand."""
        record = call.record
        if not record:
            text = self.twins.options(options, KEY)
            record, _ = self._recorded(run, conds, call.x, timestep, text, active)
        if not record:  # a wrapper answered for the model; nobody else asks for these rows
            text = without_model_wrappers(text, KEY)
            record, _ = self._recorded(run, conds, call.x, timestep, text, active)
        patched = self.patched_options(options, conds, active, rows="identity")
        with self._recording(record):
            return run(fit_conds(conds, x.shape[0]), x, timestep, patched)

    def _recorded(
        self,
        run: Evaluate,
        conds: Conds,
        x: Tensor,
        timestep: Tensor,
        options: Options,
        active: tuple[int, ...],
    ) -> tuple[Record, list[Tensor]]:
        """The text stream's rows alone, their keys and values written down."""
        patched = self.patched_options(options, conds, active, rows="text")
        record = Record()
        with self._recording(record):
            outs = run(fit_conds(conds, x.shape[0]), x, timestep, patched)
        return record, outs

    @contextmanager
    def _recording(self, record: Record) -> Iterator[None]:
        self._record = record
        try:
            yield
        finally:
            self._record = None

    # --- attention patches ---

    def is_negative(self, index: int, conds: Conds) -> bool:
        """Whether a cond list gets the null identity, by its first entry that the guider knows.

        The host appends copies of the other side's. Conds that the guider does not know belong
        to another pack: alone they are its extra pass, else their place tells.
        """
        known = [self.negative[c["uuid"]] for c in conds[index] or () if c["uuid"] in self.negative]
        if known:
            return known[0]
        return index == 1 or len(conds) == 1

    def patched_options(
        self,
        model_options: Options,
        conds: Conds,
        active: tuple[int, ...],
        rows: Literal["both", "text", "identity"] = "both",
    ) -> Options:
        """A copy of the options whose attention patches run the two streams."""
        roles = tuple(self.is_negative(i, conds) for i in range(len(conds)))
        call = Call(active=active, roles=roles, rows=rows)
        transformer = model_options["transformer_options"]
        others = transformer.get("patches_replace", {})
        ours = self._patches_for(call, others)
        merged = {**others, **{k: {**others.get(k, {}), **p} for k, p in ours.items()}}
        return {**model_options, "transformer_options": {**transformer, "patches_replace": merged}}

    def _patches_for(self, call: Call, others: Others) -> Others:
        """Our patches, the same objects at each step so that compiled models do not recompile."""
        present = tuple(
            (k, b, id(self.twins.original(p)))
            for k in ("attn1", "attn2")
            for b, p in others.get(k, {}).items()
        )
        key = (call, present)
        if key not in self._patches:
            self._patches[key] = {
                kind: {
                    layer.block: partial(patch, call, layer, _other(others, kind, layer.block))
                    for layer in self.streams.layers
                }
                for kind, patch in (
                    ("attn1", self.self_attention),
                    ("attn2", self.cross_attention),
                )
            }
        return self._patches[key]

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
        kernel, options = _kernel(extra), self.streams.options
        chunks = len(extra["cond_or_uncond"])
        self._check_rows(call, extra)
        if call.rows == "both":
            return two_stream_self_attention(q, k, v, chunks, options, kernel)
        if call.rows == "text":
            if self._record is not None:
                self._record.keep(layer.block, extra["uuids"], k, v)
            return kernel(q, k, v)
        if self._record is None or options.mixing == "off":
            return kernel(q, k, v)
        k_t, v_t = self._record.take(layer.block, extra["uuids"], k)
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

        options = self.streams.options
        if call.rows == "both":
            return two_stream_cross_attention(q, k, v, text_out, len(conds), terms, options, kernel)
        parts = [x.chunk(len(conds)) for x in (q, k, v, text_out)]
        merged = [
            merged_cross_attention(q_c, terms(c, q_c), k_c, v_c, out_c, options, kernel)
            for c, (q_c, k_c, v_c, out_c) in enumerate(zip(*parts, strict=True))
        ]
        return torch.cat(merged)

    def _check_rows(self, call: Call, extra: Options) -> None:
        """Raises ``PatchConflictError`` where a wrapper gave the model another batch than ours.

        Its rows could not be told apart: who is the person, and which prompt is whose.
        """
        found = extra["original_shape"][0]
        wanted = len(extra["cond_or_uncond"]) * self._asked_rows
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
        original: AttentionPatch = self.twins.original(other)
        twin: AttentionPatch = self.twins.of(original)
        if call.rows != "both":
            return (twin if call.rows == "text" else original)(q, k, v, extra)
        chunks = len(extra["cond_or_uncond"])
        (q_t, q_id), (k_t, k_id), (v_t, v_id) = (split_streams(x, chunks) for x in (q, k, v))
        text_out = twin(q_t, k_t, v_t, extra)
        identity_out = original(q_id, k_id, v_id, extra)
        if text_out.shape != q_t.shape or identity_out.shape != q_id.shape:
            return identity_out  # of a wrong shape: the caller says so
        return join_streams(text_out, identity_out, chunks)

    def _terms(
        self, call: Call, path: str, cond: int, chunk: int, q: Tensor, extra: Options
    ) -> list[IdentityTerm]:
        null = call.roles[cond] if cond < len(call.roles) else cond == 1
        terms = []
        for index in call.active:
            applied = self.streams.applied[index]
            key, value = self.key_value(index, path, null, q, extra)
            rows = (q.shape[0], -1, -1)
            weights = None if null else applied.adapter.adapter.token_weight(applied.identity)
            terms.append(
                IdentityTerm(
                    key=key.expand(rows),
                    value=value.expand(rows),
                    strength=applied.strength,
                    token_weight=weights,
                    mask=self.mask(index, call, chunk, q, extra),
                )
            )
        return terms

    # --- caches ---

    def key_value(
        self, index: int, path: str, null: bool, like: Tensor, extra: Options
    ) -> tuple[Tensor, Tensor]:
        """K'_id, V'_id ``[1, M, width]`` of one layer, projected once per run and adapter module.

        On several GPUs each has a module of its own and a thread that calls at the same time.
        """
        adapter = self.streams.applied[index].adapter.in_call(self.guider, extra)
        key = (adapter, index, null, path, like.device, like.dtype)
        if key not in self._key_values:
            k, v = adapter.key_value(path)(self.tokens(adapter, index, null, like.device))
            self._key_values[key] = (k.to(like.dtype), v.to(like.dtype))
        return self._key_values[key]

    def tokens(self, adapter: Adapter, index: int, null: bool, device: torch.device) -> Tensor:
        """c_id ``[1, M, C]`` float32 (Eq. 4). Raises ``FeatureError`` where it is not finite."""
        key = (adapter, index, null, device)
        if key not in self._tokens:
            identity = self.streams.applied[index].identity
            tokens = adapter.null_tokens if null else adapter.tokens
            self._tokens[key] = tokens(identity, device=device, dtype=torch.float32)
        return self._tokens[key]

    def mask(self, index: int, call: Call, chunk: int, q: Tensor, extra: Options) -> Tensor | None:
        """An identity's mask at this layer's resolution, ``[1 or rows, N, 1]``."""
        mask = self.streams.applied[index].mask
        if mask is None:
            return None
        height, width = extra["original_shape"][-2:]
        if call.rows != "both" and (height, width) != self.canvas and not self.areas():
            raise PatchConflictError(
                f"Another node cuts the picture of {list(self.canvas)} into tiles of "
                f"{[height, width]}, and Infinite-ID cannot tell where in the mask a tile lies. "
                "Bypass the node that wraps the model, or connect no mask."
            )
        uuids = extra.get("uuids") or ()
        area = self.areas().get(uuids[chunk]) if chunk < len(uuids) else None
        window = extra.get("context_window")
        shown = window and (str(window.index_list), getattr(window, "causal_anchor_index", None))
        key = (index, q.shape[:2], q.device, q.dtype, height, width, str(area), shown)
        if key not in self._masks:
            if window is not None:
                mask = in_window(mask, window, self.rows)
            mask = mask.to(device=q.device, dtype=torch.float32)
            if area is not None:
                mask = _cut_to_area(mask, area, (height, width), self.canvas)
            tokens = mask_tokens(mask, (height, width), q.shape[1])
            self._masks[key] = fit_rows(tokens, q.shape[0]).to(q.dtype)
        return self._masks[key]

    def areas(self) -> dict[Any, Sequence[int]]:
        """Area (sizes, then offsets, in latent pixels) of each area cond, by the cond's uuid."""
        if self._areas is None:  # first asked for in a model call, when the host has resolved them
            conds = [c for cs in self.guider.conds.values() for c in cs]
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


def run_of(model_options: Options) -> Run | None:
    """The run that these options belong to, while it is open."""
    run = model_options.get("transformer_options", {}).get(KEY)
    return run if isinstance(run, Run) and run.guider is not None else None


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


def _doubled(timestep: Tensor, x: Tensor) -> Tensor:
    """A timestep for each row of both streams; one for all stays one."""
    return twice(timestep) if timestep.shape[:1] == x.shape[:1] else timestep


def _collect(seen: list[dict[str, Any]], arguments: dict[str, Any]) -> Tensor:
    """Stands where a sampler's own guidance function would read one stream's rows."""
    seen.append(arguments)
    denoised: Tensor = arguments["denoised"]
    return denoised


def _joined(text: dict[str, Any], identity: dict[str, Any], denoised: Tensor) -> dict[str, Any]:
    """The arguments of a guidance function for the rows of both streams."""
    rows = identity["denoised"].shape[:1]
    joined = {
        key: torch.cat([text[key], value])
        for key, value in identity.items()
        if isinstance(value, Tensor) and value.shape[:1] == rows
    }
    return {**identity, **joined, "denoised": denoised}


def _cut_to_area(mask: Tensor, area: Sequence[int], size: Size, canvas: Size) -> Tensor:
    """The part of a picture mask that lies in an area cond: ``[m, H, W]`` -> ``[m, *size]``."""
    top, left = area[len(area) // 2 :][-2:]
    on_canvas = interpolate(mask[:, None], size=canvas, mode="bilinear")[:, 0]
    return on_canvas[:, top : top + size[0], left : left + size[1]]
