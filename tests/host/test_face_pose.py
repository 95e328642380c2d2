"""Face Pose: InstantID's ControlNet reads the person and nobody, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.controlnet
import pytest
import torch

import nodes as host_nodes

from .face_pose import TOKENS, made_control_net, made_kit, photo
from .runs import SIZE, error, run
from .tiny_sdxl import CONTEXT, conditioning, latent

Contexts = list[torch.Tensor]


@pytest.fixture(scope="module")
def kit(pack: Any, model: Any) -> Any:
    return made_kit(pack, model)


@pytest.fixture(scope="module")
def picture() -> torch.Tensor:
    return photo()


@pytest.fixture(scope="module")
def identity(kit: Any, picture: torch.Tensor) -> Any:
    return kit.person(picture)[0]


@pytest.fixture(scope="module")
def net() -> Any:
    return made_control_net()


@pytest.fixture
def pose(kit: Any, identity: Any, net: Any, picture: torch.Tensor) -> Any:
    """The node, for the tiny model's small pictures."""

    def execute(**changes: Any) -> tuple[Any, Any, torch.Tensor]:
        given = {
            "positive": conditioning(1), "negative": conditioning(2), "control_net": net,
            "infinite_id": kit, "identity": identity, "pose": picture,
            "latent": {"samples": latent(2, SIZE)}, "strength": 0.8, "start_percent": 0.0,
            "end_percent": 1.0, **changes,
        }  # fmt: skip
        made = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDFacePose"].execute(**given)
        return tuple(made.args)  # type: ignore[return-value]

    return execute


@pytest.fixture(scope="module")
def tokens(kit: Any, identity: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the person and of nobody, ``[16, C]``."""
    adapter = kit.adapter.adapter
    found = adapter.tokens(identity)[0], adapter.null_tokens(identity)[0]
    assert all(list(x.shape) == [TOKENS, CONTEXT] for x in found)
    assert error(found[0], found[1]) > 0.01
    return found


@contextmanager
def seen_by(control_net: Any) -> Iterator[Contexts]:
    """What a ControlNet is given in place of a prompt, call by call."""
    seen: Contexts = []
    network = control_net.control_model
    handle = network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["context"].clone()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def are_pairs(seen: Contexts, positive: torch.Tensor, negative: torch.Tensor) -> bool:
    """Whether half of the rows of all calls had the one context, and half the other."""
    rows = torch.cat(seen)
    close = [
        [bool((row - x).abs().max() < 1e-5) for x in (positive, negative)]
        if row.shape == positive.shape else [False, False] for row in rows
    ]  # fmt: skip
    return close.count([True, False]) == close.count([False, True]) == len(rows) / 2 > 0


def test_it_reads_the_person_and_nobody(
    pose: Any, net: Any, model: Any, tokens: tuple[torch.Tensor, torch.Tensor]
) -> None:
    positive, negative, _ = pose()
    with seen_by(net) as seen:
        made = run(model, positive=positive, negative=negative)
    assert are_pairs(seen, *tokens) and not are_pairs(seen, tokens[0], tokens[0])
    assert len(seen) == 3  # the host computes the positive and the negative of a step together
    assert made.isfinite().all() and error(made, run(model)) > 1e-3
    assert "control" not in conditioning(1)[0][1]


def test_each_side_has_its_own(pose: Any, net: Any, model: Any, tokens: Any) -> None:
    """With guidance off the host computes the positive alone."""
    positive, negative, _ = pose()
    with seen_by(net) as seen:
        run(model, positive=positive, negative=negative, cfg=1.0)
    assert all((row - tokens[0]).abs().max() < 1e-5 for row in torch.cat(seen))


@pytest.mark.parametrize("preset", ["balanced", "one stream"])
def test_with_the_person_in_the_model(
    preset: str, pose: Any, net: Any, pack: Any, model: Any, kit: Any, identity: Any, tokens: Any
) -> None:
    options = pack.infinite_id_core.method.attention.STREAM_PRESETS[preset]
    apply = pack.infinite_id_core.hosts.comfyui.apply_identity
    patched = apply(model, kit.adapter, identity, options=options)
    positive, negative, _ = pose()
    with seen_by(net) as seen:
        made = run(patched, positive=positive, negative=negative)
    assert are_pairs(seen, *tokens)
    rows = sum(len(call) for call in seen)
    assert rows == 3 * 2 * 2 * (2 if preset == "balanced" else 1)  # steps, sides, pictures, streams
    without = run(patched)
    assert made.isfinite().all() and error(made, without) > 1e-3
    assert error(made, run(model, positive=positive, negative=negative)) > 1e-3
    assert error(run(patched), without) == 0.0


@pytest.mark.parametrize("first", ["the host's", "ours"])
def test_other_controlnets_in_a_chain_read_the_prompt(
    first: str, pose: Any, net: Any, model: Any, tokens: Any
) -> None:
    other = made_control_net(seed=33)
    hint = torch.rand(1, SIZE * 8, SIZE * 8, 3, generator=torch.Generator().manual_seed(1))

    def plain(positive: Any, negative: Any) -> Any:
        apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
        return apply(positive, negative, other, hint, 1.0, 0.0, 1.0)

    sides = conditioning(1), conditioning(2)
    if first == "ours":
        both = plain(*pose()[:2])
    else:
        both = pose(**dict(zip(("positive", "negative"), plain(*sides), strict=True)))[:2]
    with seen_by(net) as ours, seen_by(other) as others:
        made = run(model, positive=both[0], negative=both[1])
    assert are_pairs(ours, *tokens)
    assert are_pairs(others, *(side[0][0][0] for side in sides))
    for alone in (pose()[:2], plain(*sides)):
        assert error(made, run(model, positive=alone[0], negative=alone[1])) > 1e-3


def test_the_order_of_a_chain_does_not_matter(pose: Any, net: Any, model: Any) -> None:
    """What ControlNets add is summed."""
    hint, other = torch.rand(1, 64, 64, 3), made_control_net(seed=33)
    apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
    a = apply(*pose()[:2], other, hint, 1.0, 0.0, 1.0)
    b = apply(conditioning(1), conditioning(2), other, hint, 1.0, 0.0, 1.0)
    b = pose(positive=b[0], negative=b[1])[:2]
    made = [run(model, positive=positive, negative=negative) for positive, negative in (a, b)]
    assert error(*made) < 1e-5


def test_two_people_keep_their_own(
    pose: Any, pack: Any, net: Any, model: Any, kit: Any, identity: Any, tokens: Any
) -> None:
    face = identity.features["face"]
    feature = pack.infinite_id_core.method.features.Feature
    turned = feature(reading=face.reading, value=-face.value)
    second = type(identity)(features={"face": turned}, weight=identity.weight)
    other = made_control_net(seed=33)
    one = pose()
    both = pose(positive=one[0], negative=one[1], control_net=other, identity=second)
    with seen_by(net) as first, seen_by(other) as last:
        run(model, positive=both[0], negative=both[1])
    adapter = kit.adapter.adapter
    assert are_pairs(first, *tokens)
    assert are_pairs(last, adapter.tokens(second)[0], adapter.null_tokens(second)[0])
    assert not are_pairs(last, *tokens)


def test_one_network_applied_by_hand_gives_the_same(
    pose: Any, net: Any, model: Any, tokens: Any
) -> None:
    """The host's own nodes, with the tokens where the host looks for a ControlNet's prompt."""
    positive, negative, drawing = pose(strength=0.6)
    apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
    sides = [
        conditioning(seed, cross_attn_controlnet=x[None])
        for seed, x in zip((1, 2), tokens, strict=True)
    ]
    by_hand = apply(*sides, net, drawing, 0.6, 0.0, 1.0)
    wanted = run(model, positive=by_hand[0], negative=by_hand[1])
    assert error(run(model, positive=positive, negative=negative), wanted) < 1e-6


def test_it_acts_in_its_range_and_by_its_strength(pose: Any, net: Any, model: Any) -> None:
    with seen_by(net) as seen:
        positive, negative, _ = pose(end_percent=0.5)
        run(model, positive=positive, negative=negative, steps=8)
    assert 0 < len(seen) < 8
    positive, negative, drawing = pose(strength=0.0)
    assert positive == conditioning_of(1) and negative == conditioning_of(2)
    assert float(drawing.max()) == 1.0
    made = [run(model, **sides(pose(strength=s))) for s in (0.4, 0.8)]
    plain = run(model)
    assert 1e-3 < error(made[0], plain) < error(made[1], plain)


class conditioning_of:
    """Equal to the conditioning of this seed, untouched."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, list)
        (text, details), (wanted, _) = other[0], conditioning(self.seed)[0]
        return torch.equal(text, wanted) and set(details) == {"pooled_output"}


def sides(made: Any) -> dict[str, Any]:
    return {"positive": made[0], "negative": made[1]}


def test_the_drawing_shows_the_face_where_the_photo_has_it(
    pose: Any, picture: torch.Tensor
) -> None:
    """The discs of a photo of 256 pixels, in the middle of a picture twice as high."""
    assert list(picture.shape) == [1, 256, 256, 3]
    drawing = pose(latent={"samples": torch.zeros(1, 4, 64, 32)})[2]
    assert list(drawing.shape) == [1, 512, 256, 3]
    seen = {"left eye": (94, 126), "right of the mouth": (154, 188)}  # as people see the photo
    for (x, y), colour in zip(seen.values(), ([1, 0, 0], [1, 0, 1]), strict=True):
        found = (drawing[0] == torch.tensor(colour, dtype=torch.float32)).all(-1).nonzero()
        assert torch.allclose(found.float().mean(0), torch.tensor([y + 128.0, x]), atol=8.0)


def test_a_batch_of_photos_gives_each_picture_its_pose(
    pose: Any, picture: torch.Tensor, net: Any, model: Any
) -> None:
    photos = torch.cat([picture, picture.flip(2), picture])
    drawings = pose(pose=photos)[2]
    assert list(drawings.shape) == [2, SIZE * 8, SIZE * 8, 3]  # no more than there are pictures
    assert not torch.equal(drawings[0], drawings[1])
    assert torch.equal(drawings[:1], pose()[2])
    made = run(model, **sides(pose(pose=photos)))
    alone = run(model, **sides(pose()))
    assert error(made[0], alone[0]) < 1e-5 < 1e-4 < error(made[1], alone[1])


# --- what does not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["faceid", "plus", "base H"])
def test_another_family_is_named(
    family: str, pose: Any, errors: Any, pack: Any, model: Any
) -> None:
    other = made_kit(pack, model, family)
    with pytest.raises(errors.NotInstantIDError, match="ip-adapter.bin") as caught:
        pose(infinite_id=other)
    assert "IP-Adapter" in str(caught.value)


def test_portrait_unnorm_is_not_instantid(pose: Any, errors: Any, pack: Any, model: Any) -> None:
    other = made_kit(pack, model, recogniser="buffalo_l/w600k_r50")
    with pytest.raises(errors.NotInstantIDError, match="portrait-unnorm"):
        pose(infinite_id=other)


def test_a_controlnet_of_another_width_is_named(pose: Any, errors: Any) -> None:
    with pytest.raises(errors.NotIdentityNetError, match=f"reads {CONTEXT} numbers.*reads 24"):
        pose(control_net=made_control_net(context=24))


def test_a_controlnet_without_attention_is_named(pose: Any, errors: Any) -> None:
    adapter = comfy.controlnet.T2IAdapter(torch.nn.Identity(), 3, 8, "nearest-exact")
    with pytest.raises(errors.NotIdentityNetError, match="a T2IAdapter, which has no"):
        pose(control_net=adapter)


def test_an_identity_of_another_recogniser_is_named(
    pose: Any, errors: Any, pack: Any, model: Any
) -> None:
    other = made_kit(pack, model, recogniser="antelopev2/glintr100")
    with pytest.raises(errors.IdentityMismatchError, match="antelopev2"):
        pose(infinite_id=other)


def test_a_photo_without_a_face_is_named(pose: Any, errors: Any) -> None:
    with pytest.raises(errors.NoFaceError, match="No face was found"):
        pose(pose=torch.zeros(1, 128, 128, 3))


@pytest.mark.parametrize("shape", [(1, 4, 2, 8, 8), (0, 4, 8, 8), (4, 8)])
def test_a_latent_of_another_kind_is_named(shape: tuple[int, ...], pose: Any, errors: Any) -> None:
    with pytest.raises(errors.WrongInputError, match="latent: expected"):
        pose(latent={"samples": torch.zeros(shape)})


def test_a_range_that_ends_before_it_starts_is_named(pose: Any, errors: Any) -> None:
    with pytest.raises(errors.OptionError, match="start <= end"):
        pose(start_percent=0.7, end_percent=0.2)


def test_a_control_moved_without_its_tokens_is_named(pose: Any, errors: Any, model: Any) -> None:
    positive, negative, _ = pose()
    moved = conditioning(1, control=positive[0][1]["control"])
    with pytest.raises(errors.PatchConflictError, match="Put Face Pose after"):
        run(model, positive=moved, negative=negative)


# --- the host's other uses of a ControlNet ---------------------------------------------------


def test_the_host_finds_its_models_and_frees_it(pose: Any, net: Any, model: Any) -> None:
    positive, negative, _ = pose()
    control = positive[0][1]["control"]
    assert negative[0][1]["control"] is control
    assert control.get_models() == [net.control_model_wrapped]
    run(model, positive=positive, negative=negative)
    assert control.control.cond_hint is None and control.timestep_range is None
    assert control.copy().get_models() == control.get_models()
