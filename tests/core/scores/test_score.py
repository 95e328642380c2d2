"""The scorer: Eq. 9 and 11 on batches, its ranking, and the embedded models on portraits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from infinite_id_core import errors
from infinite_id_core.encoders.open_clip import build_open_clip
from infinite_id_core.faces.pack import load_face_models
from infinite_id_core.method.face_clip import IdentityConfig, face_clip_identity
from infinite_id_core.scores import score
from microworld import files
from microworld.image_encoder import config_and_weights
from microworld.portraits import HELD_OUT_SEEDS, Attributes, Nuisance, render
from microworld.portraits import Identity as Person

NAN = math.nan


class MadeReader:
    """Reads an angle off the first pixel's red, and a crop of its green; a black one is nobody."""

    name = "made/reader"

    def read(self, picture: torch.Tensor) -> score.ReadFace | None:
        red, green = picture[0, 0, :2].tolist()
        if red == 0.0:
            return None
        angle = torch.tensor(red * math.pi)
        return score.ReadFace(
            embedding=7.0 * torch.stack([angle.cos(), angle.sin()]),
            crop=torch.full((8, 8, 3), green),
        )


class MadeVision:
    """E_clip as an angle of the mean brightness; texts by length."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        self.sizes.append(image.shape[0])
        angle = image.mean((1, 2, 3)) * math.pi
        return type("Output", (), {"image_embeds": torch.stack([angle.cos(), angle.sin()], 1)})()

    def read_texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0]] * len(texts))


def picture(degrees: float | None, green: float = 0.5, rest: float = 0.25) -> torch.Tensor:
    made = torch.full((16, 16, 3), rest)
    made[0, 0] = torch.tensor([0.0 if degrees is None else degrees / 180.0, green, rest])
    return made


def batch(*pictures: torch.Tensor) -> torch.Tensor:
    return torch.stack(pictures)


def degrees(*angles: float) -> list[float]:
    return np.cos(np.radians(angles)).tolist()


def identity(*angles: float, weights: list[float] | None = None, recogniser: str = "made/reader"):
    face = torch.zeros(len(angles), 512)
    for row, angle in zip(face, angles, strict=True):
        row[:2] = torch.tensor([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
    return face_clip_identity(
        face=face,
        clip=torch.zeros(len(angles), 257, 4),
        weight=torch.tensor(weights or [1.0] * len(angles)),
        config=IdentityConfig(recogniser=recogniser, clip_model="made"),
    )


# --- Eq. 9 and 11 --------------------------------------------------------------------------------


def test_likeness_to_a_reference_by_hand():
    found = score.score_batch(
        MadeReader(), batch(picture(30), picture(90), picture(None)), reference=batch(picture(90))
    )
    assert found.m_face[:2] == pytest.approx(degrees(60, 0), abs=1e-6)
    assert found.found.tolist() == [True, True, False]
    assert np.isnan(found.clip_i).all() and np.isnan(found.clip_t).all()
    assert found.ranking() == [1, 0, 2]


def test_several_references_count_by_the_mean_of_their_cosines():
    found = score.score_batch(
        MadeReader(), batch(picture(30)), reference=batch(picture(30), picture(90))
    )
    assert found.m_face == pytest.approx([0.75], abs=1e-6)


class WideReader(MadeReader):
    """With the 512 numbers an identity holds."""

    def read(self, picture: torch.Tensor) -> score.ReadFace | None:
        face = super().read(picture)
        if face is None:
            return None
        wide = torch.cat([face.embedding, torch.zeros(510)])
        return score.ReadFace(embedding=wide, crop=face.crop)


def test_an_identity_counts_by_its_weights():
    person = identity(30, 90, weights=[3.0, 1.0])
    found = score.score_batch(WideReader(), batch(picture(30)), identity=person)
    assert found.m_face == pytest.approx([(3 * 1.0 + 0.5) / 4], abs=1e-6)


def test_clip_i_reads_the_crops_and_clip_t_the_whole_picture():
    vision = MadeVision()
    pictures = batch(picture(30, green=0.5), picture(None), picture(30, green=0.25))
    found = score.score_batch(
        MadeReader(), pictures, reference=batch(picture(30, green=0.5)),
        clip_vision=vision, prompt="anything",
    )  # fmt: skip
    assert found.clip_i[[0, 2]] == pytest.approx(degrees(0, 45), abs=1e-6)
    assert math.isnan(found.clip_i[1])
    mean = pictures.mean((1, 2, 3)).double().numpy() * 180
    assert found.clip_t == pytest.approx(degrees(*mean), abs=1e-5)


def test_with_both_the_identity_is_who_and_the_photo_serves_clip_i():
    found = score.score_batch(
        WideReader(), batch(picture(30, green=0.5)), identity=identity(90),
        reference=batch(picture(30, green=0.25)), clip_vision=MadeVision(),
    )  # fmt: skip
    assert found.m_face == pytest.approx(degrees(60), abs=1e-6)
    assert found.clip_i == pytest.approx(degrees(45), abs=1e-6)


def test_many_pictures_of_two_sizes_are_encoded_in_parts():
    vision = MadeVision()
    pictures = [torch.rand(8, 8, 3) for _ in range(40)] + [torch.rand(4, 9, 1), torch.rand(8, 8, 4)]
    found = score.image_embeddings(vision, pictures)
    assert vision.sizes == [16, 16, 8, 1, 1]
    one = score.image_embeddings(vision, pictures[33:34])
    torch.testing.assert_close(found[33:34], one)


# --- ranking -------------------------------------------------------------------------------------


def scores(*m_face: float) -> score.BatchScores:
    nothing = np.full(len(m_face), NAN)
    return score.BatchScores(
        m_face=np.array(m_face), clip_i=nothing, clip_t=nothing, recogniser="made/reader"
    )


def test_no_face_counts_0_and_so_does_somebody_opposite():
    assert scores(0.2, NAN, 0.8, -0.5, -0.1).ranking() == [2, 0, 4, 3, 1]
    assert scores(NAN, NAN, NAN).ranking() == [0, 1, 2]


def test_the_table_has_a_line_a_picture():
    lines = scores(0.25, NAN, 0.75).table().splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["1", "2", "0.750", "-", "-"],
        ["2", "0", "0.250", "-", "-"],
        ["3", "1", "no", "face", "-", "-"],
    ]
    assert "made/reader" in lines[4]


# --- what is refused -----------------------------------------------------------------------------


def test_nobody_to_compare_with():
    with pytest.raises(errors.OptionError, match="connect an identity, or a reference"):
        score.score_batch(MadeReader(), batch(picture(30)))


def test_a_reference_without_a_face_and_no_pictures():
    with pytest.raises(errors.NoFaceError, match="reference.*picture 1 of 2"):
        score.score_batch(
            MadeReader(), batch(picture(30)), reference=batch(picture(30), picture(None))
        )
    with pytest.raises(errors.ImageError, match="at least one picture"):
        score.score_batch(MadeReader(), torch.zeros(0, 8, 8, 3), reference=batch(picture(30)))


def test_an_identity_of_another_recogniser():
    with pytest.raises(errors.IdentityMismatchError, match="buffalo_l/w600k_r50.*made/reader"):
        person = identity(30, recogniser="buffalo_l/w600k_r50")
        score.score_batch(WideReader(), batch(picture(30)), identity=person)


def test_a_prompt_without_an_encoder_or_with_one_that_reads_no_text():
    pictures, reference = batch(picture(30)), batch(picture(30))
    with pytest.raises(errors.OptionError, match="connect clip_vision"):
        score.score_batch(MadeReader(), pictures, reference=reference, prompt="a person")
    vision = MadeVision()
    vision.read_texts = None  # type: ignore[assignment]
    with pytest.raises(errors.EncoderError, match="no text side"):
        score.score_batch(
            MadeReader(), pictures, reference=reference, clip_vision=vision, prompt="a person"
        )
    blank = score.score_batch(
        MadeReader(), pictures, reference=reference, clip_vision=vision, prompt=" \n"
    )
    assert np.isnan(blank.clip_t).all() and blank.clip_i == pytest.approx([1.0])


@pytest.mark.parametrize("embeds", [None, torch.zeros(2, 3), torch.full((1, 3), NAN)])
def test_an_encoder_without_sound_embeddings(embeds):
    vision = MadeVision()
    output = type("Output", (), {"image_embeds": embeds})()
    vision.encode_image = lambda image, crop=True: output  # type: ignore[method-assign]
    with pytest.raises(errors.EncoderError):
        score.image_embeddings(vision, [torch.zeros(8, 8, 3)])


# --- the embedded models -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> score.PackReader:
    app = load_face_models(files.INSIGHTFACE_PACK, [files.INSIGHTFACE_ROOT], "CPU")
    return score.PackReader(app)


def portrait(seed: int, rng: np.random.Generator) -> torch.Tensor:
    style = replace(Attributes.sample(rng), style=0)  # photo
    drawn = render(Person.from_seed(seed), style, Nuisance.sample(rng))
    return torch.from_numpy(drawn.astype(np.float32) / 255)


def test_own_pictures_rank_above_other_peoples(embedded):
    """100 trials: a reference, one more portrait of its person among three of others."""
    rng, firsts = np.random.default_rng(0), 0
    for trial in range(100):
        people = [HELD_OUT_SEEDS[(4 * trial + i) % len(HELD_OUT_SEEDS)] for i in range(4)]
        reference = batch(portrait(people[0], rng))
        pictures = batch(*(portrait(person, rng) for person in people[1:] + people[:1]))
        firsts += score.score_batch(embedded, pictures, reference=reference).ranking()[0] == 3
    assert firsts >= 95  # chance gives 25


def test_the_embedded_pack_and_open_clip_score_a_portrait(embedded):
    config, weights = config_and_weights()
    vision = build_open_clip(config, weights, "microworld")
    rng = np.random.default_rng(1)
    own = portrait(HELD_OUT_SEEDS[0], rng)
    pictures = batch(own, torch.zeros_like(own))
    found = score.score_batch(
        embedded, pictures, reference=batch(own), clip_vision=vision, prompt="a photo of a person"
    )
    assert found.m_face[0] == pytest.approx(1.0) and found.clip_i[0] == pytest.approx(1.0)
    assert math.isnan(found.m_face[1]) and math.isnan(found.clip_i[1])
    assert (np.abs(found.clip_t) < 1).all() and found.recogniser == "microworld/rec"
