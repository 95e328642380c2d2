"""The drawing of five landmarks: what lies where, in numbers that need no second drawing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from infinite_id_core.faces.detect import DetectedFace
from infinite_id_core.faces.keypoints import draw_keypoints, fitted, pose_drawings

# Far enough from each other that no disc touches another.
POINTS = np.array([[100.0, 60.0], [220.0, 60.0], [160.0, 120.0], [110.0, 180.0], [210.0, 180.0]])
SIZE = (320, 240)
DISCS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
LIMBS = [(153, 0, 0), (0, 153, 0), None, (153, 153, 0), (153, 0, 153)]
IN_RADIUS_10 = 317  # whole points within 10 of a whole point (Gauss's circle problem)


def count(drawn: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((drawn == np.array(colour)).all(axis=-1).sum())


def test_each_landmark_is_a_disc_of_its_colour() -> None:
    drawn = draw_keypoints(POINTS, SIZE)
    assert drawn.shape == (240, 320, 3) and drawn.dtype == np.uint8
    for (x, y), colour in zip(POINTS.astype(int), DISCS, strict=True):
        assert count(drawn, colour) == IN_RADIUS_10
        assert tuple(drawn[y, x]) == tuple(drawn[y, x - 10]) == tuple(drawn[y - 10, x]) == colour
        assert tuple(drawn[y, x - 11]) != colour and tuple(drawn[y - 8, x - 8]) != colour


def test_ellipses_lead_to_the_nose_at_60_percent() -> None:
    drawn, nose = draw_keypoints(POINTS, SIZE), POINTS[2]
    for point, colour in zip(POINTS, LIMBS, strict=True):
        if colour is None:
            continue
        middle, reach = (point + nose) / 2, nose - point
        across = np.array([-reach[1], reach[0]]) / np.hypot(*reach)
        for side in (-1, 1):
            x, y = np.round(middle + 3 * side * across).astype(int)
            assert tuple(drawn[y, x]) == colour
            x, y = np.round(middle + 6 * side * across).astype(int)
            assert tuple(drawn[y, x]) == (0, 0, 0)
    colours = [*DISCS, *filter(None, LIMBS), (0, 0, 0)]
    assert sum(count(drawn, colour) for colour in colours) == 320 * 240


def test_an_ellipse_narrows_towards_its_ends() -> None:
    """The limb from (100, 60) to (220, 60) with the nose there: half axes 60 and 4."""
    points = np.array(
        [[100.0, 60.0], [220.0, 200.0], [220.0, 60.0], [220.0, 180.0], [220.0, 160.0]]
    )
    red = (draw_keypoints(points, SIZE) == np.array((153, 0, 0))).all(axis=-1)
    for x in (120, 140, 160, 180, 200):
        half = 4 * math.sqrt(1 - ((x - 160) / 60) ** 2)
        assert red[:, x].sum() == 2 * math.floor(half) + 1


def test_what_lies_outside_the_picture_is_cut_off() -> None:
    points = POINTS - [160, 120]  # the nose in the corner, one mouth corner inside
    drawn = draw_keypoints(points, (100, 100))
    whole = draw_keypoints(POINTS, SIZE)[120:220, 160:260]
    assert (drawn == whole).all() and count(drawn, (255, 0, 255)) == IN_RADIUS_10
    assert not draw_keypoints(POINTS + 10_000, (64, 64)).any()


def test_points_on_the_nose_have_no_ellipse() -> None:
    drawn = draw_keypoints(np.full((5, 2), 50.0), (100, 100))
    assert count(drawn, (255, 0, 255)) == IN_RADIUS_10 and count(drawn, (0, 0, 0)) == 10_000 - 317


@pytest.mark.parametrize(
    ("photo", "picture", "wanted"),
    [
        ((100, 100), (200, 200), (20, 60)),  # twice as large
        ((100, 100), (400, 200), (120, 60)),  # in the middle of a wide picture
        ((100, 200), (100, 100), (30, 15)),  # a tall photo: half its size
        ((64, 48), (64, 48), (10, 30)),
    ],
)
def test_the_whole_photo_is_fitted_into_the_picture(
    photo: tuple[int, int], picture: tuple[int, int], wanted: tuple[int, int]
) -> None:
    moved = fitted(np.tile([10.0, 30.0], (5, 1)), photo, picture)
    assert np.allclose(moved, wanted)


def test_one_drawing_for_each_face() -> None:
    faces = [
        DetectedFace(box=(0.0, 0.0, 1.0, 1.0), landmarks=POINTS + shift, score=1.0)
        for shift in (0, 20)
    ]
    drawn = pose_drawings(faces, SIZE, (640, 480))
    assert list(drawn.shape) == [2, 480, 640, 3] and float(drawn.max()) == 1.0
    assert drawn[0, 120, 200].tolist() == [1.0, 0.0, 0.0] == drawn[1, 160, 240].tolist()
