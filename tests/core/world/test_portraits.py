"""The portraits: repeatable, legible in every style, and truly described by their captions."""

import numpy as np
import pytest

from microworld import captions
from microworld.__main__ import main
from microworld.captions import attributes_of
from microworld.people import write_people
from microworld.portraits import (
    ATTRIBUTE_NAMES,
    ATTRIBUTE_SIZES,
    HELD_OUT_SEEDS,
    STYLES,
    TRAIN_SEEDS,
    Attributes,
    Identity,
    Nuisance,
    face_box,
    face_landmarks,
    render,
)

PLAIN = Attributes(background=0, style=0, expression=0, accessory=0)
AVERAGE = Identity.from_array(np.full(12, 0.5))


def all_attributes():
    for index in np.ndindex(*ATTRIBUTE_SIZES):
        yield Attributes(**dict(zip(ATTRIBUTE_NAMES, index, strict=True)))


def test_same_arguments_give_the_same_bytes_and_another_seed_another_face():
    first = render(Identity.from_seed(5), PLAIN)
    np.testing.assert_array_equal(render(Identity.from_seed(5), PLAIN), first)
    assert first.shape == (128, 128, 3) and first.dtype == np.uint8
    assert np.abs(render(Identity.from_seed(6), PLAIN).astype(int) - first).mean() > 5


@pytest.mark.parametrize("size", [32, 64, 112, 200])
def test_any_size_shows_the_same_picture(size):
    small = render(AVERAGE, PLAIN, size=size)
    assert small.shape == (size, size, 3)
    assert abs(small.mean() - render(AVERAGE, PLAIN).mean()) < 6


def test_a_picture_too_small_to_show_a_face_is_refused():
    with pytest.raises(ValueError, match="at least 16"):
        render(AVERAGE, PLAIN, size=15)


@pytest.mark.parametrize("style", range(len(STYLES)))
@pytest.mark.parametrize("trait", range(12))
def test_every_trait_shows_in_every_style(style, trait):
    attributes = Attributes(background=0, style=style, expression=0, accessory=0)
    low, high = np.full(12, 0.5), np.full(12, 0.5)
    low[trait], high[trait] = 0.0, 1.0
    changed = np.abs(
        render(Identity.from_array(low), attributes).astype(int)
        - render(Identity.from_array(high), attributes)
    ).max(axis=2)
    assert (changed > 12).sum() >= 40


def test_landmarks_lie_on_what_they_name():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        identity, nuisance = Identity.from_seed(seed), Nuisance.sample(rng)
        points = face_landmarks(identity, nuisance, 256)
        picture = render(identity, PLAIN, nuisance, 256).astype(int)
        for x, y in points[:2]:  # pupils are the darkest thing about
            around = picture[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3]
            assert around.mean() < 110
        left, right, nose, mouth_left, mouth_right = points
        assert left[0] < right[0] and mouth_left[0] < mouth_right[0]
        assert max(left[1], right[1]) < nose[1] < min(mouth_left[1], mouth_right[1])


def test_the_box_holds_the_landmarks_and_the_face_fills_the_picture():
    for seed in range(30):
        identity, nuisance = Identity.from_seed(seed), Nuisance.sample(np.random.default_rng(seed))
        box = face_box(identity, nuisance)
        points = face_landmarks(identity, nuisance)
        assert (points > box[:2]).all() and (points < box[2:]).all()
        assert 0.5 * 128 < box[3] - box[1] < 0.8 * 128


def test_training_and_held_out_people_and_combinations_are_apart():
    assert set(TRAIN_SEEDS).isdisjoint((HELD_OUT_SEEDS.start, HELD_OUT_SEEDS.stop - 1))
    held = [a for a in all_attributes() if a.is_held_out]
    assert len(held) == np.prod(ATTRIBUTE_SIZES) // 8
    # Every value is seen in training, and every value is asked for in evaluation.
    for group in (held, [a for a in all_attributes() if not a.is_held_out]):
        for name, size in zip(ATTRIBUTE_NAMES, ATTRIBUTE_SIZES, strict=True):
            assert {getattr(a, name) for a in group} == set(range(size))
    rng = np.random.default_rng(0)
    assert not any(Attributes.sample(rng).is_held_out for _ in range(200))
    assert all(Attributes.sample(rng, held_out=True).is_held_out for _ in range(50))


def test_drawing_people_is_shown(tmp_path, capfd):
    main(["people", str(tmp_path / "a"), "--people", "2", "--photos", "1", "--size", "32"])
    said = capfd.readouterr()
    assert said.out == f"{tmp_path / 'a'}\n" and "2/2" in said.err


def test_people_can_be_drawn_in_one_style_only(tmp_path):
    for name, style in (("all", None), ("photos", 0)):
        write_people(tmp_path / name, 3, 8, size=32, style=style)
        shown = [attributes_of(p.read_text()) for p in (tmp_path / name).rglob("*.txt")]
        assert len(shown) == 24
        assert ({a["style"] for a in shown if "style" in a} == {0}) == (style == 0)
    rng = np.random.default_rng(0)
    drawn = [Attributes.sample(rng, style=3, held_out=True) for _ in range(20)]
    assert all(a.style == 3 and a.is_held_out for a in drawn)


def test_an_attribute_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"style in 0\.\.3, got 4"):
        Attributes(background=0, style=4, expression=0, accessory=0)


def test_captions_name_only_what_the_picture_shows():
    rng = np.random.default_rng(1)
    named = 0
    for seed in range(600):
        attributes = Attributes.sample(rng)
        text = captions.caption(attributes, rng, Identity.from_seed(seed))
        for name, value in captions.attributes_of(text).items():
            assert getattr(attributes, name) == value, text
            named += 1
    assert named > 600 * 2.5


def test_the_plain_caption_names_everything():
    for attributes in all_attributes():
        read = captions.attributes_of(captions.plain_caption(attributes))
        read.setdefault("accessory", 0)
        assert read == {name: getattr(attributes, name) for name in ATTRIBUTE_NAMES}


def test_descriptions_name_the_right_end_of_a_trait():
    rng = np.random.default_rng(2)
    dark = Identity.from_array([1.0] + [0.5] * 11)
    assert captions.described(dark, rng) == ["very dark skin"]
    assert captions.described(AVERAGE, rng) == []
    assert captions.parse(captions.EMPTY) == {}
