"""One stream with a published adapter is what diffusers' own IP-Adapter paints from one file."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from infinite_id_core.files import adapters
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.hosts.diffusers_sample import (
    AppliedIdentity,
    Prompt,
    SamplingOptions,
    sample,
)
from infinite_id_core.hosts.diffusers_unet import unet_layers
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.identity import Identity

from .. import published_files as files
from .. import train_world
from .test_published_projectors import person

C = train_world.CONTEXT
FORMULA = StreamOptions(mixing="off", style="off", text_stream="shared")


@pytest.fixture(scope="module")
def unet() -> Any:
    return train_world.micro_unet()


@pytest.fixture(scope="module")
def sizes(unet: Any) -> files.Sizes:
    layers = tuple(
        files.Layer(number=2 * i + 1, path=layer.path, width=layer.width)
        for i, layer in enumerate(unet_layers(unet))
    )
    return dataclasses.replace(files.SMALL, layers=layers, context=C)


def made_for(family: str, sizes: files.Sizes) -> files.Nested:
    """Without its LoRA, which is no part of the formula."""
    key_values = files.filled(files.key_values(sizes), 4)
    return {**files.made(family, sizes, seed=6), "ip_adapter": key_values}


def painted(unet: Any, *applied: AppliedIdentity, steps: int = 3) -> Tensor:
    draw = torch.Generator().manual_seed(6)
    positive, negative = (
        Prompt(context=torch.randn(1, 7, C, generator=draw),
               pooled=torch.randn(1, train_world.POOLED, generator=draw))
        for _ in range(2)
    )  # fmt: skip
    noise = torch.randn(2, 4, 8, 8, generator=draw)
    return sample(
        unet, applied, positive, negative, noise, options=FORMULA,
        sampling=SamplingOptions(steps=steps, guidance=4.0),
    )  # fmt: skip


def in_diffusers(unet: Any, made: files.Nested, who: Identity, scale: float) -> Any:
    """A UNet whose own IP-Adapter reads the person in the last rows and nobody in the first."""
    theirs = copy.deepcopy(unet)
    theirs._load_ip_adapter_weights([made], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]
    values = {n: f.value.float() for n, f in who.features.items()}
    nulls = {
        n: (torch.zeros_like(v) if n != "clip" else who[n].null.float()[None].expand_as(v))
        for n, v in values.items()
    }
    forward = theirs.forward

    def with_images(x: Tensor, *args: Any, added_cond_kwargs: Any, **kwargs: Any) -> Any:
        half = x.shape[0] // 2  # the negative prompt's rows come first

        def rows(name: str) -> Tensor:
            return torch.cat([part[name][None].expand(half, *part[name].shape)
                              for part in (nulls, values)])  # fmt: skip

        layer = theirs.encoder_hid_proj.image_projection_layers[0]
        main = "face" if "face" in values else next(iter(values))
        if main == "face" and "clip" in values:
            layer.clip_embeds = rows("clip").flatten(0, 1)[:, None]
            layer.shortcut = True
        images = {**added_cond_kwargs, "image_embeds": [rows(main)]}
        return forward(x, *args, added_cond_kwargs=images, **kwargs)

    theirs.forward = with_images
    return theirs


@pytest.mark.parametrize("scale", [1.0, 0.6])
@pytest.mark.parametrize("photos", [1, 2])
@pytest.mark.parametrize("family", ["base bigG", "base H", "full", "plus", "faceid", "plus v2"])
def test_one_stream_is_diffusers_ip_adapter(family, photos, scale, unet, sizes, tmp_path):
    made = made_for(family, sizes)
    path = files.write(tmp_path / "a", "flat safetensors", made, sizes)
    adapter = adapters.read_adapter(path, options=AdapterOptions(layers=unet_layers(unet)))
    who = person(adapter, photos)
    ours = painted(unet, AppliedIdentity(adapter=adapter, identity=who, strength=scale))
    theirs = painted(in_diffusers(unet, made, who, scale))
    plain = painted(unet)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4
    assert float((ours - plain).norm() / plain.norm()) > 0.01


@pytest.mark.parametrize("family", ["faceid", "pulid v1.1"])
def test_every_layer_takes_part(family, unet, sizes, tmp_path):
    made = made_for(family, sizes)
    path = files.write(tmp_path / "a", "nested pickle", made, sizes)
    adapter = adapters.read_adapter(path, options=AdapterOptions(layers=unet_layers(unet)))
    one = AppliedIdentity(adapter=adapter, identity=person(adapter, 2))
    whole = painted(unet, one, steps=1)
    for layer in sizes.layers:
        value = adapter.key_value(layer.path).to_v.weight
        kept = value.clone()
        value.zero_()
        assert float((painted(unet, one, steps=1) - whole).norm() / whole.norm()) > 1e-5
        value.copy_(kept)
    assert torch.equal(painted(unet, one, steps=1), whole)
