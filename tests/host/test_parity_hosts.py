"""The same adapter, weights, latents, prompts and noise through ComfyUI and through diffusers."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import pytest
import torch

from infinite_id_core.hosts import diffusers_sample as host_diffusers
from infinite_id_core.hosts.diffusers_unet import unet_layers
from infinite_id_core.method.adapter import infinite_id_adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.features import Feature, Reading
from infinite_id_core.method.identity import Identity
from infinite_id_core.method.records import AdapterConfig
from infinite_id_core.sdxl.schedule import NoiseSchedule
from microworld.comfy_models import unet_reference
from trainer.models.unet_names import diffusers_names, unet_config

from . import tiny_sdxl

SIZE_IDS = (64, 72, 0, 8, 64, 72)
STEPS, GUIDANCE = 5, 4.0


@pytest.fixture(scope="module")
def host(pack: Any) -> Any:
    return importlib.import_module(f"{pack.__name__}.infinite_id_core.hosts.comfyui")


@pytest.fixture(scope="module")
def comfy_model() -> Any:
    return tiny_sdxl.tiny_model()


@pytest.fixture(scope="module")
def unet(comfy_model: Any) -> Any:
    """The same weights in diffusers' UNet, put there by our own names."""
    from diffusers import UNet2DConditionModel

    state = comfy_model.model.diffusion_model.state_dict()
    # ComfyUI's SDXL class takes heads of 64 whatever the config of the tiny model says.
    config = unet_config({name: t.shape for name, t in state.items()}, head_width=64)
    model = UNet2DConditionModel(**config)
    names = diffusers_names(config, state)
    model.load_state_dict({names[ldm]: tensor for ldm, tensor in state.items()})
    return model.eval().requires_grad_(False)


def test_our_names_are_the_hosts(comfy_model: Any, unet: Any) -> None:
    """ComfyUI's own table says the same of every tensor."""
    theirs = comfy.utils.unet_to_diffusers(tiny_sdxl.UNET_CONFIG)
    state = comfy_model.model.diffusion_model.state_dict()
    ours = diffusers_names(unet.config, state)
    assert {name: theirs[name] for name in ours.values()} == {n: ldm for ldm, n in ours.items()}
    assert set(ours) == set(state)


# Published SDXL kinds: depths as ComfyUI writes them (the output's from the finest level on).
FULL: dict[str, dict[str, Any]] = {
    "SDXL": {
        "blocks": [2, 2, 2], "down": [0, 0, 2, 2, 10, 10], "middle": 10,
        "up": [0, 0, 0, 2, 2, 2, 10, 10, 10], "layers": 70,
    },
    "SSD-1B": {
        "blocks": [2, 2, 2], "down": [0, 0, 2, 2, 4, 4], "middle": -1,
        "up": [0, 0, 0, 1, 1, 2, 10, 4, 4], "layers": 34,
    },
    "Segmind-Vega": {
        "blocks": [2, 2, 2], "down": [0, 0, 1, 1, 2, 2], "middle": -1,
        "up": [0, 0, 0, 1, 1, 1, 2, 2, 2], "layers": 15,
    },
    "KOALA-700M": {
        "blocks": [1, 1, 1], "down": [0, 2, 5], "middle": -2,
        "up": [0, 0, 2, 2, 5, 5], "layers": 21,
    },
    "KOALA-1B": {
        "blocks": [1, 1, 1], "down": [0, 2, 6], "middle": 6,
        "up": [0, 0, 2, 2, 6, 6], "layers": 30,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(FULL))
def test_full_size_unets_are_read_off_their_shapes(kind: str) -> None:
    """Names and shapes of published SDXL kinds, without any weights."""
    from diffusers import UNet2DConditionModel

    options = FULL[kind]
    config = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "channel_mult": [1, 2, 4],
        "num_res_blocks": options["blocks"],
        "transformer_depth": list(options["down"]),
        "transformer_depth_middle": options["middle"],
        "transformer_depth_output": list(options["up"]),
        "context_dim": 2048,
        "adm_in_channels": 2816,
        "num_head_channels": 64,
        "num_classes": "sequential",
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
        "legacy": False,
    }
    shapes = {name: t.shape for name, t in unet_reference(config).items()}
    with torch.device("meta"):
        wanted = UNet2DConditionModel(**unet_config(shapes))
    names = diffusers_names(wanted.config, shapes)
    assert {names[n]: tuple(s) for n, s in shapes.items()} == {
        n: tuple(t.shape) for n, t in wanted.state_dict().items()
    }
    assert len(unet_layers(wanted)) == options["layers"]
    if kind == "SDXL":
        assert sum(t.numel() for t in wanted.parameters()) == 2_567_463_684


class Case:
    """One run's inputs, made once and given to both hosts."""

    def __init__(self, rows: int = 2) -> None:
        self.noise = tiny_sdxl.latent(rows, 16)[..., :8, :9].contiguous()
        self.latent = 0.1 * tiny_sdxl.latent(rows, 16, seed=8)[..., :8, :9].contiguous()
        self.positive, self.negative = tiny_sdxl.conditioning(1), tiny_sdxl.conditioning(2)

    def comfy(self, model: Any, scheduler: str, sampler: str = "ddim") -> torch.Tensor:
        def conds(cond: Any) -> Any:
            height, width, top, left, to_height, to_width = SIZE_IDS
            extra = {
                "height": height, "width": width, "crop_h": top, "crop_w": left,
                "target_height": to_height, "target_width": to_width,
            }  # fmt: skip
            return [[cond[0][0], {**cond[0][1], **extra}]]

        latent = model.model.process_latent_out(self.latent)  # the host scales it on its way in
        out = comfy.sample.sample(
            model, self.noise, STEPS, GUIDANCE, sampler, scheduler,
            conds(self.positive), conds(self.negative), latent, disable_pbar=True, seed=1,
        )  # fmt: skip
        return model.model.process_latent_in(out)

    def diffusers(self, unet: Any, applied: Any, options: Any, scheduler: str) -> torch.Tensor:
        def prompt(cond: Any) -> host_diffusers.Prompt:
            return host_diffusers.Prompt(context=cond[0][0], pooled=cond[0][1]["pooled_output"])

        return host_diffusers.sample(
            unet, applied, prompt(self.positive), prompt(self.negative), self.noise,
            latent=self.latent, options=options, size_ids=SIZE_IDS,
            sampling=host_diffusers.SamplingOptions(
                steps=STEPS, guidance=GUIDANCE, scheduler=scheduler
            ),
        )  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def ours_of(feature: Any) -> Feature:
    return Feature(reading=Reading(**vars(feature.reading)), value=feature.value)


def both(pack: Any, host: Any, model: Any, count: int = 1) -> tuple[Any, Any, list[Any], list[Any]]:
    """Adapter and identities as the pack's objects and as ours (two imports of one module)."""
    theirs = tiny_sdxl.tiny_adapter(pack, model)
    ours = infinite_id_adapter(AdapterConfig(**vars(theirs.adapter.config)), theirs.adapter.widths)
    ours.load_state_dict(theirs.adapter.state_dict())
    identities = [tiny_sdxl.tiny_identity(pack, seed=3 + i, references=1 + i) for i in range(count)]
    same = [
        Identity(
            features={name: ours_of(feature) for name, feature in i.features.items()},
            weight=i.weight,
        )
        for i in identities
    ]
    return theirs, ours.requires_grad_(False), identities, same


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "shared text stream": {"options": {"text_stream": "shared"}},
    "full adain, mutual": {"options": {"style": "adain", "mixing": "mutual"}},
    "no merge": {"options": {"merge_text": False, "style": "off", "mixing": "off"}},
    "part of the run": {"start_percent": 0.2, "end_percent": 0.7, "strength": 1.5},
    "two people": {"people": 2},
    "one stream": {"options": {"mixing": "off"}},
    "one stream, two people": {"people": 2, "options": {"mixing": "off"}},
    "one stream, part of the run": {
        "start_percent": 0.2,
        "end_percent": 0.7,
        "options": {"mixing": "off"},
    },
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_both_hosts_give_the_same_run(
    pack: Any, host: Any, comfy_model: Any, unet: Any, variant: str
) -> None:
    settings = dict(VARIANTS[variant])
    chosen, people = settings.pop("options", {}), settings.pop("people", 1)
    theirs, ours, identities, same = both(pack, host, comfy_model, people)
    case = Case()
    masks = [None] if people == 1 else [torch.zeros(1, 64, 72), torch.zeros(1, 64, 72)]
    if people == 2:
        masks[0][..., :40], masks[1][..., 32:] = 1.0, 0.7
    patched = comfy_model
    for identity, mask in zip(identities, masks, strict=True):
        options = pack.infinite_id_core.method.attention.StreamOptions(**chosen)
        patched = host.apply_identity(
            patched, theirs, identity, options=options, mask=mask, **settings
        )
    applied = [
        host_diffusers.AppliedIdentity(adapter=ours, identity=identity, mask=mask, **settings)
        for identity, mask in zip(same, masks, strict=True)
    ]
    wanted = case.comfy(patched, "normal")
    found = case.diffusers(unet, applied, StreamOptions(**chosen), "normal")
    plain = case.diffusers(unet, [], None, "normal")
    assert relative(found, wanted) < 1e-4
    assert relative(plain, wanted) > 0.002  # the identity shows


@pytest.mark.parametrize("scheduler", ["normal", "karras", "ddim_uniform", "simple"])
def test_plain_runs_agree_on_every_scheduler(comfy_model: Any, unet: Any, scheduler: str) -> None:
    case = Case(rows=1)
    found = case.diffusers(unet, [], None, scheduler)
    assert relative(found, case.comfy(comfy_model, scheduler)) < 1e-4


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_noise_levels_are_the_hosts(zero_terminal: bool) -> None:
    from comfy.model_sampling import V_PREDICTION, ModelSamplingDiscrete

    class Sampling(ModelSamplingDiscrete, V_PREDICTION):
        pass

    theirs = Sampling(zsnr=zero_terminal)
    ours = NoiseSchedule(prediction="v", zero_terminal_snr=zero_terminal)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
    for scheduler in ("normal", "karras", "ddim_uniform", "simple"):
        for steps in (1, 7, 30):
            torch.testing.assert_close(
                ours.run_sigmas(scheduler, steps),
                comfy.samplers.calculate_sigmas(theirs, scheduler, steps),
                rtol=1e-5, atol=0,
            )  # fmt: skip
    for percent in (0.1, 0.5, 0.999, 1.0):
        wanted = theirs.percent_to_sigma(percent)
        assert ours.sigma_at_percent(percent) == pytest.approx(wanted, rel=1e-5)
    sigma, x, out = torch.tensor(3.0), torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(
        ours.denoised(x, out, sigma), theirs.calculate_denoised(sigma, out, x),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
