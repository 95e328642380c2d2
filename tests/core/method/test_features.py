"""Features and their readings: what fits what, and what can be had from what."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from infinite_id_core.errors import IdentityMismatchError, OptionError
from infinite_id_core.method.adapter import check_identity, infinite_id_adapter
from infinite_id_core.method.face_clip import (
    IdentityConfig,
    face_clip_config,
    face_clip_identity,
)
from infinite_id_core.method.features import MAX_WIDTH, Feature, Reading
from infinite_id_core.method.identity import Identity
from infinite_id_core.method.records import AdapterConfig

RAW = Reading(model="buffalo_l/w600k_r50", output="raw", shape=(512,))
NORMED = dataclasses.replace(RAW, output="normed")
STATES = Reading(model="ViT-H-14", output="raw", shape=(257, 8))  # no embedding


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 20 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- readings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(), (0,), (-1,), (True,), (8.0,), ("8",), (MAX_WIDTH + 1,), (1,) * 5]
)
def test_impossible_shapes_are_named(shape):
    with pytest.raises(OptionError, match="shape of one reference"):
        Reading(model="m", output="o", shape=shape)


def test_normed_follows_from_raw_and_nothing_from_anything_else():
    assert RAW.towards(NORMED) == NORMED
    assert NORMED.towards(RAW) == NORMED
    assert RAW.towards(RAW) == RAW
    states = dataclasses.replace(STATES, output="normed")
    assert STATES.towards(states) == STATES  # tokens have no length
    other = dataclasses.replace(NORMED, model="antelopev2/glintr100")
    assert RAW.towards(other) == NORMED != other


# --- features --------------------------------------------------------------------------------


def test_a_raw_embedding_read_as_normed():
    raw = Feature(reading=RAW, value=drawn(3, 512), null=drawn(512, seed=1))
    found = raw.read_as(NORMED)
    assert found.reading == NORMED
    torch.testing.assert_close(found.value, raw.value / raw.value.norm(dim=1, keepdim=True))
    torch.testing.assert_close(found.null, raw.null / raw.null.norm())
    assert raw.read_as(RAW) is raw
    nobody = dataclasses.replace(raw, null=None).read_as(NORMED).null_value()
    assert nobody.shape == (1, 512) and not bool(nobody.any())


def test_what_cannot_be_had_names_both_sides():
    normed = Feature(reading=NORMED, value=drawn(1, 512))
    with pytest.raises(IdentityMismatchError, match="wanted has 'raw', found has 'normed'"):
        normed.read_as(RAW)
    other = dataclasses.replace(NORMED, model="other")
    with pytest.raises(IdentityMismatchError, match="wanted has 'other', found has 'buffalo_l"):
        Feature(reading=RAW, value=drawn(1, 512)).read_as(other)


@pytest.mark.parametrize(
    ("value", "null"),
    [((512,), None), ((), None), ((0, 512), None), ((1, 511), None), ((1, 1, 512), None),
     ((1, 512), (1, 512)), ((1, 512), (511,)), ((1, 512), ())],
)  # fmt: skip
def test_shapes_that_are_not_the_readings_are_named(value, null):
    nobody = None if null is None else torch.zeros(null)
    with pytest.raises(OptionError, match=r"read as \[512\]"):
        Feature(reading=RAW, value=torch.ones(value), null=nobody)


# --- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Face", "a.b", "../a", "a b", "9", "x" * 33, "fäce", "a\n"])
def test_names_that_files_cannot_have_are_refused(name):
    feature = Feature(reading=RAW, value=drawn(1, 512))
    with pytest.raises(OptionError, match="32 small letters"):
        Identity(features={name: feature}, weight=torch.ones(1))


def test_features_of_other_counts_are_named():
    features = {"face": Feature(reading=RAW, value=drawn(2, 512)),
                "clip": Feature(reading=STATES, value=drawn(3, 257, 8))}  # fmt: skip
    with pytest.raises(OptionError, match="'face': 2, 'clip': 3"):
        Identity(features=features, weight=torch.ones(2))
    with pytest.raises(OptionError, match="none"):
        Identity(features={}, weight=torch.ones(1))
    with pytest.raises(IdentityMismatchError, match="no 'pooled', only clip, face"):
        whole()["pooled"]


def whole(embedding: str = "normed", clip_width: int = 6) -> Identity:
    face = drawn(2, 512)
    return face_clip_identity(
        face=torch.nn.functional.normalize(face, dim=1) if embedding == "normed" else face,
        clip=drawn(2, 257, clip_width),
        weight=torch.ones(2),
        config=IdentityConfig(recogniser="r", clip_model="c", embedding=embedding, name="n"),
    )


def test_the_papers_two_features_and_their_record():
    who = whole("raw")
    config = IdentityConfig(recogniser="r", clip_model="c", embedding="raw", name="n")
    assert face_clip_config(who) == config
    assert face_clip_config(dataclasses.replace(who, features={"face": who["face"]})) is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        who.name = "other"  # type: ignore[misc]


# --- identities and adapters -----------------------------------------------------------------


def adapter(**changes: str):
    config = AdapterConfig(clip_width=6, context_width=4, recogniser="r", clip_model="c", **changes)
    return infinite_id_adapter(config, {"mid_block.attentions.0.transformer_blocks.0": 8})


def test_raw_fits_an_adapter_that_wants_normed_and_gives_its_tokens():
    two, raw = adapter(), whole("raw")
    check_identity(two, raw)
    torch.testing.assert_close(two.tokens(raw), two.tokens(whole()))
    torch.testing.assert_close(two.null_tokens(raw), two.null_tokens(whole()))


def test_normed_does_not_fit_an_adapter_that_wants_raw():
    message = "embedding: the adapter has 'raw', the identity has 'normed'"
    with pytest.raises(IdentityMismatchError, match=message):
        check_identity(adapter(embedding="raw"), whole())
    with pytest.raises(IdentityMismatchError, match="'raw'.*'normed'"):
        adapter(embedding="raw").tokens(whole())


def test_a_null_that_is_not_zeros_is_nobody():
    two, who = adapter(), whole()
    null = drawn(257, 6, seed=9)
    clip = dataclasses.replace(who["clip"], null=null)
    other = dataclasses.replace(who, features={**who.features, "clip": clip})
    wanted = two.projector({"face": torch.zeros(1, 512), "clip": null[None]})
    torch.testing.assert_close(two.null_tokens(other), wanted)
    assert torch.equal(two.tokens(other), two.tokens(who))
    assert not torch.equal(two.null_tokens(other), two.null_tokens(who))


def test_more_features_than_an_adapter_reads_do_no_harm():
    two, who = adapter(), whole()
    pooled = Feature(reading=Reading(model="m", output="pooled", shape=(4,)), value=drawn(2, 4))
    more = dataclasses.replace(who, features={**who.features, "pooled": pooled})
    check_identity(two, more)
    assert torch.equal(two.tokens(more), two.tokens(who))
