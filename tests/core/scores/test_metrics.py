"""Eq. 9-11 and their statistics against hand-computed numbers, torch and torchmetrics."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from infinite_id_core import errors
from infinite_id_core.scores import metrics
from infinite_id_core.scores.metrics import BootstrapOptions

NAN = math.nan


def rows(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# --- Eq. 9 and 11 --------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [metrics.m_face, metrics.clip_i, metrics.clip_t])
def test_cosines_by_hand_and_by_torch(measure):
    by_hand = measure(np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [-2.0, 0.0]]))
    assert by_hand == pytest.approx([24 / 25, -1.0], abs=1e-12)
    a, b = rows(5), rows(5, seed=1)
    assert measure(a, b) == pytest.approx(torch.cosine_similarity(a, b).numpy(), abs=1e-6)
    one = measure(a, b[:1])  # one reference for all
    assert one == pytest.approx(torch.cosine_similarity(a, b[:1]).numpy(), abs=1e-6)


def test_a_row_without_a_face_is_not_measured():
    generated = torch.stack([torch.zeros(4), torch.full((4,), NAN), torch.ones(4)])
    scores = metrics.cosine(generated, torch.ones(1, 4))
    assert np.isnan(scores[:2]).all() and scores[2] == pytest.approx(1.0)


def test_half_precision_is_widened_first():
    a = rows(3).to(torch.bfloat16)
    assert metrics.cosine(a, a) == pytest.approx([1.0] * 3, abs=1e-12)
    assert metrics.cosine(a, a).dtype == np.float64


@pytest.mark.parametrize(
    ("a", "b"),
    [((2, 4), (2, 5)), ((2, 4), (3, 4)), ((4,), (4,)), ((1, 4), (2, 4))],
)
def test_embeddings_that_do_not_fit(a, b):
    with pytest.raises(errors.OptionError, match="Expected embeddings"):
        metrics.cosine(np.ones(a), np.ones(b))


def test_clip_t_is_a_hundredth_of_torchmetrics():
    """torchmetrics' own arithmetic on given embeddings, through a model that is only a table."""
    functional = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    pictures, prompts = rows(3, seed=2), rows(3, seed=3)

    class Table:
        config = type("C", (), {"text_config": type("T", (), {"max_position_embeddings": 77})})
        device = torch.device("cpu")

        def to(self, _device):
            return self

        def get_image_features(self, _pixels):
            return pictures

        def get_text_features(self, _ids, _mask):
            return prompts

    def processor(text=None, images=None, **_):
        if images is not None:
            return {"pixel_values": torch.zeros(3)}
        return {"input_ids": torch.zeros(3, 4), "attention_mask": torch.ones(3, 4)}

    images = [torch.zeros(3, 8, 8, dtype=torch.uint8)] * 3
    theirs, _ = functional._clip_score_update(images, ["a", "b", "c"], Table(), processor)
    assert 100 * metrics.clip_t(pictures, prompts) == pytest.approx(theirs.numpy(), abs=1e-4)


# --- Eq. 10 --------------------------------------------------------------------------------------


def test_identity_fidelity_by_hand():
    face, clip = [0.2, 0.4, 0.6, NAN], [0.5, 0.9, 0.7, NAN]
    people = metrics.population_of(face, "made"), metrics.population_of(clip, "made")
    # Deviations of {0.2, 0.4, 0.6} and {0.5, 0.9, 0.7} over n: sqrt(0.08 / 3).
    assert [p.deviation for p in people] == pytest.approx([math.sqrt(0.08 / 3)] * 2)
    assert [p.count for p in people] == [3, 3]
    one = 0.2 / math.sqrt(0.08 / 3)
    scores = metrics.identity_fidelity(face, clip, *people)
    assert scores[:3] == pytest.approx([-one, one / 2, one / 2])
    assert math.isnan(scores[3])


def test_z_scores_have_mean_0_and_deviation_1():
    values = np.random.default_rng(0).normal(3.0, 7.0, 200)
    z = metrics.z_score(values, metrics.population_of(values, "all"))
    assert (z.mean(), z.std()) == pytest.approx((0.0, 1.0), abs=1e-12)


def test_a_population_that_does_not_vary_gives_0_not_noise():
    population = metrics.population_of([0.1, 0.1, 0.1], "all")  # numpy's std of these is 1e-17
    assert metrics.z_score([0.1, 0.3], population).tolist() == [0.0, 0.0]
    assert population.to_json() == {
        "over": "all", "count": 3, "mean": pytest.approx(0.1), "deviation": 0.0,
    }  # fmt: skip


def test_a_population_of_nothing():
    with pytest.raises(errors.OptionError, match="all pictures: none"):
        metrics.population_of([NAN, NAN], "all pictures")


# --- pictures without a face ---------------------------------------------------------------------


def test_missing_faces_are_filled_or_left_out():
    scores = [0.8, NAN, -0.2]
    assert metrics.zero_filled(scores).tolist() == [0.8, 0.0, -0.2]
    assert metrics.zero_filled(scores, clamp_negatives=True).tolist() == [0.8, 0.0, 0.0]
    assert metrics.detected_only(scores).tolist() == [0.8, -0.2]


# --- copies --------------------------------------------------------------------------------------


def at(*degrees: float) -> np.ndarray:
    return np.cos(np.radians(degrees))


def test_copy_paste_by_hand():
    # Reference and other photo 60 degrees apart.
    copy, middle, other = at(0, 30, 60), at(60, 30, 0), at(60, 60, 60)
    assert metrics.copy_paste(copy, middle, other) == pytest.approx([1.0, 0.0, -1.0], abs=1e-6)
    assert metrics.copy_paste(at(40), at(70), at(60)) == pytest.approx([0.5], abs=1e-6)


def test_copy_paste_of_one_photo_twice_stays_in_its_range():
    assert np.abs(metrics.copy_paste(at(10, 20), at(20, 10), at(0, 0))).max() <= 1.0
    assert math.isnan(metrics.copy_paste([NAN], [0.5], [0.5])[0])


# --- intervals -----------------------------------------------------------------------------------


def test_the_interval_of_pictures_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    found = metrics.bootstrap_mean(values, options=BootstrapOptions(resamples=4000))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(
        (values.mean() - half, values.mean() + half), abs=0.1 * half
    )
    assert (found.by, found.units, found.count) == ("image", 400, 400)


def test_people_are_resampled_whole():
    """Ten pictures of each of 20 people, alike within a person: the people are what varies."""
    of_person = np.random.default_rng(2).normal(0.5, 0.1, 20)
    values = np.repeat(of_person, 10)
    names = [f"person {i // 10}" for i in range(200)]
    by_person = metrics.bootstrap_mean(values, names)
    by_picture = metrics.bootstrap_mean(values)
    assert (by_person.by, by_person.units, by_person.count) == ("identity", 20, 200)
    widths = [i.high - i.low for i in (by_person, by_picture)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(10), rel=0.15)


def test_people_with_more_pictures_weigh_more():
    found = metrics.bootstrap_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, 0.0, 1.0), abs=1e-12)


def test_the_interval_is_seeded_and_narrows_with_its_level():
    values = np.random.default_rng(3).random(50)
    first = metrics.bootstrap_mean(values, options=BootstrapOptions(seed=4))
    assert first == metrics.bootstrap_mean(values, options=BootstrapOptions(seed=4))
    narrow = metrics.bootstrap_mean(values, options=BootstrapOptions(level=0.5))
    assert first.low < narrow.low < narrow.mean < narrow.high < first.high


def test_unmeasured_scores_are_left_out_of_the_interval():
    found = metrics.bootstrap_mean([0.2, NAN, 0.4, NAN], ["a", "a", "b", "c"])
    assert (found.mean, found.units, found.count) == (pytest.approx(0.3), 2, 2)


@pytest.mark.parametrize("scores", [[], [NAN], [0.5]])
def test_one_or_no_unit_has_no_interval(scores):
    found = metrics.bootstrap_mean(scores, ["a"] * len(scores))
    assert math.isnan(found.low) and math.isnan(found.high)
    plain = found.to_json()
    assert plain["low"] is None and plain["mean"] == (0.5 if scores == [0.5] else None)
    json.dumps(plain, allow_nan=False)


def test_many_scores_are_resampled_in_parts(monkeypatch):
    values = np.random.default_rng(5).random(100)
    whole = metrics.bootstrap_mean(values)
    monkeypatch.setattr(metrics, "_DRAWS", 1000)  # ten rows at a time
    parts = metrics.bootstrap_mean(values)
    assert (parts.mean, parts.low, parts.high) == pytest.approx(
        (whole.mean, whole.low, whole.high), abs=1e-12
    )


def test_options_and_names_that_do_not_fit():
    with pytest.raises(errors.OptionError, match="resamples must lie in"):
        BootstrapOptions(resamples=10)
    with pytest.raises(errors.OptionError, match="level must lie in"):
        BootstrapOptions(level=1.0)
    with pytest.raises(errors.OptionError, match="Expected 2 identities.*got 1"):
        metrics.bootstrap_mean([0.1, 0.2], ["a"])
