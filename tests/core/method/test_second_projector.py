"""A second kind of adapter (``pooled_kind``) through everything that is not its own file."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import infinite_id_core.method.adapter
from infinite_id_core import errors
from infinite_id_core.files import adapters, store
from infinite_id_core.files.identities import read_identity
from infinite_id_core.hosts.diffusers_sample import (
    AppliedIdentity,
    Prompt,
    SamplingOptions,
    sample,
)
from infinite_id_core.hosts.diffusers_train import identity_training
from infinite_id_core.hosts.diffusers_unet import text_projections, unet_layers
from infinite_id_core.method.adapter import check_identity, infinite_id_adapter
from infinite_id_core.method.attention import StreamOptions
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.method.features import Feature
from infinite_id_core.method.identity import Identity, average, interpolate, select, stack
from infinite_id_core.method.records import AdapterConfig, AdapterRecord
from trainer.train.objective import TrainingModel

from .. import pooled_kind, train_world

C, WIDTHS = train_world.CONTEXT, {"mid_block.attentions.0.transformer_blocks.0": 8}
KIND = pooled_kind.pooled_kind(infinite_id_core)


def person(seed: int, references: int = 1, null: bool = False, **names: str) -> Identity:
    draw = torch.Generator().manual_seed(seed)
    value = torch.randn(references, pooled_kind.WIDTH, generator=draw)
    nobody = torch.randn(pooled_kind.WIDTH, generator=draw) if null else None
    return Identity(
        features={"image": Feature(reading=KIND.reading, value=value, null=nobody)},
        weight=torch.arange(1.0, references + 1),
        **names,
    )


def made(widths: dict[str, int] = WIDTHS) -> Any:
    adapter = KIND.adapter(C, widths).requires_grad_(False)
    train_world.fill(adapter, 3)
    return adapter


def by_hand(adapter: Any, value: torch.Tensor) -> torch.Tensor:
    """Its tokens, ``[1, n * 4, C]``."""
    proj = adapter.state_dict()
    return (value @ proj["proj.weight"].T + proj["proj.bias"]).view(1, -1, C)


class CastingLinear(torch.nn.Linear):
    """As a host's: the weights go where the input is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(x)
        return torch.nn.functional.linear(x, self.weight.to(x), bias)


class CastingLayers:
    """A host's ``operations``."""

    Linear = CastingLinear


# --- tokens ----------------------------------------------------------------------------------


def test_its_tokens_and_their_weights():
    adapter, who = made(), person(1, 3)
    torch.testing.assert_close(adapter.tokens(who), by_hand(adapter, who["image"].value))
    assert adapter.token_weight(who).tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert {n: p.shape for n, p in adapter.state_dict().items() if n.startswith("proj")} == {
        "proj.weight": (4 * C, 16), "proj.bias": (4 * C,)
    }  # fmt: skip


@pytest.mark.parametrize("null", [False, True])
def test_nobody_comes_from_the_feature(null):
    adapter, who = made(), person(1, 3, null=null)
    nobody = who["image"].null if null else torch.zeros(pooled_kind.WIDTH)
    torch.testing.assert_close(adapter.null_tokens(who), by_hand(adapter, nobody[None]))


def test_tokens_are_made_where_and_in_what_the_weights_are():
    adapter = made().to(torch.bfloat16)
    assert adapter.tokens(person(1)).dtype == torch.bfloat16
    host = KIND.adapter(C, WIDTHS, CastingLayers).half()
    assert host.tokens(person(1)).dtype == torch.float16
    found = host.tokens(person(1), device=torch.device("cpu"), dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.half(), host.tokens(person(1)), rtol=1e-2, atol=1e-2)


def test_what_does_not_fit_is_named():
    with pytest.raises(errors.IdentityMismatchError, match="image: the adapter has .*made-L"):
        check_identity(made(), two_features())
    other = dataclasses.replace(KIND.reading, model="made-H")
    who = person(1)
    features = {"image": Feature(reading=other, value=who["image"].value)}
    with pytest.raises(errors.IdentityMismatchError, match="'made-L', the identity has 'made-H'"):
        check_identity(made(), dataclasses.replace(who, features=features))
    huge = Feature(reading=KIND.reading, value=torch.full((1, pooled_kind.WIDTH), 3e38))
    with pytest.raises(errors.FeatureError, match="image 3e\\+38"):
        made().tokens(dataclasses.replace(who, features={"image": huge}))


# --- identities ------------------------------------------------------------------------------


def test_mixing_is_that_of_any_feature():
    a, b = person(1, 2, name="A"), person(2, 1, name="B")
    both = stack([a, b], [0.5, 3.0])
    values = torch.cat([a["image"].value, b["image"].value])
    assert torch.equal(both["image"].value, values)
    assert both.weight.tolist() == [0.5, 1.0, 3.0] and both.name == "A + B"
    mean = (a["image"].value * torch.tensor([[1.0], [2.0]])).sum(0) / 3  # of no fixed length
    torch.testing.assert_close(average(a)["image"].value[0], mean)
    between = 0.75 * mean + 0.25 * b["image"].value[0]
    torch.testing.assert_close(interpolate(a, b, 0.25)["image"].value[0], between)
    last = select(both, [2, 0])
    assert torch.equal(last["image"].value, values[[2, 0]])
    assert last.weight.tolist() == [3.0, 0.5] and last.name == "A + B"
    for wrong in ([], [3], [-1]):
        with pytest.raises(errors.OptionError, match="from 0 to 2"):
            select(both, wrong)


def test_saved_and_read_again_it_makes_the_same_tokens(tmp_path):
    adapter, who = made(), stack([person(1, 2, null=True), person(2)])
    path = store.save_identity(who, tmp_path, "Änne")
    read = read_identity(path)
    assert read.name == "Änne" and read.readings == who.readings
    assert torch.equal(adapter.tokens(read), adapter.tokens(who))
    assert torch.equal(adapter.null_tokens(read), adapter.null_tokens(who))
    assert torch.equal(adapter.token_weight(read), adapter.token_weight(who))


# --- pictures and training -------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet() -> Any:
    return train_world.micro_unet()


def fitted(adapter: Any, unet: Any) -> Any:
    adapter = adapter.requires_grad_(False)
    train_world.fill(adapter, 7)
    adapter.copy_text_projections(text_projections(unet))
    return adapter


@pytest.fixture(scope="module")
def pooled(unet: Any) -> Any:
    return fitted(KIND.adapter(C, {y.path: y.width for y in unet_layers(unet)}), unet)


def two_features() -> Identity:
    draw = torch.Generator().manual_seed(5)
    return face_clip_identity(
        face=torch.randn(1, 512, generator=draw),
        clip=torch.randn(1, 257, 12, generator=draw),
        weight=torch.ones(1),
        config=IdentityConfig(recogniser="r", clip_model="c"),
    )


def painted(unet: Any, *applied: AppliedIdentity, **options: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(6)
    prompts = [
        Prompt(context=torch.randn(1, 7, C, generator=draw),
               pooled=torch.randn(1, train_world.POOLED, generator=draw))
        for _ in range(2)
    ]  # fmt: skip
    noise = torch.randn(1, 4, 8, 8, generator=draw)
    return sample(
        unet, applied, *prompts, noise, options=StreamOptions(**options),
        sampling=SamplingOptions(steps=3, guidance=4.0),
    )  # fmt: skip


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_it_paints_with_masks_strengths_and_weights(unet, pooled):
    def one(who: Identity, **settings: Any) -> torch.Tensor:
        return painted(unet, AppliedIdentity(adapter=pooled, identity=who, **settings))

    a, b = person(1), person(2)
    plain, full = painted(unet), one(a)
    assert apart(full, plain) > 0.01 and apart(one(b), full) > 0.01
    assert torch.equal(one(a, strength=0.0), plain)
    assert 0 < apart(one(a, strength=0.3), plain) < apart(full, plain)
    assert apart(one(a, mask=torch.ones(1, 64, 64)), full) < 1e-5
    weighted, copies = one(stack([a, b], [2.0, 1.0])), one(stack([a, a, b]))
    assert apart(weighted, copies) < 1e-5 and apart(weighted, one(stack([a, b]))) > 1e-4
    nobody = dataclasses.replace(
        a["image"], null=5 * person(1, null=True)["image"].null
    )  # what stands for nobody is read in the negative pass
    assert apart(one(dataclasses.replace(a, features={"image": nobody})), full) > 1e-3


def test_two_kinds_paint_in_one_picture(unet, pooled):
    config = AdapterConfig(clip_width=12, context_width=C, recogniser="r", clip_model="c")
    mappers = fitted(infinite_id_adapter(config, pooled.widths), unet)
    left, right = torch.zeros(1, 64, 64), torch.zeros(1, 64, 64)
    left[..., :32], right[..., 32:] = 1.0, 1.0
    first = AppliedIdentity(adapter=pooled, identity=person(1), mask=left)
    second = AppliedIdentity(adapter=mappers, identity=two_features(), mask=right)
    both = painted(unet, first, second)
    assert apart(both, painted(unet, first)) > 1e-3
    assert apart(both, painted(unet, second)) > 1e-3


def test_training_reads_what_it_needs(unet):
    adapter = KIND.adapter(C, {y.path: y.width for y in unet_layers(unet)})
    model = TrainingModel(adapter, unet, train_world.POOLED)
    batch = {
        "timestep": torch.tensor([500, 20]),
        "size_ids": torch.zeros(2, 6),
        "image": torch.randn(2, pooled_kind.WIDTH),
    }
    with identity_training(unet, adapter):
        model(torch.randn(2, 4, 8, 8), batch).square().mean().backward()
    assert all(bool(p.grad.any()) for p in adapter.parameters())


# --- files of its own ------------------------------------------------------------------------


class PooledFormat:
    """Its file: two groups, as published adapters have them."""

    family = "Pooled"

    def recognises(self, header: Any) -> bool:
        return "image_proj.weight" in header.tensors

    def build(self, file: Any, operations: Any = torch.nn, options: Any = None) -> Any:
        names = {name: name.replace("image_proj.", "proj.") for name in file.header.tensors}
        tensors = {ours: file.tensor(theirs) for theirs, ours in names.items()}
        return KIND.adapter(C, WIDTHS, operations).rebuilt(tensors, operations)


def test_a_format_is_one_entry_of_formats(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "FORMATS", (*adapters.FORMATS, PooledFormat()))
    adapter, path = made(), tmp_path / "pooled.safetensors"
    state = adapter.state_dict()
    save_file({n.replace("proj.", "image_proj."): t for n, t in state.items()}, path)
    read = adapters.read_adapter(path)
    assert isinstance(read.config, AdapterRecord) and read.widths == WIDTHS
    assert torch.equal(read.tokens(person(1)), adapter.tokens(person(1)))
    save_file({"other": torch.ones(1)}, path)
    with pytest.raises(errors.WrongFormatError, match="Infinite-ID, .*, Pooled"):
        adapters.read_adapter(path)


def test_it_is_not_written_in_our_format(tmp_path):
    from infinite_id_core.files.infinite_id_format import write_adapter

    with pytest.raises(errors.NotWrittenError, match="another kind"):
        write_adapter(tmp_path / "a.safetensors", made())
    assert list(tmp_path.iterdir()) == []
