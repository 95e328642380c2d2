"""What the negative prompt's pass does with the identity: the points the paper leaves open."""

from __future__ import annotations

import pytest
import torch

from infinite_id_core.errors import OptionError
from infinite_id_core.hosts.diffusers_sample import (
    AppliedIdentity,
    NegativePass,
    Prompt,
    SamplingOptions,
    sample,
)
from infinite_id_core.hosts.diffusers_unet import text_projections, unet_layers
from infinite_id_core.method.adapter import infinite_id_adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.method.records import AdapterConfig

from .. import train_world

WIDTH = 12


@pytest.fixture(scope="module")
def run():
    """A guided run of the micro UNet with an identity: ``run(negative, **stream options)``."""
    unet = train_world.micro_unet()
    adapter = infinite_id_adapter(
        AdapterConfig(
            clip_width=WIDTH, context_width=train_world.CONTEXT, recogniser="r", clip_model="c"
        ),
        {layer.path: layer.width for layer in unet_layers(unet)},
    ).requires_grad_(False)
    train_world.fill(adapter, 1)
    adapter.copy_text_projections(text_projections(unet))
    draw = torch.Generator().manual_seed(5)
    identity = face_clip_identity(
        face=torch.randn(1, 512, generator=draw),
        clip=torch.randn(1, 257, WIDTH, generator=draw),
        weight=torch.ones(1),
        config=IdentityConfig(recogniser="r", clip_model="c"),
    )
    positive, negative = (
        Prompt(
            context=torch.randn(1, 7, train_world.CONTEXT, generator=draw),
            pooled=torch.randn(1, train_world.POOLED, generator=draw),
        )
        for _ in range(2)
    )
    noise = torch.randn(2, 4, 8, 8, generator=draw)

    def sampled(how: NegativePass | None, **options: str) -> torch.Tensor:
        return sample(
            unet,
            [AppliedIdentity(adapter=adapter, identity=identity)],
            positive,
            negative,
            noise,
            options=StreamOptions(**options),
            negative_pass=how,
            sampling=SamplingOptions(steps=3, guidance=4.0),
        )

    return sampled


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_null_identity_and_mixing_are_the_default(run):
    assert torch.equal(run(None), run(NegativePass(identity="null", mixing=True)))


@pytest.mark.parametrize("how", [NegativePass(identity="none"), NegativePass(mixing=False)])
def test_each_choice_changes_the_picture(run, how):
    assert apart(run(how), run(None)) > 1e-3


def test_without_mixing_anywhere_there_is_none_to_leave_out(run):
    assert apart(run(NegativePass(mixing=False), mixing="off"), run(None, mixing="off")) < 1e-5


def test_another_identity_is_refused():
    with pytest.raises(OptionError, match="null, none|'null', 'none'"):
        NegativePass(identity="other")  # type: ignore[arg-type]
