"""The two streams on diffusers' SDXL UNet: previews, generation and evaluation without ComfyUI.

The run and the attention are those of ``method``, as in ComfyUI; the sampler is k-diffusion's Euler
on SDXL's noise levels, so that both hosts give the same picture
(``tests/host/test_parity_hosts.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from ..errors import OptionError
from ..method.adapter import Adapter, check_identity, check_layers
from ..method.attention import IdentityTerm, Kernel, StreamOptions
from ..method.low_rank import LowRankRun, LowRankUse
from ..method.placement import IdentityPlacement, mask_tokens
from ..method.rows import (
    Rows,
    cross_attention_over,
    identity_half,
    self_attention_over,
    twice,
)
from ..method.run import IdentityRun
from ..sdxl.schedule import SCHEDULER, TIMESTEPS, NoiseSchedule, Scheduler
from .diffusers_prompt import Prompt as Prompt
from .diffusers_prompt import default_size_ids as default_size_ids
from .diffusers_unet import (
    Processor,
    attention_inputs,
    attention_output,
    no_mask,
    processors,
    sdpa,
    unet_layers,
)

NegativeIdentity = Literal["null", "none"]
NEGATIVE_IDENTITY: tuple[NegativeIdentity, ...] = get_args(NegativeIdentity)
Progress = Callable[[int, int, Tensor], None]


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
class AppliedIdentity(IdentityPlacement):
    """An identity, its place in the run, and the adapter that reads it, on the UNet's device."""

    adapter: Adapter
    low_rank: LowRankUse = LowRankUse()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_identity(self.adapter, self.identity)


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
        applied=[a for a in applied if a.strength > 0.0],
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
    own = run.identities.own
    x = twice(x) if own else x
    steps = len(sigmas) - 1
    for i in range(steps):
        sigma, following = sigmas[i].to(x.device), sigmas[i + 1].to(x.device)
        clean = run.denoise(x, sigma)
        x = x + (x - clean) / sigma * (following - sigma)
        if progress is not None:
            progress(i + 1, steps, identity_half(clean) if own else clean)
    return identity_half(x) if own else x


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What the processors need to know about one UNet call."""

    active: tuple[int, ...]
    """Indices into ``applied``."""
    null: tuple[bool, ...]
    """By prompt of this call: True where it is negative and gets the null identity."""
    rows: Rows


class _Run:
    """One sampling run: the people, the prompts, and the UNet's calls."""

    def __init__(
        self,
        *,
        unet: Any,
        applied: Sequence[AppliedIdentity],
        prompts: Sequence[Prompt],
        options: StreamOptions,
        negative_pass: NegativePass,
        schedule: NoiseSchedule,
        guidance: float,
        size_ids: tuple[int, ...],
        canvas: tuple[int, int],
    ) -> None:
        layers = unet_layers(unet)
        for one in applied:
            check_layers(one.adapter.widths, one.adapter.config.context_width, layers)
        self.unet = unet
        self.applied = tuple(applied)
        self.prompts = prompts
        self.negative_pass = negative_pass
        self.schedule = schedule
        self.guidance = guidance
        self.size_ids = size_ids
        self.canvas = canvas
        self.identities = IdentityRun(applied, options, schedule.sigma_at_percent)
        self.low_rank = LowRankRun(
            [one.low_rank for one in applied], [one.adapter for one in applied], options
        )
        self.paths = tuple(layer.path for layer in layers)
        self.call: _Call | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The UNet with our processors, as far as anybody takes effect."""
        ours: dict[str, Processor] = {}
        for path in self.paths if self.applied else ():
            if self.identities.two_streams or self.low_rank.all:
                ours[f"{path}.attn1.processor"] = _SelfAttention(self, path)
            ours[f"{path}.attn2.processor"] = _CrossAttention(self, path)
        with processors(self.unet, ours):
            yield

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The guided clean latent of all rows at one noise level."""
        run, level = self.identities, float(sigma)
        active = run.active(level)
        if not run.two_streams or (run.own and active):
            return self._guided(x, sigma, active)
        if active:
            return identity_half(self._guided(twice(x), sigma, active))
        if run.own and not run.needs_text_rows(level):
            # Before the first identity step both streams are one; after the last, nobody reads
            # the text stream.
            return twice(self._guided(identity_half(x), sigma, active))
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
            rows = (Rows.both if self.identities.two_streams else Rows.alone)(len(group))
            self.call = _Call(active=active, null=null, rows=rows) if active else None
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

    def terms(self, path: str, null: bool, q: Tensor) -> list[IdentityTerm]:
        """Those who take effect in one layer, for the people's rows of one prompt."""
        assert self.call is not None
        if null and self.negative_pass.identity == "none":
            return []
        return [
            self.identities.term(
                index,
                path,
                q,
                null=null,
                adapter=self.applied[index].adapter,
                mask=self._mask(index, q),
            )
            for index in self.call.active
        ]

    def changed(self, attention: str, linear: str, y: Tensor, x: Tensor) -> Tensor:
        """``y = layer(x)`` of the UNet's own attention with what low-rank parts add."""
        name = f"{attention}.{linear}"

        def adapter_of(index: int) -> Adapter:
            return self.applied[index].adapter

        everywhere = self.low_rank.added(name, x, self.low_rank.all, adapter_of)
        if everywhere is not None:
            y = y + everywhere
        people = () if self.call is None else self.low_rank.active(self.call.active)
        if self.call is None or not people:
            return y
        return self.low_rank.on_people(name, y, x, self.call.rows, people, adapter_of)

    def _mask(self, index: int, q: Tensor) -> Tensor | None:
        """A person's mask at this layer's resolution, ``[1 or b, N, 1]``."""
        mask = self.applied[index].mask
        if mask is None:
            return None

        def make() -> Tensor:
            return mask_tokens(mask.to(q.device), self.canvas, q.shape[1])

        return self.identities.masked((index, q.shape[1]), make).to(q.dtype)


class _SelfAttention:
    """attn1 of the two streams: text rows plain, identity rows mixed (Eq. 5)."""

    def __init__(self, run: _Run, path: str) -> None:
        self.run = run
        self.name = f"{path}.attn1"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``[B, N, C]`` -> ``[B, N, C]``, as diffusers calls it."""
        no_mask(attention_mask)
        change = partial(self.run.changed, self.name)
        q, k, v = attention_inputs(attn, hidden_states, hidden_states, change)
        out = self._mixed(q, k, v, sdpa(attn.heads))
        return attention_output(attn, out, change)

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel) -> Tensor:
        call, options = self.run.call, self.run.identities.options
        if call is None:
            return kernel(q, k, v)
        if self.run.negative_pass.mixing or not any(call.rows.text):
            return self_attention_over(call.rows, q, k, v, options, kernel)
        alone, one = replace(options, mixing="off"), Rows.both(1)
        parts = zip(*(x.chunk(len(call.null)) for x in (q, k, v)), strict=True)
        outputs = [
            self_attention_over(one, q_p, k_p, v_p, alone if null else options, kernel)
            for (q_p, k_p, v_p), null in zip(parts, call.null, strict=True)
        ]
        return torch.cat(outputs)


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
        no_mask(attention_mask)
        run = self.run
        change = partial(run.changed, f"{self.path}.attn2")
        q, k, v = attention_inputs(attn, hidden_states, encoder_hidden_states, change)
        kernel, call = sdpa(attn.heads), run.call
        text_out = kernel(q, k, v)
        if call is None:
            return attention_output(attn, text_out, change)

        def terms(prompt: int, q: Tensor) -> list[IdentityTerm]:
            return run.terms(self.path, call.null[prompt], q)

        options = run.identities.options
        out = cross_attention_over(call.rows, q, k, v, text_out, terms, options, kernel, attn.heads)
        return attention_output(attn, out, change)
