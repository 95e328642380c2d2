"""The two streams inside ComfyUI's SDXL.

``apply_identity`` adds sampling wrappers to a clone of the model and nothing else: the upstream
model keeps its weights, options and patches. At each model call the wrappers install attention
patches into that call's own options, composed with whatever other packs put there before or
after us, so an interrupt or exception leaves nothing behind.

Rows of a model call: ComfyUI lays ``n`` conds side by side, each with the same latent rows. Here
every cond's rows are the text stream's followed by the identity stream's, whatever the split
into calls. ``own`` doubles the rows around the sampler (SAMPLER_SAMPLE), parts them around each
of its evaluations (PREDICT_NOISE) and joins them for the model (CALC_COND_BATCH), so that other
packs' guidance and wrappers see one stream's rows; ``shared`` doubles them for the model alone.
With ``mixing`` off nobody reads the text stream: it has no rows, and only cross-attention is
patched.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..errors import NotSDXLError, StreamConflictError
from ..method.adapter import check_identity, check_layers
from ..method.attention import StreamOptions
from ..method.identity import Identity
from ..method.low_rank import LowRankUse
from ..method.rows import identity_half, twice
from ..sdxl.layers import CrossAttentionLayer, layers_from_ldm
from .comfyui_adapter import KEY, AppliedIdentity, LoadedAdapter
from .comfyui_lora import with_low_rank
from .comfyui_others import Options
from .comfyui_rows import Conds, fit_rows
from .comfyui_run import SamplingRun, run_of
from .text_latents import TextLatents

_log = logging.getLogger(__name__)
_text_latents = TextLatents()


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

    def outer_sample(
        self,
        executor: Any,
        noise: Tensor,
        latent_image: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Around the whole run: open it, hand the text stream's latent on, close it at any end."""
        guider = executor.class_obj
        run = SamplingRun(self.applied, self.options, self.layers, guider, noise.shape)
        options = guider.model_options  # ComfyUI's copy for this run only
        transformer = options["transformer_options"]
        wrappers = _placed(transformer.get("wrappers", {}))
        options["transformer_options"] = {**transformer, KEY: run, "wrappers": wrappers}
        if run.identities.own:
            self._go_on(run, noise, latent_image)
        try:
            result: Tensor = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            if run.text_result is not None and float(sigmas[-1]) > 0.0:
                _text_latents.keep(result, run.text_result)
        finally:
            run.close()
        return result

    def _go_on(self, run: SamplingRun, noise: Tensor, latent_image: Tensor) -> None:
        """Where this run continues another one, the text stream continues its own."""
        if bool(torch.count_nonzero(latent_image)):
            text = _text_latents.find(latent_image)
            if text is not None:
                run.start_text_at(text)
            elif not torch.count_nonzero(noise):
                _log.warning(
                    "Infinite-ID: this sampler goes on with a latent whose text stream is not "
                    "known any more; both streams start from the person's. Run the sampler before "
                    "it again, or set text_stream to shared."
                )

    def prepare_sampling(
        self, executor: Any, model: Any, noise_shape: Sequence[int], *args: Any, **kwargs: Any
    ) -> Any:
        """Tell the host the true batch of a model call, which two streams double later."""
        rows = noise_shape[0] * (1 if self.options.mixing == "off" else 2)
        return executor(model, [rows, *noise_shape[1:]], *args, **kwargs)

    def sampler_sample(
        self,
        executor: Any,
        guider: Any,
        sigmas: Tensor,
        extra_args: Options,
        callback: Callable[[dict[str, Any]], None] | None,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Around the sampler: ``own`` gives it the rows of both streams, with the same draws."""
        run = run_of(extra_args["model_options"])
        if run is None or not run.identities.own:
            rest = (noise, latent_image, denoise_mask, *args)
            return executor(guider, sigmas, extra_args, callback, *rest, **kwargs)  # type: ignore[no-any-return]
        model = guider.inner_model
        functions = extra_args["model_options"].get("sampler_post_cfg_function", [])
        run.known_functions = frozenset(map(id, functions))
        if latent_image is not None:
            text = latent_image
            if run.text_latent is not None:
                text = model.process_latent_in(run.text_latent.to(latent_image))
            latent_image = torch.cat([text, latent_image])
        if denoise_mask is not None:
            denoise_mask = twice(fit_rows(denoise_mask, run.rows))
        if callback is not None:
            callback = _identity_preview(callback, run)
        rows = (twice(noise), latent_image, denoise_mask)
        with run.noise:
            result = executor(guider, sigmas, extra_args, callback, *rows, *args, **kwargs)
        run.text_result = model.process_latent_out(result[: run.rows].to(torch.float32))
        return identity_half(result)

    def predict_noise(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: Options | None = None,
        seed: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Around each evaluation of the sampler: one of the guider's for each stream."""
        run = run_of(model_options or {})
        if run is None or not run.identities.own:
            return executor(x, timestep, model_options, seed, *args, **kwargs)  # type: ignore[no-any-return]

        def predict(
            x: Tensor, timestep: Tensor, options: Options, seed: int | None, text: bool
        ) -> Tensor:
            host = executor
            if text:
                host = copy(executor)
                host.wrappers = [run.twins.of(w) for w in executor.wrappers]
            return host(x, timestep, options, seed, *args, **kwargs)  # type: ignore[no-any-return]

        with run.noise.paused():
            return run.each_stream(predict, x, timestep, model_options or {}, seed)

    def calc_cond_batch(
        self,
        executor: Any,
        model: Any,
        conds: Conds,
        x: Tensor,
        timestep: Tensor,
        model_options: Options,
    ) -> list[Tensor]:
        """Around the model calls of one evaluation: run as many rows as this step needs."""
        run = run_of(model_options)
        if run is None:
            return executor(model, conds, x, timestep, model_options)  # type: ignore[no-any-return]
        return run.evaluate(partial(executor, model), conds, x, timestep, model_options)


def _placed(wrappers: dict[str, dict[Any, list[Any]]]) -> dict[str, dict[Any, list[Any]]]:
    """Our wrappers where each has to stand, wherever Apply was in the graph.

    Around every evaluation outermost, so that the others meet one stream's rows; around the
    sampler and the model calls innermost, for the same reason.
    """
    placed = dict(wrappers)
    for kind, by_key in wrappers.items():
        ours = {key: functions for key, functions in by_key.items() if key == KEY}
        others = {key: functions for key, functions in by_key.items() if key != KEY}
        first = kind == WrappersMP.PREDICT_NOISE
        placed[kind] = {**ours, **others} if first else {**others, **ours}
    return placed


def _identity_preview(callback: Callable[..., None], run: SamplingRun) -> Callable[..., None]:
    """A sampler's callback that sees the person's rows, and whose random draws are its own."""

    def half(value: Any) -> Any:
        doubled = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 2 * run.rows
        return identity_half(value) if doubled else value

    def identity_only(*args: Any, **kwargs: Any) -> None:
        with run.noise.paused():
            callback(*map(half, args), **{key: half(value) for key, value in kwargs.items()})

    return identity_only


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
    low_rank: LowRankUse | None = None,
) -> ModelPatcher:
    """A clone of ``model`` in which ``identity`` takes effect; ``model`` itself is untouched.

    On a model that already has an identity this adds a second one to the same two streams.
    ``mask`` is ``[1 or batch, H, W]``. ``strength`` 0 adds nothing. ``low_rank``: where the LoRA
    of a FaceID file acts; one that acts on all rows becomes a patch of the clone's weights, once
    for each adapter.

    Raises ``NotSDXLError``, ``ModelMismatchError``, ``IdentityMismatchError``, ``OptionError``,
    and ``StreamConflictError`` where an earlier Apply wants other stream options.
    """
    options = options or StreamOptions()
    layers = model_layers(model)
    context_width = adapter.adapter.config.context_width
    check_layers(adapter.adapter.widths, context_width, layers)
    check_identity(adapter.adapter, identity)
    new = AppliedIdentity(
        adapter=adapter,
        identity=identity,
        strength=strength,
        start_percent=start_percent,
        end_percent=end_percent,
        mask=mask,
        low_rank=low_rank or LowRankUse(),
    )
    if strength == 0.0:
        return model.clone()
    before = streams_of(model)
    if before is not None and before.options != options:
        raise StreamConflictError(
            "All Apply nodes on one model share one text stream and one identity stream, so "
            "mixing, style, style_strength, merge_text and text_stream must agree. Already set: "
            f"{before.options}; this node: {options}. Set them equal."
        )
    patched = _with_weights(model, new, before.applied if before else (), options)
    streams = (
        replace(before, applied=(*before.applied, new))
        if before
        else TwoStreams(applied=(new,), options=options, layers=layers)
    )
    for kind, wrapper in streams.wrappers().items():
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    loaded = {id(a.adapter): a.adapter for a in streams.applied}
    carried = [adapter.patcher_for(patched.load_device) for adapter in loaded.values()]
    patched.set_additional_models(KEY, carried)
    return patched


def _with_weights(
    model: ModelPatcher,
    new: AppliedIdentity,
    before: Sequence[AppliedIdentity],
    options: StreamOptions,
) -> ModelPatcher:
    """A clone, with the LoRA of a new identity's adapter in its weights where it acts on all rows
    and is not in them yet."""
    there = any(
        one.adapter is new.adapter and one.low_rank.rows_in(options) == "all" for one in before
    )
    acts = new.low_rank.rows_in(options) == "all" and not there
    if acts:
        model = with_low_rank(model, new.adapter.adapter, new.low_rank.strength)
    return model.clone()


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
