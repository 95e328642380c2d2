"""The two streams inside ComfyUI's SDXL.

``apply_identity`` adds sampling wrappers to a clone of the model and nothing else: the upstream
model keeps its weights, options and patches. At each model call the wrappers install attention
patches into that call's own options, composed with whatever other packs put there before or
after us, so an interrupt or exception leaves nothing behind.

Rows of a model call: ComfyUI lays ``n`` conds side by side, each with the same latent rows. Here
every cond's rows are the text stream's followed by the identity stream's, whatever the split
into calls (``own``: doubled around the whole run at OUTER_SAMPLE; ``shared``: around each
CALC_COND_BATCH).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.nn.functional import interpolate

from .adapter import Adapter, check_identity, check_layers
from .attention import IdentityTerm, Kernel, StreamOptions
from .checkpoint import build_adapter, read_adapter_tensors
from .errors import NotSDXLError, PatchConflictError, StreamConflictError
from .identity import Identity, null_features
from .layers import BlockKey, CrossAttentionLayer, layers_from_ldm
from .mirrored_noise import MirroredNoise
from .streams import (
    IdentityPlacement,
    Size,
    identity_half,
    mask_tokens,
    twice,
    two_stream_cross_attention,
    two_stream_self_attention,
)

KEY = "infinite_id"
Options = dict[str, Any]
AttentionPatch = Callable[[Tensor, Tensor, Tensor, Options], Tensor]

_log = logging.getLogger(__name__)


# --- what a model carries --------------------------------------------------------------------


class LoadedAdapter:
    """An adapter whose weights live under ComfyUI's memory management."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.patcher = ModelPatcher(
            adapter,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LoadedAdapter:
        return self


def load_adapter(path: str | Path) -> LoadedAdapter:
    """Read an adapter file for ComfyUI. Raises a subclass of ``FileError``."""
    config, tensors = read_adapter_tensors(path)
    return LoadedAdapter(build_adapter(config, tensors, comfy.ops.manual_cast))


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedIdentity(IdentityPlacement):
    """One Apply: an identity, where it speaks, and the adapter that reads it."""

    adapter: LoadedAdapter


@dataclass(frozen=True, kw_only=True, eq=False)
class TwoStreams:
    """All identities of one model, and the wrappers that run them. Immutable: clones share it."""

    applied: tuple[AppliedIdentity, ...]
    options: StreamOptions
    layers: tuple[CrossAttentionLayer, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> TwoStreams:
        return self

    def wrappers(self) -> dict[str, Callable[..., Any]]:
        """ComfyUI's wrapper type -> ours."""
        return {
            WrappersMP.OUTER_SAMPLE: self.outer_sample,
            WrappersMP.PREPARE_SAMPLING: self.prepare_sampling,
            WrappersMP.SAMPLER_SAMPLE: self.sampler_sample,
            WrappersMP.PREDICT_NOISE: self.predict_noise,
            WrappersMP.CALC_COND_BATCH: self.calc_cond_batch,
        }

    @property
    def own(self) -> bool:
        """Whether the text stream has a trajectory of its own."""
        return self.options.text_stream == "own"

    def outer_sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        denoise_mask: Tensor | None = None,
        callback: Callable[..., None] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Around the whole run: open it, double the rows for ``own``, close it whatever happens."""
        guider = executor.class_obj
        run = Run(self, guider, noise.shape)
        options = guider.model_options  # ComfyUI's copy for this run only
        options["transformer_options"] = {**options["transformer_options"], KEY: run}
        rows = noise.shape[0]
        if self.own:
            noise, latent_image = twice(noise), twice(latent_image)
            if denoise_mask is not None:
                denoise_mask = _fit_rows(denoise_mask, rows)
            callback = None if callback is None else _identity_preview(callback)
            handler = options.get("context_handler")
            if getattr(handler, "dim", None) == 0:
                options["context_handler"] = _PairedWindows(handler)
        try:
            result: Tensor = executor(
                noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **kwargs
            )
        finally:
            run.close()
        return identity_half(result) if self.own else result

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any
    ) -> Any:
        """Tell the host the true batch of a model call, which ``shared`` doubles later."""
        if not self.own:
            noise_shape = [noise_shape[0] * 2, *noise_shape[1:]]
        return executor(model, noise_shape, *args, **kwargs)

    def sampler_sample(self, executor: Any, guider: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the sampler: both streams get the same random draws."""
        run = _run_of(guider.model_options)
        if run is None or not self.own:
            return executor(guider, *args, **kwargs)
        with run.noise:
            return executor(guider, *args, **kwargs)

    def predict_noise(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around each model evaluation: nothing to mirror in there, so do not listen."""
        run = _run_of(executor.class_obj.model_options)
        if run is None or not run.noise.active:
            return executor(*args, **kwargs)
        with run.noise.paused():
            return executor(*args, **kwargs)

    def calc_cond_batch(
        self,
        executor: Any,
        model: Any,
        conds: list[list[dict[str, Any]] | None],
        x: Tensor,
        timestep: Tensor,
        model_options: Options,
    ) -> list[Tensor]:
        """Around the model calls of one evaluation: run as many rows as this step needs."""
        run = _run_of(model_options)
        if run is None:
            return executor(model, conds, x, timestep, model_options)  # type: ignore[no-any-return]
        rows = x.shape[0] // 2 if self.own else x.shape[0]
        evenly = [_fit_cond_rows(cond, rows) for cond in conds]

        def call(x: Tensor, timestep: Tensor, options: Options) -> list[Tensor]:
            return executor(model, evenly, x, timestep, options)  # type: ignore[no-any-return]

        sigma = float(timestep[0])
        active = run.active(sigma)
        if active:
            options = run.patched_options(model_options, conds, active)
            if self.own:
                return call(x, timestep, options)
            return [identity_half(o) for o in call(twice(x), twice(timestep), options)]
        if self.own and not run.needs_text_rows(sigma):
            # Before the first identity step both streams are one; after the last, the text
            # stream is read by nobody.
            half = call(identity_half(x), identity_half(timestep), model_options)
            return [twice(o) for o in half]
        return call(x, timestep, model_options)


def apply_identity(
    model: ModelPatcher,
    adapter: LoadedAdapter,
    identity: Identity,
    *,
    strength: float = 1.0,
    options: StreamOptions | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    mask: Tensor | None = None,
) -> ModelPatcher:
    """A clone of ``model`` in which ``identity`` speaks; ``model`` itself is untouched.

    On a model that already has an identity this adds a second one to the same two streams.
    ``mask`` is ``[1 or batch, H, W]``. ``strength`` 0 adds nothing.

    Raises ``NotSDXLError``, ``ModelMismatchError``, ``IdentityMismatchError``, ``OptionError``,
    and ``StreamConflictError`` where an earlier Apply wants other stream options.
    """
    options = options or StreamOptions()
    layers = model_layers(model)
    config = adapter.adapter.config
    check_layers(adapter.adapter.widths, config.context_width, layers)
    check_identity(config, identity)
    new = AppliedIdentity(
        adapter=adapter,
        identity=identity,
        strength=strength,
        start_percent=start_percent,
        end_percent=end_percent,
        mask=mask,
    )
    patched = model.clone()
    if strength == 0.0:
        return patched
    before = streams_of(model)
    if before is not None and before.options != options:
        raise StreamConflictError(
            "All Apply nodes on one model share one text stream and one identity stream, so "
            "mixing, style, style_strength, merge_text and text_stream must agree. Already set: "
            f"{before.options}; this node: {options}. Set them equal."
        )
    streams = (
        replace(before, applied=(*before.applied, new))
        if before
        else TwoStreams(applied=(new,), options=options, layers=layers)
    )
    for kind, wrapper in streams.wrappers().items():
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    loaded = {id(a.adapter): a.adapter.patcher for a in streams.applied}
    patched.set_additional_models(KEY, list(loaded.values()))
    return patched


def streams_of(model: ModelPatcher) -> TwoStreams | None:
    """The identities a model carries, if any."""
    for wrapper in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(KEY, []):
        return wrapper.__self__  # type: ignore[no-any-return]
    return None


def model_layers(model: ModelPatcher) -> tuple[CrossAttentionLayer, ...]:
    """The cross-attention layers of a loaded model. Raises ``NotSDXLError``."""
    unet = getattr(model.model, "diffusion_model", None)
    if unet is None:
        raise NotSDXLError(f"Expected an SDXL MODEL, got {type(model.model).__name__}.")
    # Sizes come from the modules: quantised weights hide theirs.
    shapes = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in unet.named_modules()
        if hasattr(module, "out_features") and hasattr(module, "in_features")
    }
    names = {name: () for name in unet.state_dict()}
    return layers_from_ldm({**names, **shapes})


# --- one sampling run ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What the attention patches of one set of model calls need to know."""

    active: tuple[int, ...]
    """Indices into ``TwoStreams.applied``."""
    roles: tuple[bool, ...]
    """By cond index: True where the cond is negative and gets the null identity."""


class Run:
    """State of one sampling run: cached tokens and K/V, time ranges, roles of the conds."""

    def __init__(self, streams: TwoStreams, guider: Any, noise_shape: Sequence[int]) -> None:
        self.streams = streams
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
        self.begun = False
        self._tokens: dict[tuple[int, bool], Tensor] = {}
        self._key_values: dict[tuple[int, bool, str], tuple[Tensor, Tensor]] = {}
        self._masks: dict[Any, Tensor] = {}
        self._patches: dict[Any, dict[str, dict[Any, AttentionPatch]]] = {}
        self._areas: dict[Any, Sequence[int]] | None = None
        self._warned: set[str] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Run:
        return self

    def close(self) -> None:
        """Free everything; the guider may outlive the run in a user's hands."""
        self.guider = None
        for cache in (self._tokens, self._key_values, self._masks, self._patches):
            cache.clear()

    def active(self, sigma: float) -> tuple[int, ...]:
        """Identities that speak at this noise level."""
        active = tuple(i for i, (start, end) in enumerate(self.ranges) if end <= sigma <= start)
        self.begun = self.begun or bool(active)
        return active

    def needs_text_rows(self, sigma: float) -> bool:
        """Whether an identity spoke before and one may speak again."""
        return self.begun and any(end <= sigma for _, end in self.ranges)

    def is_negative(self, index: int, cond: list[dict[str, Any]] | None) -> bool:
        """A cond list's role by its first entry: the host appends copies of the other side's."""
        if cond and cond[0].get("uuid") in self.negative:
            return self.negative[cond[0]["uuid"]]
        return index == 1

    def patched_options(
        self,
        model_options: Options,
        conds: list[list[dict[str, Any]] | None],
        active: tuple[int, ...],
    ) -> Options:
        """A copy of the options whose attention patches run the two streams."""
        call = _Call(
            active=active, roles=tuple(self.is_negative(i, c) for i, c in enumerate(conds))
        )
        transformer = model_options["transformer_options"]
        others = transformer.get("patches_replace", {})
        ours = self._patches_for(call, others)
        merged = {**others, **{k: {**others.get(k, {}), **p} for k, p in ours.items()}}
        return {**model_options, "transformer_options": {**transformer, "patches_replace": merged}}

    def _patches_for(
        self, call: _Call, others: dict[str, dict[Any, AttentionPatch]]
    ) -> dict[str, dict[Any, AttentionPatch]]:
        """Our patches, the same objects at each step so that compiled models do not recompile."""
        present = tuple(
            (k, b, id(p)) for k in ("attn1", "attn2") for b, p in others.get(k, {}).items()
        )
        key = (call, present)
        if key not in self._patches:
            self._patches[key] = {
                "attn1": {
                    layer.block: partial(self.self_attention, _other(others, "attn1", layer.block))
                    for layer in self.streams.layers
                },
                "attn2": {
                    layer.block: partial(
                        self.cross_attention, call, layer, _other(others, "attn2", layer.block)
                    )
                    for layer in self.streams.layers
                },
            }
        return self._patches[key]

    # --- attention patches, called by ComfyUI's transformer blocks ---

    def self_attention(
        self, other: AttentionPatch | None, q: Tensor, k: Tensor, v: Tensor, extra: Options
    ) -> Tensor:
        """attn1: text rows plain, identity rows mixed (Eq. 5)."""
        if other is not None:
            # Its result need not be attention at all (PAG returns v), so it cannot be given
            # the doubled keys; each stream keeps to itself in this block.
            self._warn_once(other)
            return other(q, k, v, extra)
        chunks = len(extra["cond_or_uncond"])
        return two_stream_self_attention(q, k, v, chunks, self.streams.options, _kernel(extra))

    def cross_attention(
        self,
        call: _Call,
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
        text_out = kernel(q, k, v) if other is None else other(q, k, v, extra)
        if text_out.shape != q.shape:
            raise PatchConflictError(
                f"{_name(other)} replaced the cross-attention of {layer.path} and returned shape "
                f"{list(text_out.shape)}; expected {list(q.shape)}. It cannot run together with "
                "Infinite-ID; bypass one of the two."
            )

        def terms(chunk: int, q: Tensor) -> list[IdentityTerm]:
            return self._terms(call, layer.path, conds[chunk], chunk, q, extra)

        options = self.streams.options
        return two_stream_cross_attention(q, k, v, text_out, len(conds), terms, options, kernel)

    def _terms(
        self, call: _Call, path: str, cond: int, chunk: int, q: Tensor, extra: Options
    ) -> list[IdentityTerm]:
        null = call.roles[cond] if cond < len(call.roles) else cond == 1
        terms = []
        for index in call.active:
            applied = self.streams.applied[index]
            key, value = self.key_value(index, path, null, q)
            rows = (q.shape[0], -1, -1)
            weights = None if null else applied.adapter.adapter.token_weight(applied.identity)
            terms.append(
                IdentityTerm(
                    key=key.expand(rows),
                    value=value.expand(rows),
                    strength=applied.strength,
                    token_weight=weights,
                    mask=self.mask(index, chunk, q, extra),
                )
            )
        return terms

    # --- caches ---

    def key_value(self, index: int, path: str, null: bool, like: Tensor) -> tuple[Tensor, Tensor]:
        """K'_id, V'_id ``[1, M, width]`` of one layer, projected once per run."""
        key = (index, null, path)
        if key not in self._key_values:
            pair = self.streams.applied[index].adapter.adapter.key_value(path)
            k, v = pair(self.tokens(index, null, like.device))
            self._key_values[key] = (k.to(like.dtype), v.to(like.dtype))
        return self._key_values[key]

    def tokens(self, index: int, null: bool, device: torch.device) -> Tensor:
        """c_id ``[1, M, C]`` float32 (Eq. 4)."""
        key = (index, null)
        if key not in self._tokens:
            applied = self.streams.applied[index]
            identity = applied.identity
            face, clip = null_features(identity) if null else (identity.face, identity.clip)
            to_device = partial(torch.Tensor.to, device=device, dtype=torch.float32)
            self._tokens[key] = applied.adapter.adapter.tokens(to_device(face), to_device(clip))
        return self._tokens[key]

    def mask(self, index: int, chunk: int, q: Tensor, extra: Options) -> Tensor | None:
        """An identity's mask at this layer's resolution, ``[1 or rows, N, 1]``."""
        mask = self.streams.applied[index].mask
        if mask is None:
            return None
        height, width = extra["original_shape"][-2:]
        uuids = extra.get("uuids") or ()
        area = self.areas().get(uuids[chunk]) if chunk < len(uuids) else None
        window = getattr(extra.get("context_window"), "index_list", None)
        key = (index, q.shape[:2], height, width, str(area), str(window))
        if key not in self._masks:
            if window is not None and mask.shape[0] > 1:
                mask = mask[window]
            mask = mask.to(device=q.device, dtype=torch.float32)
            if area is not None:
                mask = _cut_to_area(mask, area, (height, width), self._canvas())
            tokens = mask_tokens(mask, (height, width), q.shape[1])
            self._masks[key] = _fit_rows(tokens, q.shape[0]).to(q.dtype)
        return self._masks[key]

    def areas(self) -> dict[Any, Sequence[int]]:
        """Area (sizes, then offsets, in latent pixels) of each area cond, by the cond's uuid."""
        if self._areas is None:  # first asked for in a model call, when the host has resolved them
            conds = [c for cs in self.guider.conds.values() for c in cs]
            self._areas = {c["uuid"]: c["area"] for c in conds if c.get("area") is not None}
        return self._areas

    def _canvas(self) -> Size:
        return self.noise.shape[-2], self.noise.shape[-1]

    def _warn_once(self, other: AttentionPatch) -> None:
        name = _name(other)
        if name not in self._warned:
            self._warned.add(name)
            _log.warning(
                "Infinite-ID: %s replaces self-attention in some blocks; there the identity "
                "stream does not read the text stream.",
                name,
            )


class _PairedWindows:
    """Context windows over the batch dimension, given pairs of rows instead of both streams.

    The streams travel side by side in the channels while the host cuts its windows.
    """

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def should_use_context(
        self, model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Options
    ) -> bool:
        return bool(
            self.handler.should_use_context(
                model, conds, identity_half(x), identity_half(timestep), model_options
            )
        )

    def execute(
        self,
        calc: Callable[..., list[Tensor]],
        model: Any,
        conds: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: Options,
    ) -> list[Tensor]:
        def calc_pairs(
            model: Any, conds: Any, x: Tensor, timestep: Tensor, model_options: Options
        ) -> list[Tensor]:
            out = calc(model, conds, _unpack(x), twice(timestep), model_options)
            return [_pack(o) for o in out]

        out = self.handler.execute(
            calc_pairs, model, conds, _pack(x), identity_half(timestep), model_options
        )
        return [_unpack(o) for o in out]


# --- rows ------------------------------------------------------------------------------------


def _pack(x: Tensor) -> Tensor:
    """``[2b, c, ...]`` -> ``[b, 2c, ...]``."""
    return torch.cat(x.chunk(2), dim=1)


def _unpack(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, dim=1))


def _fit_rows(x: Tensor, rows: int) -> Tensor:
    """What the host would do to ``rows`` rows, done before they are doubled."""
    if x.shape[0] in (1, rows):
        return x
    fitted: Tensor = comfy.utils.repeat_to_batch_size(x, rows)
    return fitted


def _fit_cond_rows(cond: list[dict[str, Any]] | None, rows: int) -> list[dict[str, Any]] | None:
    """Per-row conditioning of another batch size, fitted so that both streams get the same."""
    if cond is None:
        return None
    return [_fit_one_cond(c, rows) for c in cond]


def _fit_one_cond(cond: dict[str, Any], rows: int) -> dict[str, Any]:
    fitted = dict(cond)
    if isinstance(cond.get("mask"), Tensor):
        fitted["mask"] = cond["mask"][:rows]
    if "model_conds" in cond:
        fitted["model_conds"] = {
            k: _fit_model_cond(v, rows) for k, v in cond["model_conds"].items()
        }
    return fitted


def _fit_model_cond(value: Any, rows: int) -> Any:
    inner = getattr(value, "cond", None)
    if not isinstance(inner, Tensor) or inner.ndim == 0 or inner.shape[0] in (1, rows):
        return value
    return value._copy_with(comfy.utils.repeat_to_batch_size(inner, rows))


# --- the host's ways -------------------------------------------------------------------------


def _run_of(model_options: Options) -> Run | None:
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


def _identity_preview(callback: Callable[..., None]) -> Callable[..., None]:
    def identity_only(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
        callback(step, identity_half(denoised), identity_half(x), total)

    return identity_only


def _other(
    others: dict[str, dict[Any, AttentionPatch]], kind: str, block: BlockKey
) -> AttentionPatch | None:
    """Another pack's patch for a block: with the transformer's index, else for all of them."""
    patches = others.get(kind, {})
    return patches.get(block, patches.get(block[:2]))


def _name(patch: Any) -> str:
    inner = getattr(patch, "func", patch)
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return f"{getattr(inner, '__module__', '?')}.{name}"


def _cut_to_area(mask: Tensor, area: Sequence[int], size: Size, canvas: Size) -> Tensor:
    """The part of a picture mask that lies in an area cond: ``[m, H, W]`` -> ``[m, *size]``."""
    top, left = area[len(area) // 2 :][-2:]
    on_canvas = interpolate(mask[:, None], size=canvas, mode="bilinear")[:, 0]
    return on_canvas[:, top : top + size[0], left : left + size[1]]
