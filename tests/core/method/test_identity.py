"""Identities: mixing them, and who may be mixed."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from infinite_id_core.errors import IdentityMismatchError, OptionError
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.method.identity import Identity, average, interpolate, stack

D = 8


def made(
    seed: int = 0,
    n: int = 1,
    weight: list[float] | None = None,
    dtype: torch.dtype = torch.float32,
    width: int = D,
    **config: str,
) -> Identity:
    generator = torch.Generator().manual_seed(seed)
    face = 20 * torch.randn(n, 512, generator=generator)
    settings = {"recogniser": "buffalo_l/w600k_r50", "clip_model": "ViT-H-14", **config}
    raw = settings.get("embedding") == "raw"
    return face_clip_identity(
        face=face if raw else normalize(face, dim=1),
        clip=torch.randn(n, 257, width, generator=generator).to(dtype),
        weight=torch.tensor(weight or [1.0] * n),
        config=IdentityConfig(**settings),
    )


def longer(identity: Identity, by: Any) -> Identity:
    """The face embeddings of other lengths."""
    face = dataclasses.replace(identity["face"], value=identity["face"].value * by)
    return dataclasses.replace(identity, features={**identity.features, "face": face})


def same(a: Tensor, b: Tensor) -> bool:
    """To 1e-6 of the largest number: where terms cancel, no more can be asked of float32."""
    return bool(torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max())))


# --- stacking --------------------------------------------------------------------------------


def test_stack_puts_all_references_side_by_side():
    a, b = made(1, 2, [1.0, 0.5], name="Anna"), made(2, 1, [3.0], name="Bea")
    found = stack([a, b], [2.0, 0.5])
    assert found.references == 3 and found["clip"].reading.shape == (257, D)
    assert torch.equal(found["face"].value, torch.cat([a["face"].value, b["face"].value]))
    assert torch.equal(found["clip"].value, torch.cat([a["clip"].value, b["clip"].value]))
    assert found.weight.tolist() == [2.0, 1.0, 1.5]
    assert found.readings == a.readings and found.name == "Anna + Bea"


def test_stack_without_weights_keeps_them():
    found = stack([made(1, 2, [1.0, 0.5]), made(2)])
    assert found.weight.tolist() == [1.0, 0.5, 1.0]
    assert found.name == ""  # nobody has a name


@pytest.mark.parametrize(
    ("identities", "weights", "says"),
    [
        ([], None, "none"),
        ([made(1), made(2)], [1.0], "2 identities"),
        ([made(1), made(2)], [1.0, 2.0, 3.0], "got 3"),
        ([made(1), made(2)], [1.0, 0.0], "positive"),
        ([made(1), made(2)], [1.0, -1.0], "positive"),
        ([made(1)], [float("nan")], "positive"),
        ([made(1)], [float("inf")], "positive"),
    ],
)
def test_stack_names_bad_input(identities, weights, says):
    with pytest.raises(OptionError, match=says):
        stack(identities, weights)


# --- averaging -------------------------------------------------------------------------------


def test_average_of_normed_faces_has_length_one():
    identity = made(1, 3, [1.0, 2.0, 5.0])
    found = average(identity)
    share = torch.tensor([1.0, 2.0, 5.0]) / 8
    assert found.references == 1 and found.weight.tolist() == [1.0]
    mean = (share.view(3, 1) * identity["face"].value).sum(0)
    assert float(mean.norm()) < 0.8  # the mean of unit vectors is shorter
    assert same(found["face"].value[0], mean / mean.norm())
    assert same(found["clip"].value[0], torch.einsum("n,nmd->md", share, identity["clip"].value))
    assert found.readings == identity.readings and found.name == identity.name


def test_average_of_raw_faces_has_their_mean_length():
    identity = made(1, 2, [3.0, 1.0], embedding="raw")
    identity = longer(identity, torch.tensor([[1.0], [2.0]]))
    found = average(identity)["face"].value[0]
    lengths = identity["face"].value.norm(dim=1)
    assert float(found.norm()) == pytest.approx(float(0.75 * lengths[0] + 0.25 * lengths[1]))
    mean = 0.75 * identity["face"].value[0] + 0.25 * identity["face"].value[1]
    assert float(torch.cosine_similarity(found, mean, dim=0)) == pytest.approx(1.0, abs=1e-6)


def test_average_keeps_half_precision_and_computes_in_full():
    identity = made(1, 4, [1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    found = average(identity)
    assert found["clip"].value.dtype == torch.float16 and found["face"].value.dtype == torch.float32
    share = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    exact = torch.einsum("n,nmd->md", share, identity["clip"].value.double())
    # One rounding to half, at the end: at most half of its last bit, 2^-11 of the number. The
    # float32 sum before it is 1e-6 off at most; a sum in half would be 1e-3 off.
    torch.testing.assert_close(found["clip"].value[0].double(), exact, rtol=2**-11, atol=1e-6)


# --- interpolation ---------------------------------------------------------------------------


def test_the_ends_of_the_ratio_are_the_people_themselves():
    a, b = made(1, 2, [1.0, 0.5]), made(2)
    assert interpolate(a, b, 0.0) is a
    assert interpolate(a, b, 1.0) is b


@pytest.mark.parametrize("embedding", ["normed", "raw"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_interpolation_is_a_straight_line(ratio, embedding):
    a, b = made(1, embedding=embedding, name="A"), made(2, embedding=embedding, name="B")
    b = longer(b, 3 if embedding == "raw" else 1)
    found = interpolate(a, b, ratio)
    assert same(found["clip"].value, (1 - ratio) * a["clip"].value + ratio * b["clip"].value)
    line = (1 - ratio) * a["face"].value + ratio * b["face"].value
    length = 1.0
    if embedding == "raw":
        length = float((1 - ratio) * a["face"].value.norm() + ratio * b["face"].value.norm())
    assert same(found["face"].value, line / line.norm() * length)
    assert found.name == "A + B"


def test_interpolation_counts_people_not_references():
    """Three photos of one person do not outweigh one photo of the other."""
    a, b = made(1, 3, [2.0, 2.0, 4.0]), made(2)
    assert same(interpolate(a, b, 0.5)["face"].value, interpolate(average(a), b, 0.5)["face"].value)
    towards_a = torch.cosine_similarity(
        interpolate(a, b, 0.5)["face"].value, average(a)["face"].value
    )
    towards_b = torch.cosine_similarity(interpolate(a, b, 0.5)["face"].value, b["face"].value)
    assert float(towards_a) == pytest.approx(float(towards_b), abs=1e-5)


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan"), float("inf")])
def test_a_ratio_out_of_range_is_named(ratio):
    with pytest.raises(OptionError, match="ratio"):
        interpolate(made(1), made(2), ratio)


# --- who may be mixed ------------------------------------------------------------------------

OTHERS = [
    ("recogniser", {"recogniser": "antelopev2/glintr100"}, "buffalo_l/w600k_r50",
     "antelopev2/glintr100"),
    ("embedding", {"embedding": "raw"}, "normed", "raw"),
    ("clip_model", {"clip_model": "ViT-bigG-14"}, "ViT-H-14", "ViT-bigG-14"),
    ("clip_layer", {"clip_layer": "penultimate"}, "last", "penultimate"),
    ("clip_width", {"width": 12}, "8", "12"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "changes", "left", "right"), OTHERS)
@pytest.mark.parametrize("ratio", [None, 0.0, 0.5, 1.0])
def test_other_encoders_are_named_on_both_sides(what, changes, left, right, ratio):
    a, b = made(1), made(2, **changes)
    with pytest.raises(IdentityMismatchError) as caught:
        stack([a, a, b]) if ratio is None else interpolate(a, b, ratio)
    message = str(caught.value)
    assert f"{what}: " in message and left in message and right in message
    assert all(f"{other[0]}: " not in message for other in OTHERS if other[0] != what)


def test_the_name_is_no_mismatch():
    assert stack([made(1, name="a"), made(2, name="b")]).references == 2


# --- the null identity -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_null_identity_is_zeros_before_the_mappers(dtype):
    who = made(1, 5, dtype=dtype)
    face, clip = (who[name].null_value() for name in ("face", "clip"))
    assert face.shape == (1, 512) and clip.shape == (1, 257, D)
    assert clip.dtype == dtype and face.dtype == torch.float32
    assert not bool(face.any()) and not bool(clip.any())


# --- what an identity is ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("face", "clip", "weight"),
    [
        ((0, 512), (0, 257, D), (0,)),
        ((512,), (1, 257, D), (1,)),
        ((), (1, 257, D), (1,)),
        ((1, 511), (1, 257, D), (1,)),
        ((1, 512), (1, 256, D), (1,)),
        ((1, 512), (257, D), (1,)),
        ((1, 512), (2, 257, D), (1,)),
        ((2, 512), (2, 257, D), (1,)),
        ((1, 512), (1, 257, D), (1, 1)),
        ((1, 512), (1, 257, D), ()),
    ],
)
def test_other_shapes_are_named(face, clip, weight):
    with pytest.raises(OptionError) as caught:
        face_clip_identity(
            face=torch.ones(face), clip=torch.ones(clip), weight=torch.ones(weight),
            config=IdentityConfig(recogniser="r", clip_model="c"),
        )  # fmt: skip
    assert all(str(list(shape)) in str(caught.value) for shape in (face, clip, weight))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight):
    with pytest.raises(OptionError, match="positive"):
        made(1, 2, [1.0, weight])


@pytest.mark.parametrize("values", [{"embedding": "unit"}, {"clip_layer": "first"}])
def test_unknown_settings_are_named(values):
    with pytest.raises(OptionError, match=next(iter(values.values()))):
        made(**values)
