"""One sampling run inside ComfyUI: which rows a model call gets.

Other packs and the host see one stream's rows: ``own`` evaluates a step once for the text
stream and once for the identity stream, each with its own latent, guidance and conditioning, and
``shared`` once. What reaches the model is one call with the rows of both, the text stream's
before the identity stream's in every cond: what the second evaluation will ask for is known in
the first. Where another pack wrapped the model itself, the two are called apart: the first call
writes the text stream's self-attention keys and values down, the second reads them. Where nobody
reads the text stream, the calls are the host's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import PatchConflictError
from ..method.attention import StreamOptions
from ..method.rows import identity_half, twice
from ..method.run import IdentityRun
from ..sdxl.layers import CrossAttentionLayer
from .comfyui_adapter import KEY, AppliedIdentity
from .comfyui_attention import AttentionPatches
from .comfyui_calls import Call, CallState, Record, Step, Streams, TextCall
from .comfyui_others import (
    Options,
    Twins,
    model_wrappers,
    sampler_functions,
    without_model_wrappers,
)
from .comfyui_rows import Conds, HalvedControl, fit_conds, halve_controls, uuids_of
from .mirrored_noise import MirroredNoise

Evaluate = Callable[[Conds, Tensor, Tensor, Options], list[Tensor]]
"""The host's ``calc_cond_batch`` for one model: conds, latent, timestep, options."""


class SamplingRun:
    """State of one sampling run: its people, its model calls, and the roles of the conds."""

    def __init__(
        self,
        applied: Sequence[AppliedIdentity],
        options: StreamOptions,
        layers: Sequence[CrossAttentionLayer],
        guider: Any,
        noise_shape: Sequence[int],
    ) -> None:
        sampling = guider.model_patcher.get_model_object("model_sampling")
        height, width = (int(side) for side in noise_shape[-2:])
        self.rows = noise_shape[0]
        self.noise = MirroredNoise([noise_shape[0] * 2, *noise_shape[1:]])
        # Tokens in float32, whatever a host's layer makes of the weights.
        self.identities = IdentityRun(applied, options, sampling.percent_to_sigma, torch.float32)
        self.state = CallState(guider=guider, rows=self.rows, canvas=(height, width))
        self.patches = AttentionPatches(applied, layers, self.identities, self.state)
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
        self.known_functions: frozenset[int] = frozenset()
        self._step: Step | None = None
        self._controls: dict[int, HalvedControl] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplingRun:
        return self

    @property
    def open(self) -> bool:
        """Whether the run still goes on."""
        return self.state.guider is not None

    @property
    def twins(self) -> Twins:
        """The text stream's copies of other packs' functions."""
        return self.state.twins

    def close(self) -> None:
        """Free everything; the guider may outlive the run in a user's hands."""
        self.state.guider = self.state.record = self._step = None
        self.text_latent = self.text_result = None
        self.state.twins = Twins()
        self.identities.close()
        self.patches.close()
        self._controls.clear()

    def start_text_at(self, latent: Tensor) -> None:
        """The text stream goes on from a latent of its own: from now on the two differ."""
        self.text_latent, self.identities.begun = latent, True

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
        two = bool(self.identities.active(sigma)) or self.identities.needs_text_rows(sigma)
        text, identity = x.chunk(2)
        t = identity_half(timestep) if timestep.shape[0] == x.shape[0] else timestep
        step = Step(text=text, identity=identity, stream="text" if two else "one")
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
        self.state.canvas = (int(x.shape[-2]), int(x.shape[-1]))
        self.state.asked_rows = x.shape[0]
        active = self.identities.active(float(timestep[0]))
        if not self.identities.two_streams:
            if active:
                options = self.patched_options(options, conds, active, rows="one")
            return run(conds, x, timestep, options)
        step = self._step
        if (
            self.identities.own and step is None
        ):  # a guider that goes its own way: both streams' rows
            return self._both(run, conds, x, timestep, options, active)
        if step is not None and step.stream == "one":
            return run(conds, x, timestep, options)
        if step is not None and step.stream == "text":
            return self._text(step, run, conds, x, timestep, options, active)
        if step is None:
            call = TextCall(x=x, asked=[])
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
        step: Step,
        run: Evaluate,
        conds: Conds,
        x: Tensor,
        timestep: Tensor,
        options: Options,
        active: tuple[int, ...],
    ) -> list[Tensor]:
        """The text stream's evaluation; the identity stream's along with it where it is known."""
        call = TextCall(x=x, asked=uuids_of(conds))
        step.calls.append(call)
        wrapped = model_wrappers(options, conds, KEY)
        other = None if wrapped else step.other_stream(x, options, self.rows)
        if other is not None:
            both = self._both(
                run, conds, torch.cat([x, other]), _doubled(timestep, x), options, active
            )
            call.expected = other
            call.identity = [identity_half(out) for out in both]
            return [out[: x.shape[0]] for out in both]
        if wrapped and active:
            call.record, outs = self._recorded(run, conds, x, timestep, options, active)
            return outs
        return run(conds, x, timestep, options)

    def _text_call(self, step: Step, x: Tensor, options: Options) -> TextCall:
        """The text stream's evaluation beside the identity stream's next one."""
        index, step.answered = step.answered, step.answered + 1
        if index < len(step.calls) and step.calls[index].x.shape == x.shape:
            return step.calls[index]
        # The text stream did not ask (another pack answered from memory), or asked otherwise.
        other = step.other_stream(x, options, self.rows)
        return TextCall(x=x if other is None else other, asked=[])

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
        call: TextCall,
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
        self.state.record = record
        try:
            yield
        finally:
            self.state.record = None

    # --- roles ---

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
        rows: Streams = "both",
    ) -> Options:
        """A copy of the options whose attention patches run the two streams, or the only one."""
        roles = tuple(self.is_negative(i, conds) for i in range(len(conds)))
        return self.patches.options(model_options, Call(active=active, roles=roles, rows=rows))


def run_of(model_options: Options) -> SamplingRun | None:
    """The run that these options belong to, while it is open."""
    run = model_options.get("transformer_options", {}).get(KEY)
    return run if isinstance(run, SamplingRun) and run.open else None


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
