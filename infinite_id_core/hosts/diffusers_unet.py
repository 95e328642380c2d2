"""The two streams on diffusers' SDXL UNet: training, previews, generation without ComfyUI.

The attention functions are those of ``attention.py``, as in ``host_comfyui``; the sampler is
k-diffusion's Euler on SDXL's noise levels, as in ComfyUI, so that both hosts give the same
picture (``tests/host/test_parity_hosts.py``).

Processors are plain objects that refer to the adapter. Were they modules, diffusers would register
the adapter inside the UNet: ``unet.to(bfloat16)`` would then cast trainable weights, and saving
either would drop or double them. diffusers itself is not imported here.

Rows of a call: ``n`` prompts side by side, each with its text rows followed by its identity rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..errors import OptionError
from ..method.adapter import Adapter, KeyValue, check_identity, check_layers
from ..method.attention import (
    IdentityTerm,
    Kernel,
    StreamOptions,
    identity_attention,
    merged_cross_attention,
)
from ..method.streams import (
    IdentityPlacement,
    identity_half,
    mask_tokens,
    two_stream_cross_attention,
    two_stream_self_attention,
)
from ..sdxl.layers import CrossAttentionLayer, layers_from_diffusers
from ..sdxl.schedule import SCHEDULER, TIMESTEPS, NoiseSchedule, Scheduler

# In training nothing aligns the identity's keys and values to a text's: there is none.
_PLAIN = StreamOptions(mixing="off", style="off")

NegativeIdentity = Literal["null", "none"]
NEGATIVE_IDENTITY: tuple[NegativeIdentity, ...] = get_args(NegativeIdentity)

Processor = Callable[..., Tensor]
Progress = Callable[[int, int, Tensor], None]


# --- the UNet --------------------------------------------------------------------------------


def unet_layers(unet: Any) -> tuple[CrossAttentionLayer, ...]:
    """The cross-attention layers of a ``UNet2DConditionModel``. Raises ``NotSDXLError``."""
    return layers_from_diffusers({name: p.shape for name, p in unet.named_parameters()})


def text_projections(unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The frozen text K/V weights by layer path, for ``Adapter.copy_text_projections``."""
    attentions = ((layer.path, unet.get_submodule(layer.path).attn2) for layer in unet_layers(unet))
    return {path: (attn.to_k.weight, attn.to_v.weight) for path, attn in attentions}


@contextmanager
def processors(unet: Any, replaced: Mapping[str, Processor]) -> Iterator[None]:
    """``unet`` with other attention processors; the original ones are back afterwards.

    ``replaced`` maps names of ``unet.attn_processors``; the rest stays. ``set_attn_processor``
    empties the dict it is given, hence the copies.
    """
    before = dict(unet.attn_processors)
    unet.set_attn_processor({**before, **replaced})
    try:
        yield
    finally:
        unet.set_attn_processor(before)


def sdpa(heads: int) -> Kernel:
    """Eq. 2 by torch's ``scaled_dot_product_attention`` for ``heads`` heads."""

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)  # BMC -> BHMc

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mask = None if bias is None else bias.unsqueeze(1)
        out: Tensor = scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
        return out.transpose(1, 2).flatten(2)

    return attend


def _out(attn: Any, hidden: Tensor) -> Tensor:
    """The output projection of a diffusers ``Attention``."""
    for module in attn.to_out:
        hidden = module(hidden)
    return hidden


def _no_mask(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        raise OptionError(
            "The two streams take no attention mask; give prompts of their full length."
        )


# --- training --------------------------------------------------------------------------------


class IdentityCrossAttention:
    """attn2 while training: Attn(Q, K'_id, V'_id), no text (3.2).

    The UNet's ``encoder_hidden_states`` is c_id ``[B, M, C]``. With ``text_tokens`` > 0 it is
    [text; c_id] and the text attention stays on: the paper's entangled ablation.
    """

    def __init__(self, pair: KeyValue, text_tokens: int = 0) -> None:
        self.pair = pair
        self.text_tokens = text_tokens

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``[B, N, C]`` -> ``[B, N, C]``, as diffusers calls it."""
        _no_mask(attention_mask)
        text, identity = encoder_hidden_states.tensor_split([self.text_tokens], dim=1)
        q, kernel = attn.to_q(hidden_states), sdpa(attn.heads)
        k, v = self.pair(identity)
        term = IdentityTerm(key=k.to(q.dtype), value=v.to(q.dtype))
        if self.text_tokens:
            k_t, v_t = attn.to_k(text), attn.to_v(text)
            out = merged_cross_attention(q, [term], k_t, v_t, kernel(q, k_t, v_t), _PLAIN, kernel)
        else:
            out = identity_attention(q, term, term.key, term.value, _PLAIN, kernel)
        return _out(attn, out)


@contextmanager
def identity_training(unet: Any, adapter: Adapter, *, text_tokens: int = 0) -> Iterator[None]:
    """``unet`` with its text attention replaced by the adapter's (see the processor's docstring).

    Gradients flow into ``adapter``; whether the UNet learns is the caller's ``requires_grad_``.
    Raises ``NotSDXLError``, ``ModelMismatchError``.
    """
    layers = unet_layers(unet)
    check_layers(adapter.widths, adapter.config.context_width, layers)
    with processors(
        unet,
        {
            f"{layer.path}.attn2.processor": IdentityCrossAttention(
                adapter.key_value(layer.path), text_tokens
            )
            for layer in layers
        },
    ):
        yield


# --- inference -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """One sampling run: DDIM without noise, which is Euler in these variables."""

    steps: int = 30
    guidance: float = 5.0
    """Classifier-free guidance; 1 runs the positive prompt alone."""
    scheduler: Scheduler = "normal"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TIMESTEPS:
            raise OptionError(f"steps must lie in [1, {TIMESTEPS}], got {self.steps}.")
        if self.scheduler not in SCHEDULER:
            raise OptionError(f"scheduler must be one of {SCHEDULER}, got {self.scheduler!r}.")


@dataclass(frozen=True, kw_only=True)
class NegativePass:
    """What the paper leaves open about the negative prompt's pass; the defaults are the nodes'."""

    identity: NegativeIdentity = "null"
    """The null identity of training, or none: the text attention alone."""
    mixing: bool = True
    """Whether its identity stream reads its text stream's self-attention (Eq. 5)."""

    def __post_init__(self) -> None:
        if self.identity not in NEGATIVE_IDENTITY:
            raise OptionError(
                f"identity must be one of {NEGATIVE_IDENTITY}, got {self.identity!r}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """One prompt as SDXL's UNet reads it."""

    context: Tensor
    """Text tokens ``[1 or b, T, C]``."""
    pooled: Tensor
    """Pooled text ``[1 or b, P]``."""

    def rows(self, count: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Context and pooled text repeated to ``count`` rows (whole blocks of their own rows)."""
        context, pooled = (
            part.to(like).repeat(count // part.shape[0], *[1] * (part.ndim - 1))
            for part in (self.context, self.pooled)
        )
        return context, pooled


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedIdentity(IdentityPlacement):
    """An identity, where it speaks, and the adapter that reads it, on the UNet's device."""

    adapter: Adapter

    def __post_init__(self) -> None:
        super().__post_init__()
        check_identity(self.adapter, self.identity)


def default_size_ids(noise: Tensor) -> tuple[int, ...]:
    """SDXL's ids of an uncropped picture of the latent's size: height, width, 0, 0, h, w."""
    height, width = (8 * side for side in noise.shape[-2:])
    return height, width, 0, 0, height, width


@torch.no_grad()
def sample(
    unet: Any,
    applied: Sequence[AppliedIdentity],
    positive: Prompt,
    negative: Prompt | None,
    noise: Tensor,
    *,
    latent: Tensor | None = None,
    options: StreamOptions | None = None,
    negative_pass: NegativePass | None = None,
    sampling: SamplingOptions | None = None,
    schedule: NoiseSchedule | None = None,
    size_ids: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents ``[b, 4, h, w]`` of one guided run from ``noise`` of that shape (unit variance).

    ``latent`` is what the noise is laid over (default: nothing). ``size_ids`` are SDXL's six
    (original height, width, crop top, left, target height, width). Identities of strength 0 are
    left out; without any the run is plain SDXL. ``progress(step, steps, denoised)`` is called
    after each step. The UNet's processors are its own again afterwards, whatever happens.

    Raises ``OptionError``, ``NotSDXLError``, ``ModelMismatchError``.
    """
    options, sampling = options or StreamOptions(), sampling or SamplingOptions()
    schedule = schedule or NoiseSchedule()
    if negative is None and sampling.guidance != 1.0:
        raise OptionError("Guidance other than 1 needs a negative prompt.")
    latent = torch.zeros_like(noise) if latent is None else latent
    sigmas = schedule.run_sigmas(sampling.scheduler, sampling.steps)
    x = schedule.start(noise.float(), latent.float(), sigmas[0])
    prompts = [positive]
    if negative is not None and sampling.guidance != 1.0:
        prompts.insert(0, negative)
    run = _Run(
        unet=unet,
        applied=tuple(a for a in applied if a.strength > 0.0),
        prompts=prompts,
        options=options,
        negative_pass=negative_pass or NegativePass(),
        schedule=schedule,
        guidance=sampling.guidance,
        size_ids=tuple(size_ids or default_size_ids(noise)),
        canvas=(noise.shape[-2], noise.shape[-1]),
    )
    with run.installed():
        return _euler(run, x, sigmas, progress)


def _euler(run: _Run, x: Tensor, sigmas: Tensor, progress: Progress | None) -> Tensor:
    doubled = bool(run.applied) and run.options.text_stream == "own"
    x = torch.cat([x, x]) if doubled else x
    steps = len(sigmas) - 1
    for i in range(steps):
        sigma, following = sigmas[i].to(x.device), sigmas[i + 1].to(x.device)
        clean = run.denoise(x, sigma)
        x = x + (x - clean) / sigma * (following - sigma)
        if progress is not None:
            progress(i + 1, steps, identity_half(clean) if doubled else clean)
    return identity_half(x) if doubled else x


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What the processors need to know about one UNet call."""

    active: tuple[int, ...]
    """Indices into ``applied``."""
    null: tuple[bool, ...]
    """By prompt of this call: True where it is negative and gets the null identity."""


@dataclass(kw_only=True, eq=False)
class _Run:
    """One sampling run: prompts, identities, and their tokens and K/V, projected once."""

    unet: Any
    applied: tuple[AppliedIdentity, ...]
    prompts: Sequence[Prompt]
    options: StreamOptions
    negative_pass: NegativePass
    schedule: NoiseSchedule
    guidance: float
    size_ids: tuple[int, ...]
    canvas: tuple[int, int]
    call: _Call | None = None
    begun: bool = False
    key_values: dict[tuple[int, bool, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    tokens: dict[tuple[int, bool], Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layers = unet_layers(self.unet)
        for applied in self.applied:
            adapter = applied.adapter
            check_layers(adapter.widths, adapter.config.context_width, layers)
        self.paths = tuple(layer.path for layer in layers)
        self.ranges = [
            tuple(map(self.schedule.sigma_at_percent, (a.start_percent, a.end_percent)))
            for a in self.applied
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The UNet with our processors, if any identity speaks at all."""
        ours: dict[str, Processor] = {}
        for path in self.paths if self.applied else ():
            ours[f"{path}.attn1.processor"] = _SelfAttention(self)
            ours[f"{path}.attn2.processor"] = _CrossAttention(self, path)
        with processors(self.unet, ours):
            yield

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided clean latent of all rows at one noise level."""
        level, own = float(sigma), self.options.text_stream == "own"
        active = tuple(i for i, (s, e) in enumerate(self.ranges) if e <= level <= s)
        self.begun = self.begun or bool(active)
        if active:
            if own:
                return self._guided(x, sigma, active)
            return identity_half(self._guided(torch.cat([x, x]), sigma, active))
        text_needed = self.begun and any(e <= level for _, e in self.ranges)
        if self.applied and own and not text_needed:
            # Before the first identity step both streams are one; after the last, nobody reads
            # the text stream.
            half = self._guided(identity_half(x), sigma, active)
            return torch.cat([half, half])
        return self._guided(x, sigma, active)

    def _guided(self, x: Tensor, sigma: Tensor, active: tuple[int, ...]) -> Tensor:
        clean = self._predictions(x, sigma, active)
        if len(clean) == 1:
            return clean[0]
        negative, positive = clean
        return negative + (positive - negative) * self.guidance

    def _predictions(self, x: Tensor, sigma: Tensor, active: tuple[int, ...]) -> list[Tensor]:
        """The clean latent by prompt; prompts of one length share a UNet call."""
        lengths = {prompt.context.shape[1] for prompt in self.prompts}
        order = list(enumerate(self.prompts))
        groups = [order] if len(lengths) == 1 else [[entry] for entry in order]
        last = len(self.prompts) - 1  # the positive prompt
        clean = []
        for group in groups:
            null = tuple(index != last for index, _ in group)
            self.call = _Call(active=active, null=null) if active else None
            output = self._forward(x, sigma, [prompt for _, prompt in group])
            clean += [self.schedule.denoised(x, part, sigma) for part in output.chunk(len(group))]
        return clean

    def _forward(self, x: Tensor, sigma: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        rows = x.shape[0] * len(prompts)
        like = self.unet.conv_in.weight
        scaled = (x / (sigma**2 + 1.0).sqrt()).to(like.dtype).repeat(len(prompts), 1, 1, 1)
        text = [prompt.rows(x.shape[0], like) for prompt in prompts]
        output = self.unet(
            scaled,
            torch.full((rows,), self.schedule.timestep(sigma.cpu()), device=x.device),
            encoder_hidden_states=torch.cat([context for context, _ in text]),
            added_cond_kwargs={
                "text_embeds": torch.cat([pooled for _, pooled in text]),
                # float32 whatever the UNet is: bfloat16 cannot count to 1000.
                "time_ids": torch.tensor(
                    [self.size_ids], dtype=torch.float32, device=x.device
                ).repeat(rows, 1),
            },
            return_dict=False,
        )[0]
        return cast(Tensor, output.float())

    # --- for the processors ---

    def self_groups(self, call: _Call) -> list[tuple[int, StreamOptions]]:
        """Prompts side by side with the same self-attention: how many, and their options."""
        if self.negative_pass.mixing:
            return [(len(call.null), self.options)]
        alone = replace(self.options, mixing="off")
        return [(1, alone if null else self.options) for null in call.null]

    def terms(self, path: str, null: bool, q: Tensor) -> list[IdentityTerm]:
        """The speaking identities in one layer, for the rows of one prompt."""
        assert self.call is not None
        if null and self.negative_pass.identity == "none":
            return []
        terms = []
        for index in self.call.active:
            applied = self.applied[index]
            key, value = self._key_value(index, null, path, q)
            rows = (q.shape[0], -1, -1)
            weight = None if null else applied.adapter.token_weight(applied.identity)
            terms.append(
                IdentityTerm(
                    key=key.expand(rows),
                    value=value.expand(rows),
                    strength=applied.strength,
                    token_weight=weight,
                    mask=self._mask(index, q),
                )
            )
        return terms

    def _key_value(self, index: int, null: bool, path: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """K'_id, V'_id ``[1, M, width]``."""
        key = (index, null, path)
        if key not in self.key_values:
            k, v = self.applied[index].adapter.key_value(path)(self._tokens(index, null))
            self.key_values[key] = (k.to(like.dtype), v.to(like.dtype))
        return self.key_values[key]

    def _tokens(self, index: int, null: bool) -> Tensor:
        """c_id ``[1, M, C]`` (Eq. 4)."""
        if (index, null) not in self.tokens:
            adapter, identity = self.applied[index].adapter, self.applied[index].identity
            tokens = adapter.null_tokens if null else adapter.tokens
            self.tokens[index, null] = tokens(identity)
        return self.tokens[index, null]

    def _mask(self, index: int, q: Tensor) -> Tensor | None:
        """An identity's mask at this layer's resolution, ``[1 or b, N, 1]``."""
        mask = self.applied[index].mask
        if mask is None:
            return None
        key = (index, q.shape[1])
        if key not in self.masks:
            self.masks[key] = mask_tokens(mask.to(q.device), self.canvas, q.shape[1])
        return self.masks[key].to(q.dtype)


class _SelfAttention:
    """attn1 of the two streams: text rows plain, identity rows mixed (Eq. 5)."""

    def __init__(self, run: _Run) -> None:
        self.run = run

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``[B, N, C]`` -> ``[B, N, C]``, as diffusers calls it."""
        _no_mask(attention_mask)
        q, k, v = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        kernel, call = sdpa(attn.heads), self.run.call
        if call is None:
            return _out(attn, kernel(q, k, v))
        groups = self.run.self_groups(call)
        parts = [x.split([q.shape[0] // len(call.null) * n for n, _ in groups]) for x in (q, k, v)]
        outputs = [
            two_stream_self_attention(q_g, k_g, v_g, chunks, options, kernel)
            for q_g, k_g, v_g, (chunks, options) in zip(*parts, groups, strict=True)
        ]
        return _out(attn, torch.cat(outputs))


class _CrossAttention:
    """attn2 of the two streams: text rows plain, identity rows merged (Eq. 6, 7)."""

    def __init__(self, run: _Run, path: str) -> None:
        self.run = run
        self.path = path

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``[B, N, C]`` -> ``[B, N, C]``, as diffusers calls it."""
        _no_mask(attention_mask)
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        kernel, call = sdpa(attn.heads), self.run.call
        text_out = kernel(q, k, v)
        if call is None:
            return _out(attn, text_out)

        def terms(chunk: int, q: Tensor) -> list[IdentityTerm]:
            return self.run.terms(self.path, call.null[chunk], q)

        chunks, options = len(call.null), self.run.options
        out = two_stream_cross_attention(q, k, v, text_out, chunks, terms, options, kernel)
        return _out(attn, out)
