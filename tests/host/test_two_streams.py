"""Whole sampling runs in real ComfyUI against the float64 two-pass reference."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.k_diffusion.sampling import default_noise_sampler

from .reference import TwoPass, sample
from .tiny_sdxl import (
    CLIP_WIDTH,
    conditioning,
    model_config,
    tiny_adapter,
    tiny_base,
    tiny_identity,
    tiny_model,
)

STEPS, CFG, SEED, ROWS, SIZE = 5, 4.0, 7, 2, 16
SCALE = 0.13025  # SDXL's latent scale, undone by the host at the end
SIDES = {"input": 0, "middle": 1, "output": 2}


class World:
    """One tiny model, adapter and identity, in ComfyUI and in the reference."""

    def __init__(self, pack: Any) -> None:
        self.host = pack.infinite_id_core.hosts.comfyui
        self.options = pack.infinite_id_core.method.attention.StreamOptions
        self.model = tiny_model()
        self.adapter = tiny_adapter(pack, self.model)
        self.identity = tiny_identity(pack)
        self.positive, self.negative = conditioning(1), conditioning(2)
        double = torch.float64
        self.double = tiny_base(model_config(double), dtype=double).diffusion_model.double()
        self.noise = comfy.sample.prepare_noise(torch.zeros(ROWS, 4, SIZE, SIZE), SEED)

    def comfy(
        self, sampler: str, *, strength: float = 1.0, end: float = 1.0, **options: Any
    ) -> Any:
        patched = self.host.apply_identity(
            self.model,
            self.adapter,
            self.identity,
            strength=strength,
            options=self.options(**options),
            end_percent=end,
        )
        return self.run(patched, sampler)

    def run(self, model: Any, sampler: str) -> torch.Tensor:
        with torch.inference_mode():
            return comfy.sample.sample(
                model,
                self.noise,
                STEPS,
                CFG,
                sampler,
                "normal",
                self.positive,
                self.negative,
                torch.zeros_like(self.noise),
                seed=SEED,
                disable_pbar=True,
            )

    def reference(
        self, sampler: str, *, end: float = 1.0, text_stream: str = "own", **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Text and identity latents of the same run."""
        two = TwoPass(self.double, self.adapter.adapter, **options)
        layers = self.host.model_layers(self.model)
        paths = [
            layer.path for layer in sorted(layers, key=lambda a: (SIDES[a.block[0]], *a.block[1:]))
        ]
        sampling = self.model.model.model_sampling
        last = sampling.percent_to_sigma(end)
        sides = []
        null = torch.zeros(1, 512), torch.zeros(1, 257, CLIP_WIDTH)
        who = self.identity["face"].value, self.identity["clip"].value
        for cond, features in ((self.positive, who), (self.negative, null)):
            text, extra = cond[0]
            y = self.model.model.encode_adm(
                pooled_output=extra["pooled_output"], width=SIZE * 8, height=SIZE * 8
            )
            sides.append((text.double(), y.double(), two.tokens(*features)))

        def denoise(x: Any, sigma: float) -> Any:
            t = sampling.timestep(torch.tensor(sigma)).double().reshape(1)
            scale = 1 / (sigma**2 + 1) ** 0.5
            x_text, x_id = (x[1] if text_stream == "shared" else x[0]) * scale, x[1] * scale
            if sigma < last:
                eps = [(two.plain(x_text, t, c, y), two.plain(x_id, t, c, y)) for c, y, _ in sides]
            else:
                eps = [two(x_text, x_id, t, c, y, c_id, paths) for c, y, c_id in sides]
            positive, negative = eps
            return tuple(
                a - sigma * (n + CFG * (p - n))
                for a, p, n in zip(x, positive, negative, strict=True)
            )

        sigmas = comfy.samplers.KSampler(self.model, STEPS, "cpu", sampler, "normal", 1.0).sigmas
        sigmas = [float(s) for s in sigmas]
        start = self.noise.double() * (1 + sigmas[0] ** 2) ** 0.5
        draw = default_noise_sampler(self.noise, seed=SEED)  # 0.33.0 draws from another seed
        with torch.inference_mode():
            text, identity = sample(
                sampler,
                denoise,
                (start, start),
                sigmas,
                lambda: draw(None, None).double(),
            )
        return text / SCALE, identity / SCALE


@pytest.fixture(scope="module")
def world(pack: Any) -> World:
    return World(pack)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
def test_equals_two_pass_reference(world: World, sampler: str) -> None:
    text, identity = world.reference(sampler)
    found = world.comfy(sampler)
    plain = world.run(world.model, sampler)
    assert error(found, identity) < 1e-5
    assert error(plain, text) < 1e-5  # the text stream is the picture SDXL would have made
    assert error(found, plain) > 1e-2  # and the identity changes it


@pytest.mark.parametrize(
    "options",
    [
        {"mixing": "mutual"},
        {"mixing": "off"},
        {"style": "adain"},
        {"style": "off"},
        {"merge_text": False},
        {"strength": 1.7},
        {"text_stream": "shared"},
        {"end": 0.5},
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items()),
)
def test_every_option_equals_reference(world: World, options: dict[str, Any]) -> None:
    found = world.comfy("euler", **options)
    assert error(found, world.reference("euler", **options)[1]) < 1e-5
    assert error(found, world.comfy("euler")) > 3e-5  # not the same as without the option
