"""Mappers and K/V pairs: their shapes, their sums, their names, and what they go with."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from infinite_id_core.errors import (
    FeatureError,
    IdentityMismatchError,
    ModelMismatchError,
    OptionError,
)
from infinite_id_core.method.adapter import (
    Adapter,
    check_identity,
    check_layers,
    infinite_id_adapter,
)
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.method.identity import Identity, stack
from infinite_id_core.method.records import AdapterConfig
from infinite_id_core.sdxl.layers import CrossAttentionLayer, layers_from_ldm

from .test_layers import SDXL, ldm

FIRST = "down_blocks.1.attentions.0.transformer_blocks.0"
MIDDLE = "mid_block.attentions.0.transformer_blocks.1"
D, C, T = 6, 4, 3


def config(**changes: object) -> AdapterConfig:
    values = {"clip_width": D, "context_width": C, "face_tokens": T}
    return AdapterConfig(**{**values, "recogniser": "r", "clip_model": "c", **changes})


def made(seed: int = 0, **changes: object) -> Adapter:
    torch.manual_seed(seed)
    adapter = infinite_id_adapter(config(**changes), {FIRST: 8, MIDDLE: 16}).double()
    with torch.no_grad():
        for parameter in adapter.parameters():  # norms start at 1 and 0, which would hide errors
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
    return adapter


def identity(references: int = 1, width: int = D, **changes: str) -> Identity:
    values = {"recogniser": "r", "clip_model": "c", **changes}
    return face_clip_identity(
        face=torch.randn(references, 512),
        clip=torch.randn(references, 257, width),
        weight=torch.arange(1.0, references + 1),
        config=IdentityConfig(**values),
    )


def sdxl(clip_width: int = 1280) -> Adapter:
    layers = layers_from_ldm(ldm(SDXL))
    widths = {layer.path: layer.width for layer in layers}
    with torch.device("meta"):
        record = config(clip_width=clip_width, context_width=2048, face_tokens=4)
        return infinite_id_adapter(record, widths)


# --- shapes and names ------------------------------------------------------------------------


@pytest.mark.parametrize("clip_width", [1280, 1664])  # ViT-H, ViT-bigG
def test_mappers_of_the_paper(clip_width):
    adapter = sdxl(clip_width)
    shapes = {
        n: tuple(p.shape) for n, p in adapter.state_dict().items() if not n.startswith("layers.")
    }
    assert shapes == {
        "clip_mapper.proj_in.weight": (clip_width, clip_width),
        "clip_mapper.proj_in.bias": (clip_width,),
        "clip_mapper.proj_out.weight": (2048, clip_width),
        "clip_mapper.proj_out.bias": (2048,),
        "clip_mapper.norm.weight": (2048,),
        "clip_mapper.norm.bias": (2048,),
        "face_mapper.proj_in.weight": (1024, 512),
        "face_mapper.proj_in.bias": (1024,),
        "face_mapper.proj_out.weight": (4 * 2048, 1024),
        "face_mapper.proj_out.bias": (4 * 2048,),
        "face_mapper.norm.weight": (2048,),
        "face_mapper.norm.bias": (2048,),
    }
    tokens = adapter.projector({
        "face": torch.empty(2, 512, device="meta"),
        "clip": torch.empty(2, 257, clip_width, device="meta"),
    })  # fmt: skip
    assert tokens.shape == (2, 257 + 4, 2048)


def test_parameters_of_the_full_adapter():
    sizes = {n: p.numel() for n, p in sdxl().state_dict().items()}
    pairs = {n: size for n, size in sizes.items() if n.startswith("layers.")}
    assert len(pairs) == 140
    assert sum(pairs.values()) == 340_787_200  # 340.8 M, as published IP-Adapter files
    mappers = 1280 * 1280 + 1280 + 1280 * 2048 + 3 * 2048
    mappers += 512 * 1024 + 1024 + 1024 * 8192 + 8192 + 2 * 2048
    assert sum(sizes.values()) - sum(pairs.values()) == mappers


def test_names_are_the_files_contract():
    mappers = [
        f"{mapper}.{part}.{kind}"
        for mapper in ("clip_mapper", "face_mapper")
        for part in ("proj_in", "proj_out", "norm")
        for kind in ("weight", "bias")
    ]
    layers = [
        f"layers.{path}.{part}.weight" for path in (FIRST, MIDDLE) for part in ("to_k", "to_v")
    ]
    adapter = made()
    assert sorted(adapter.state_dict()) == sorted(mappers + layers)
    assert adapter.widths == {FIRST: 8, MIDDLE: 16}
    assert adapter.key_value(MIDDLE).to_v.weight.shape == (16, C)


# --- sums ------------------------------------------------------------------------------------


def mapped(adapter: Adapter, name: str, row: list[float], tokens: int) -> list[list[float]]:
    """Linear, GELU, Linear, LayerNorm of one vector, number by number."""
    s = {n: p.tolist() for n, p in adapter.state_dict().items() if n.startswith(name)}

    def linear(part: str, x: list[float]) -> list[float]:
        rows, bias = s[f"{name}.{part}.weight"], s[f"{name}.{part}.bias"]
        return [sum(map(float.__mul__, w, x)) + b for w, b in zip(rows, bias, strict=True)]

    hidden = [0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in linear("proj_in", row)]
    flat = linear("proj_out", hidden)
    out = []
    for t in range(tokens):
        part = flat[t * C : (t + 1) * C]
        mean = sum(part) / C
        deviation = math.sqrt(sum((x - mean) ** 2 for x in part) / C + 1e-5)
        scale, shift = s[f"{name}.norm.weight"], s[f"{name}.norm.bias"]
        out.append(
            [(x - mean) / deviation * a + b for x, a, b in zip(part, scale, shift, strict=True)]
        )
    return out


def test_tokens_are_equation_4():
    adapter = made()
    who = identity(2)
    face, clip = (who[name].value for name in ("face", "clip"))
    expected = []
    for r in range(2):
        for token in clip[r].tolist():
            expected += mapped(adapter, "clip_mapper", token, 1)
        expected += mapped(adapter, "face_mapper", face[r].tolist(), T)
    found = adapter.tokens(who)
    assert found.shape == (1, 2 * (257 + T), C)
    assert torch.allclose(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-10)


def test_references_stand_side_by_side():
    adapter = made()
    people = [identity(), identity()]
    apart = [adapter.tokens(person) for person in people]
    assert torch.allclose(adapter.tokens(stack(people)), torch.cat(apart, dim=1), atol=1e-12)


def test_each_token_has_its_references_weight():
    weight = made().token_weight(identity(3))
    count = 257 + T
    assert weight.shape == (3 * count,)
    assert bool((weight.view(3, count) == torch.tensor([[1.0], [2.0], [3.0]])).all())


def test_keys_and_values_are_plain_projections():
    pair = made().key_value(FIRST)
    tokens = torch.randn(2, 5, C, dtype=torch.float64)
    k, v = pair(tokens)
    assert torch.allclose(k, torch.einsum("bmc,wc->bmw", tokens, pair.to_k.weight), atol=1e-12)
    assert torch.allclose(v, torch.einsum("bmc,wc->bmw", tokens, pair.to_v.weight), atol=1e-12)
    assert len(list(pair.parameters())) == 2  # no bias, as SDXL's own


def test_copies_of_the_text_projections():
    adapter = made()
    text: dict[str, tuple[Tensor, Tensor]] = {
        path: (torch.randn(width, C), torch.randn(width, C))
        for path, width in adapter.widths.items()
    }
    adapter.copy_text_projections(text)
    for path, (k, v) in text.items():
        pair = adapter.key_value(path)
        assert torch.equal(pair.to_k.weight, k.double())
        assert torch.equal(pair.to_v.weight, v.double())
        before = k.clone()
        with torch.no_grad():
            pair.to_k.weight.add_(1.0)
        assert torch.equal(k, before)  # a copy: training leaves the frozen model alone
        assert pair.to_k.weight.requires_grad


# --- what goes together ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "adapter", "person", "left", "right"),
    [
        ("recogniser", {"recogniser": "antelopev2"}, {"recogniser": "buffalo_l"},
         "'antelopev2'", "'buffalo_l'"),
        ("embedding", {"embedding": "raw"}, {}, "'raw'", "'normed'"),
        ("clip_model", {"clip_model": "ViT-bigG-14"}, {"clip_model": "ViT-H-14"},
         "'ViT-bigG-14'", "'ViT-H-14'"),
        ("clip_layer", {"clip_layer": "penultimate"}, {}, "'penultimate'", "'last'"),
        ("clip_width", {"clip_width": 1664}, {"width": 1280}, "1664", "1280"),
        ("face_width", {"face_width": 256}, {}, "256", "512"),
    ],
)  # fmt: skip
def test_an_identity_of_other_encoders_is_named_on_both_sides(what, adapter, person, left, right):
    other = identity(**{"width": adapter.get("clip_width", D), **person})
    with pytest.raises(IdentityMismatchError) as caught:
        check_identity(made(**adapter), other)
    message = str(caught.value)
    assert f"{what}: the adapter has {left}, the identity has {right}." in message
    assert message.count(" has ") == 2  # and nothing that fits


def test_an_identity_that_fits_passes():
    check_identity(made(), identity(3, name="Anna"))


def layer(path: str, width: int = 8, context: int = C) -> CrossAttentionLayer:
    return CrossAttentionLayer(path=path, block=("input", 4, 0), width=width, context_width=context)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([layer(FIRST)], ["2 layers", "the model has 1", f"not in the model: {MIDDLE}"]),
        ([layer(FIRST), layer(MIDDLE, 16), layer("up.0")], ["Missing in the adapter: up.0"]),
        ([layer(FIRST), layer(MIDDLE, 32)], [f"of another width: {MIDDLE}"]),
        ([layer(FIRST, context=7), layer(MIDDLE, 16, 7)], ["context width 4", "and 7"]),
        ([layer(f"up.{i}") for i in range(9)], ["up.0, up.1, up.2 and 6 more"]),
    ],
)
def test_a_model_of_other_layers_is_named_on_both_sides(layers, says):
    with pytest.raises(ModelMismatchError) as caught:
        check_layers({FIRST: 8, MIDDLE: 16}, C, layers)
    assert all(part in str(caught.value) for part in says), caught.value


def test_a_model_that_fits_passes():
    check_layers({FIRST: 8, MIDDLE: 16}, C, [layer(MIDDLE, 16), layer(FIRST)])


# --- the configuration -----------------------------------------------------------------------


def test_the_configuration_comes_back():
    made_up = config(
        base_model="sdxl", training_step=7, dataset_fingerprint="ab", licence_note="n", face_width=9
    )
    assert AdapterConfig.from_json(made_up.to_json()) == made_up
    assert set(made_up.to_json()) == {
        "clip_width", "clip_layer", "context_width", "face_width", "face_tokens", "recogniser",
        "embedding", "clip_model", "base_model", "training_step", "dataset_fingerprint",
        "licence_note",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"clip_width": None}, "clip_width"),
        ({"clip_width": "6"}, "clip_width"),
        ({"clip_width": 6.0}, "clip_width"),
        ({"clip_width": True}, "clip_width"),
        ({"clip_width": 0}, "clip_width"),
        ({"face_tokens": -1}, "face_tokens"),
        ({"context_width": 2**16 + 1}, "context_width"),
        ({"training_step": -1}, "training_step"),
        ({"recogniser": 7}, "recogniser"),
        ({"embedding": "unit"}, "unit"),
        ({"clip_layer": "first"}, "first"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_impossible_entries_are_named(changes, says):
    with pytest.raises(OptionError, match=says):
        AdapterConfig.from_json({**config().to_json(), **changes})


@pytest.mark.parametrize("name", ["clip_width", "context_width", "recogniser", "clip_model"])
def test_required_entries_are_named(name):
    values = config().to_json()
    del values[name]
    with pytest.raises(OptionError, match=name):
        AdapterConfig.from_json(values)


def test_the_configuration_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().clip_width = 7  # type: ignore[misc]


@pytest.mark.parametrize("feature", ["face", "clip"])
def test_features_that_overflow_are_named(feature):
    """1e38 is finite itself, and infinite after the mappers: no picture may come of it."""
    adapter, who = made().float(), identity()
    assert bool(adapter.tokens(who).isfinite().all())
    value = torch.full_like(who[feature].value, 1e38)
    huge = dataclasses.replace(who[feature], value=value)
    with pytest.raises(FeatureError, match=f"{feature} 1e\\+38"):
        adapter.tokens(dataclasses.replace(who, features={**who.features, feature: huge}))
