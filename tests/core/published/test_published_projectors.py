"""Projectors of published adapters: diffusers' own classes, and plain references, on one file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from infinite_id_core.errors import IdentityMismatchError
from infinite_id_core.files import adapters
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.method.adapter import Adapter, check_identity
from infinite_id_core.method.features import Feature
from infinite_id_core.method.identity import Identity
from infinite_id_core.sdxl import layers as core_layers

from .. import published_files as files
from .. import published_reference as reference

SMALL = files.SMALL
LAYERS = files.layers_of(SMALL, core_layers)
Made = tuple[Adapter, files.State]


def built(family: str, tmp_path: Path, **options: object) -> Made:
    """An adapter, and the tensors of its projector; float64, so that orders of sums tell less."""
    made = files.made(family, seed=5)
    path = files.write(tmp_path / "a.bin", "nested pickle", made)
    adapter = adapters.read_adapter(path, options=AdapterOptions(layers=LAYERS, **options))
    return adapter.double(), {n: t.double() for n, t in made["image_proj"].items()}


def person(adapter: Adapter, photos: int = 1, seed: int = 3, nulls: bool = True) -> Identity:
    draw = torch.Generator().manual_seed(seed)
    features = {}
    for name, reading in adapter.needs.items():
        value = torch.randn(photos, *reading.shape, generator=draw, dtype=torch.float64)
        null = torch.randn(reading.shape, generator=draw, dtype=torch.float64)
        if reading.is_embedding:
            scale = 1.0 if reading.output == "normed" else 20.0
            value = normalize(value, dim=-1) * scale
        features[name] = Feature(reading=reading, value=value, null=null if nulls else None)
    return Identity(features=features, weight=torch.ones(photos))


def values(identity: Identity) -> dict[str, Tensor]:
    return {name: feature.value for name, feature in identity.features.items()}


def close(found: Tensor, wanted: Tensor, limit: float = 1e-9) -> None:
    assert found.shape == wanted.shape
    apart = float((found - wanted).norm() / wanted.norm())
    assert apart < limit, apart


# --- diffusers' classes ----------------------------------------------------------------------


def diffusers_projection(state: files.State) -> torch.nn.Module:
    from diffusers.loaders.unet import UNet2DConditionLoadersMixin

    convert = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    return convert(None, dict(state), low_cpu_mem_usage=False).double()


def in_diffusers(state: files.State, features: dict[str, Tensor], shortcut: bool = True) -> Tensor:
    """``[n, M, C]``."""
    projection = diffusers_projection(state)
    if "face" in features and "clip" in features:
        projection.clip_embeds = features["clip"][:, None]
        projection.shortcut, projection.shortcut_scale = shortcut, 1.0
        return projection(features["face"])
    (only,) = features.values()
    return projection(only)


@pytest.mark.parametrize("family", ["base bigG", "base H", "full", "plus", "faceid", "plus v2"])
def test_tokens_are_those_of_diffusers(family, tmp_path):
    adapter, state = built(family, tmp_path)
    who = person(adapter, 2)
    with torch.no_grad():
        wanted = in_diffusers(state, values(who))
        wanted = wanted.reshape(1, -1, wanted.shape[-1])
        close(adapter.tokens(who), wanted)
        close(adapter.float().tokens(who).double(), wanted, 1e-5)


def test_the_shortcut_of_plus(tmp_path):
    adapter, state = built("plus v2", tmp_path, plus_version=1)
    who = person(adapter, 1)
    with torch.no_grad():
        read = in_diffusers(state, values(who), shortcut=False)
        close(adapter.tokens(who), read)
        alone = reference.face_tokens(state, who["face"].value[0])[None]
        stronger, _ = built("plus v2", tmp_path, shortcut=1.75)
        close(stronger.tokens(who), alone + 1.75 * read)


# --- references of our own -------------------------------------------------------------------


def test_portrait_makes_tokens_of_each_photo(tmp_path):
    adapter, state = built("portrait", tmp_path)
    who = person(adapter, 3)
    wanted = torch.cat([reference.face_tokens(state, face) for face in who["face"].value])
    close(adapter.tokens(who), wanted[None])
    assert wanted.shape[0] == 48
    weighted = dataclasses.replace(who, weight=torch.tensor([1.0, 2.0, 0.5]))
    assert adapter.token_weight(weighted).tolist() == [1.0] * 16 + [2.0] * 16 + [0.5] * 16


@pytest.mark.parametrize("photos", [1, 3])
def test_a_sequence_of_raw_faces_is_one_pass(photos, tmp_path):
    adapter, state = built("raw face", tmp_path)
    who = person(adapter, photos)
    close(adapter.tokens(who), reference.resampler(state, who["face"].value)[None])
    assert adapter.token_weight(who).tolist() == [1.0] * SMALL.tokens


def test_raw_faces_as_their_mean_or_each_by_itself(tmp_path):
    adapter, state = built("raw face", tmp_path, references="mean")
    who = dataclasses.replace(person(adapter, 2), weight=torch.tensor([1.0, 3.0]))
    faces = who["face"].value
    mean = (faces[:1] + 3 * faces[1:]) / 4
    close(adapter.tokens(who), reference.resampler(state, mean)[None])
    assert adapter.token_weight(who).tolist() == [1.0] * SMALL.tokens
    each, _ = built("raw face", tmp_path, references="each")
    wanted = torch.cat([reference.resampler(state, face[None]) for face in faces])
    close(each.tokens(who), wanted[None])
    assert each.token_weight(who).tolist() == [1.0] * SMALL.tokens + [3.0] * SMALL.tokens


def pulid_values(who: Identity) -> tuple[Tensor, Tensor, Tensor]:
    return who["face"].value, who["eva"].value, who["eva_levels"].value


def test_pulid_v1(tmp_path):
    adapter, state = built("pulid v1", tmp_path)
    who = person(adapter, 2)
    photos = zip(*pulid_values(who), strict=True)
    wanted = torch.cat([reference.pulid_v1(state, *photo) for photo in photos])
    close(adapter.tokens(who), wanted[None])
    assert wanted.shape == (20, SMALL.context)


@pytest.mark.parametrize("photos", [1, 3])
def test_pulid_v11_reads_all_photos_in_one_pass(photos, tmp_path):
    adapter, state = built("pulid v1.1", tmp_path)
    who = person(adapter, photos)
    wanted = reference.pulid_v11(state, *pulid_values(who))
    close(adapter.tokens(who), wanted[None])
    assert wanted.shape == (SMALL.former_tokens, SMALL.context)
    assert adapter.token_weight(who).tolist() == [1.0] * SMALL.former_tokens


@pytest.mark.parametrize("family", ["raw face", "pulid v1.1"])
def test_in_one_pass_a_weight_of_two_is_a_copy(family, tmp_path):
    adapter, _ = built(family, tmp_path)
    who = person(adapter, 2)
    twice = {
        name: dataclasses.replace(feature, value=feature.value[[0, 0, 1]])
        for name, feature in who.features.items()
    }
    copies = Identity(features=twice, weight=torch.ones(3))
    weighted = dataclasses.replace(who, weight=torch.tensor([2.0, 1.0]))
    close(adapter.tokens(weighted), adapter.tokens(copies))
    apart = (adapter.tokens(weighted) - adapter.tokens(who)).norm()
    assert float(apart / adapter.tokens(who).norm()) > 1e-4


@pytest.mark.parametrize("family", ["raw face", "pulid v1.1"])
def test_a_batch_of_strangers_does_not_mix(family, tmp_path):
    """What training hands over: rows that are people."""
    adapter, _ = built(family, tmp_path)
    who = person(adapter, 3)
    rows = adapter.projector(values(who))
    for number in range(3):
        alone = {name: value[number : number + 1] for name, value in values(who).items()}
        close(rows[number : number + 1], adapter.projector(alone))


# --- nobody ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", files.PROJECTORS)
def test_nobody_is_what_the_family_knows_as_nobody(family, tmp_path):
    adapter, _ = built(family, tmp_path)
    who = person(adapter, 1)
    nobody = {
        name: feature.null[None] if name == "clip" else torch.zeros_like(feature.value)
        for name, feature in who.features.items()
    }
    close(adapter.null_tokens(who), adapter.projector(nobody))
    more = person(adapter, 3)
    if family == "raw face":
        zeros = torch.zeros(3, 512, dtype=torch.float64)
        close(adapter.null_tokens(more), adapter.projector.of_person({"face": zeros}, more.weight))
    else:  # the tokens of one photo
        assert adapter.null_tokens(more).shape == adapter.projector(nobody).shape


@pytest.mark.parametrize("family", ["plus", "full", "plus v2"])
def test_without_the_encoders_nobody_it_is_named(family, tmp_path):
    adapter, _ = built(family, tmp_path)
    who = person(adapter, 1, nulls=False)
    for use in (adapter.null_tokens, lambda who: check_identity(adapter, who)):
        with pytest.raises(IdentityMismatchError, match="ViT-H-14 makes of an empty picture"):
            use(who)
    assert bool(adapter.tokens(who).isfinite().all())


# --- identities of several families ----------------------------------------------------------


def test_one_identity_serves_two_families_under_other_names(tmp_path):
    faceid, _ = built("faceid", tmp_path)
    instant, _ = built("raw face", tmp_path)
    mine, other = person(faceid, 2), person(instant, 2, seed=8)
    both = Identity(features={"face": mine["face"], "face_2": other["face"]}, weight=torch.ones(2))
    for adapter, who in ((faceid, mine), (instant, other)):
        check_identity(adapter, both)
        assert torch.equal(adapter.tokens(both), adapter.tokens(who))
    with pytest.raises(IdentityMismatchError, match="antelopev2/glintr100.*buffalo_l/w600k_r50"):
        check_identity(instant, mine)


def test_raw_faces_serve_where_normed_ones_are_read(tmp_path):
    adapter, state = built("faceid", tmp_path)
    who = person(adapter, 1)
    raw = dataclasses.replace(adapter.needs["face"], output="raw")
    value = 17 * who["face"].value
    other = Identity(features={"face": Feature(reading=raw, value=value)}, weight=torch.ones(1))
    close(adapter.tokens(other).double(), adapter.tokens(who), 1e-6)


# --- the low-rank part -----------------------------------------------------------------------


def test_the_lora_is_carried_and_moves_with_the_adapter(tmp_path):
    adapter, _ = built("faceid", tmp_path)
    made = files.made("faceid", seed=5)["ip_adapter"]
    assert len(adapter.low_rank_parts) == 8 * len(SMALL.layers)
    layer = SMALL.layers[1]
    part = adapter.low_rank_parts[f"{layer.path}.attn1.to_out.0"]
    down = made[f"{layer.number - 1}.to_out_lora.down.weight"].double()
    up = made[f"{layer.number - 1}.to_out_lora.up.weight"].double()
    x = torch.randn(3, layer.width, dtype=torch.float64)
    close(part(x), x @ down.T @ up.T)
    text = adapter.low_rank_parts[f"{layer.path}.attn2.to_k"]
    assert (text.down.in_features, text.up.out_features) == (SMALL.context, layer.width)
    count = sum(p.numel() for p in adapter.parameters())
    assert count == sum(
        t.numel() for group in files.made("faceid").values() for t in group.values()
    )
    assert adapter.half().low_rank_parts[f"{layer.path}.attn2.to_q"].up.weight.dtype == torch.half


def test_rebuilt_it_has_the_same_parts(tmp_path):
    adapter, _ = built("plus v2", tmp_path)
    again = adapter.rebuilt(adapter.state_dict())
    assert again.low_rank_parts.keys() == adapter.low_rank_parts.keys()
    for name, tensor in adapter.state_dict().items():
        assert again.state_dict()[name].data_ptr() == tensor.data_ptr()
    who = person(adapter)
    assert torch.equal(again.tokens(who), adapter.tokens(who))
    assert adapter.config == again.config
    assert built("portrait", tmp_path)[0].low_rank_parts == {}
