"""The method as plain float64 mathematics, two passes per step, written from the equations.

Nothing of the code under test is used: ComfyUI's UNet (in float64) runs the text stream while
its self-attention keys and values are written down, then runs the identity stream with every
attention computed here. Samplers are written out for a pair of latents.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


def attention(q: Any, k: Any, v: Any, head_width: int) -> torch.Tensor:
    """Eq. 2 for each head."""
    out = []
    for start in range(0, q.shape[-1], head_width):
        part = slice(start, start + head_width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / head_width**0.5
        out.append(scores.softmax(dim=-1) @ v[..., part])
    return torch.cat(out, dim=-1)


def aligned(x: Any, y: Any, style: str) -> torch.Tensor:
    """Eq. 8, its full-AdaIN ablation, or nothing."""
    if style == "off":
        return x
    centred = x - x.mean(dim=1, keepdim=True)
    if style == "adain":
        x_std = (x.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        centred = centred / x_std * (y.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return centred + y.mean(dim=1, keepdim=True)


class TwoPass:
    """eps of both streams at one noise level; ``unet`` is ComfyUI's, in float64."""

    def __init__(
        self,
        unet: Any,
        adapter: Any,
        *,
        head_width: int = 64,
        mixing: str = "mixed",
        style: str = "adain_mean",
        merge_text: bool = True,
        strength: float = 1.0,
    ) -> None:
        self.unet = unet
        self.head_width = head_width
        self.mixing, self.style = mixing, style
        self.merge_text, self.strength = merge_text, strength
        self.state = {k: v.double() for k, v in adapter.state_dict().items()}
        self.face_tokens = adapter.config.face_tokens
        self.blocks = [m for m in unet.modules() if type(m).__name__ == "BasicTransformerBlock"]

    def tokens(self, face: Any, clip: Any) -> torch.Tensor:
        """Eq. 4."""
        return torch.cat([self._map("clip_mapper", clip), self._map("face_mapper", face)], dim=1)

    def _map(self, name: str, x: Any) -> torch.Tensor:
        s = self.state
        x = x.double() @ s[f"{name}.proj_in.weight"].T + s[f"{name}.proj_in.bias"]
        x = 0.5 * x * (1 + torch.erf(x / 2**0.5))
        x = x @ s[f"{name}.proj_out.weight"].T + s[f"{name}.proj_out.bias"]
        if name == "face_mapper":
            x = x.reshape(x.shape[0], self.face_tokens, -1)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * s[f"{name}.norm.weight"] + s[f"{name}.norm.bias"]

    def plain(self, x: Any, t: Any, context: Any, y: Any) -> torch.Tensor:
        """eps of SDXL itself."""
        rows = x.shape[0]
        return self.unet(x, t.expand(rows), context.expand(rows, -1, -1), y.expand(rows, -1))

    def __call__(
        self, text: Any, identity: Any, t: Any, context: Any, y: Any, c_id: Any, paths: list[str]
    ) -> Pair:
        rows = text.shape[0]
        t, context, y = t.expand(rows), context.expand(rows, -1, -1), y.expand(rows, -1)
        kept: dict[int, Pair] = {}
        with self._self_attention(lambda i, q, k, v: self._keep(kept, i, q, k, v)):
            eps_text = self.unet(text, t, context, y)

        def mixed(i: int, q: Any, k: Any, v: Any) -> torch.Tensor:  # Eq. 5, 7
            k_t, v_t = kept[i]
            if self.mixing == "mutual":
                k, v = k_t, v_t
            elif self.mixing == "mixed":
                k = torch.cat([aligned(k, k_t, self.style), k_t], dim=1)
                v = torch.cat([aligned(v, v_t, self.style), v_t], dim=1)
            return attention(q, k, v, self.head_width)

        def merged(i: int, q: Any, k_t: Any, v_t: Any) -> torch.Tensor:  # Eq. 6, 7
            path = paths[i]
            k = c_id @ self.state[f"layers.{path}.to_k.weight"].T
            v = c_id @ self.state[f"layers.{path}.to_v.weight"].T
            k, v = k.expand(rows, -1, -1), v.expand(rows, -1, -1)
            k, v = aligned(k, k_t, self.style), aligned(v, v_t, self.style)
            out = self.strength * attention(q, k, v, self.head_width)
            return out + attention(q, k_t, v_t, self.head_width) * self.merge_text

        with self._self_attention(mixed), self._cross_attention(merged):
            eps_identity = self.unet(identity, t, context, y)
        return eps_text, eps_identity

    def _keep(self, kept: dict[int, Pair], i: int, q: Any, k: Any, v: Any) -> torch.Tensor:
        kept[i] = (k, v)
        return attention(q, k, v, self.head_width)

    @contextmanager
    def _self_attention(self, compute: Any) -> Any:
        with self._replaced("attn1", compute):
            yield

    @contextmanager
    def _cross_attention(self, compute: Any) -> Any:
        with self._replaced("attn2", compute):
            yield

    @contextmanager
    def _replaced(self, which: str, compute: Any) -> Any:
        def forward(module: Any, i: int) -> Any:
            def run(x: Any, context: Any = None, **_: Any) -> torch.Tensor:
                context = x if context is None else context
                q, k, v = module.to_q(x), module.to_k(context), module.to_v(context)
                return module.to_out(compute(i, q, k, v))

            return run

        modules = [getattr(block, which) for block in self.blocks]
        for i, module in enumerate(modules):
            module.forward = forward(module, i)
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def sample(name: str, denoise: Any, x: Pair, sigmas: list[float], draw: Any) -> Pair:
    """Euler, Heun, DPM-Solver++(2M) and Euler ancestral for a pair of latents in step."""
    before: Pair | None = None
    for i, (s, s_next) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        d = denoise(x, s)
        if name in ("euler", "ddim"):
            x = _each(lambda x, d, s=s, n=s_next: x + (x - d) / s * (n - s), x, d)
        elif name == "heun":
            guess = _each(lambda x, d, s=s, n=s_next: x + (x - d) / s * (n - s), x, d)
            if s_next == 0:
                x = guess
            else:
                d2 = denoise(guess, s_next)
                x = tuple(
                    a + ((a - b) / s + (g - e) / s_next) / 2 * (s_next - s)
                    for a, b, g, e in zip(x, d, guess, d2, strict=True)
                )
        elif name == "dpmpp_2m":
            t, t_next = -torch.tensor(s).double().log(), -torch.tensor(s_next).double().log()
            h = t_next - t
            if before is None or s_next == 0:
                mid = d
            else:
                r = (t + torch.tensor(sigmas[i - 1]).double().log()) / h
                mid = _each(lambda a, b, r=r: (1 + 1 / (2 * r)) * a - 1 / (2 * r) * b, d, before)
            x = _each(lambda x, m, s=s, n=s_next, h=h: n / s * x - torch.expm1(-h) * m, x, mid)
        elif name == "euler_ancestral":
            up = min(s_next, (s_next**2 * (s**2 - s_next**2) / s**2) ** 0.5)
            down = (s_next**2 - up**2) ** 0.5
            x = _each(lambda x, d, s=s, n=down: x + (x - d) / s * (n - s), x, d)
            if s_next > 0:
                noise = draw()
                x = tuple(a + noise * up for a in x)
        before = d
    return x


def _each(f: Any, *pairs: Pair) -> Pair:
    first, second = (f(*args) for args in zip(*pairs, strict=True))
    return first, second
