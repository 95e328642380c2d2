"""The detail pass: cut out, put back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from infinite_id_core import errors
from infinite_id_core.faces import detail
from infinite_id_core.faces.detect import DetectedFace
from infinite_id_core.faces.find import FaceOptions, FoundFaces


def detected(x0: float, y0: float, x1: float, y1: float) -> DetectedFace:
    return DetectedFace(box=(x0, y0, x1, y1), landmarks=np.zeros((5, 2)), score=1.0)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("box", "square"),
    [
        ((100, 100, 140, 150), (70, 75, 100)),  # 50 px and half of that on each side
        ((0, 0, 40, 50), (0, 0, 100)),  # moved inwards at a corner
        ((260, 150, 300, 200), (200, 100, 100)),
        ((10, 10, 290, 190), (50, 0, 200)),  # never beyond the shorter side
    ],
)
def test_squares_stay_in_the_picture(box, square):
    found = detail.face_square(detected(*box), width=300, height=200, padding=0.5)
    assert (found.left, found.top, found.side) == square


def test_crop_has_the_working_size_and_mask_is_the_face():
    images = noise(1, 200, 300, 3)
    square = detail.face_square(detected(100, 100, 150, 150), 300, 200, 0.5)
    crops, masks, region = detail.crop_squares(images, [square], 128)
    assert crops.shape == (1, 128, 128, 3) and masks.shape == (1, 128, 128)
    assert masks[0, 64, 64] > 1 - 1e-6
    assert masks[0, 0].max() < 0.01 and masks[0, :, -1].max() < 0.01
    assert masks[0, 40:88, 40:88].min() > 0.99  # the face's box within the crop
    assert region.squares == (square,)


@pytest.mark.parametrize("size", [0, 100, 1000, 8192])
def test_working_sizes_that_cannot_be(size):
    square = detail.face_square(detected(10, 10, 50, 50), 64, 64, 0.5)
    with pytest.raises(errors.OptionError):
        detail.crop_squares(noise(1, 64, 64, 3), [square], size)


def test_paste_of_the_crop_itself_changes_nothing():
    images = noise(1, 200, 300, 3)
    square = detail.face_square(detected(100, 100, 132, 132), 300, 200, 0.5)
    assert square.side == 64
    crops, _, region = detail.crop_squares(images, [square], 64)
    assert torch.equal(crops[0], images[0, 84:148, 84:148])
    back = detail.paste_squares(images, crops, region, 0.15)
    assert (back - images).abs().max() < 1e-6


def test_paste_is_whole_inside_soft_at_the_edge_and_absent_outside():
    images = torch.zeros(1, 200, 300, 3)
    square = detail.face_square(detected(100, 50, 150, 100), 300, 200, 0.5)
    _, _, region = detail.crop_squares(images, [square], 64)
    out = detail.paste_squares(images, torch.ones(1, 64, 64, 3), region, 0.2)[0, :, :, 0]
    inside = out[square.top : square.top + square.side, square.left : square.left + square.side]
    assert inside[25:75, 25:75].min() > 1 - 1e-6
    assert 0.0 < inside[0].max() < 0.02
    assert torch.all(inside[50, 1:21] >= inside[50, :20])
    assert out.count_nonzero() == inside.count_nonzero()
    assert torch.equal(images, torch.zeros_like(images))  # the input is not written to


def test_no_soft_edge_where_the_picture_ends():
    images = torch.zeros(1, 100, 100, 3)
    square = detail.face_square(detected(0, 0, 40, 40), 100, 100, 0.25)
    _, _, region = detail.crop_squares(images, [square], 64)
    out = detail.paste_squares(images, torch.ones(1, 64, 64, 3), region, 0.2)[0, :, :, 0]
    assert out[[0, 30], 0].min() > 1 - 1e-6 and out[59, 30] < 0.02


def test_several_faces_in_several_frames():
    images = torch.zeros(2, 100, 200, 3)
    squares = [
        detail.face_square(detected(10, 30, 30, 50), 200, 100, 0.5, frame=0),
        detail.face_square(detected(150, 30, 170, 50), 200, 100, 0.5, frame=1),
    ]
    crops, _, region = detail.crop_squares(images, squares, 64)
    out = detail.paste_squares(images, torch.ones_like(crops), region, 0.1)
    assert out.shape == images.shape
    assert out[0, 40, 20, 0] > 1 - 1e-6 and out[0, 40, 160, 0] == 0.0  # nothing was added there
    assert out[1, 40, 160, 0] > 1 - 1e-6 and out[1, 40, 20, 0] == 0.0


def test_one_face_takes_a_batch_of_crops():
    images = torch.zeros(1, 100, 100, 3)
    square = detail.face_square(detected(40, 40, 60, 60), 100, 100, 0.5)
    _, _, region = detail.crop_squares(images, [square], 64)
    crops = torch.stack([torch.full((64, 64, 3), v) for v in (0.25, 0.5, 1.0)])
    out = detail.paste_squares(images, crops, region, 0.1)
    assert out[:, 50, 50, 0].tolist() == pytest.approx([0.25, 0.5, 1.0])


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_rgba_pictures(channels):
    images = noise(1, 100, 100, channels)
    square = detail.face_square(detected(40, 40, 60, 60), 100, 100, 0.5)
    crops, _, region = detail.crop_squares(images, [square], 64)
    out = detail.paste_squares(images, torch.zeros_like(crops), region, 0.1)
    assert crops.shape[3] == 3 and out.shape[3] == max(3, channels)
    assert out[0, 50, 50, :3].abs().max() < 1e-6
    if channels == 4:
        assert torch.equal(out[..., 3], images[..., 3])


def test_what_does_not_belong_together_is_refused():
    images = noise(1, 100, 100, 3)
    squares = [detail.face_square(detected(x, 40, x + 20, 60), 100, 100, 0.5) for x in (10, 60)]
    crops, _, region = detail.crop_squares(images, squares, 64)
    with pytest.raises(errors.ImageError, match="1 of 80 x 100"):
        detail.paste_squares(noise(1, 100, 80, 3), crops, region, 0.1)
    with pytest.raises(errors.ImageError, match="2 faces and 1 crops"):
        detail.paste_squares(images, crops[:1], region, 0.1)
    with pytest.raises(errors.ImageError):
        detail.paste_squares(images, crops[:0], region, 0.1)
    with pytest.raises(errors.OptionError, match="feather"):
        detail.paste_squares(images, crops, region, 0.7)
    with pytest.raises(errors.OptionError, match="padding"):
        detail.face_square(detected(0, 0, 1, 1), 100, 100, -1.0)


def seen(*boxes: tuple[float, float, float, float]) -> FoundFaces:
    return FoundFaces(detected=tuple(detected(*box) for box in boxes), tried=("detector size 1",))


def test_a_picture_that_gave_no_crop_comes_back_unchanged():
    images = noise(3, 100, 200, 3)
    found = [seen((20, 20, 60, 60)), seen(), seen((120, 20, 160, 60))]
    with pytest.raises(errors.NoFaceError, match="picture 1 of 3"):
        detail.crop_faces(images, found, FaceOptions(), 0.25, 64)
    crops, masks, region = detail.crop_faces(images, found, FaceOptions(), 0.25, 64, "skip")
    assert len(crops) == len(masks) == 2 and [s.frame for s in region.squares] == [0, 2]
    out = detail.paste_squares(images, torch.ones_like(crops), region, 0.1)
    assert torch.equal(out[1], images[1])
    assert out[0, 40, 40].min() > 1 - 1e-6 and out[2, 40, 140].min() > 1 - 1e-6


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_where_no_picture_gave_a_crop_none_is_needed(channels):
    images = noise(2, 100, 200, channels)
    crops, masks, region = detail.crop_faces(
        images, [seen(), seen()], FaceOptions(), 0.25, 64, "skip"
    )
    assert crops.shape == (0, 64, 64, 3) and masks.shape == (0, 64, 64)
    out = detail.paste_squares(images, None, region, 0.1)
    assert torch.equal(out, images.expand(2, 100, 200, max(3, channels)))


def test_crops_that_are_needed_and_absent():
    images = noise(1, 100, 200, 3)
    _, _, region = detail.crop_faces(images, [seen((20, 20, 60, 60))], FaceOptions(), 0.25, 64)
    with pytest.raises(errors.ImageError, match="Connect crop"):
        detail.paste_squares(images, None, region, 0.1)


def test_the_wanted_number_decides_what_is_cropped():
    images = noise(2, 100, 200, 3)
    found = [seen((20, 20, 60, 60), (120, 20, 160, 60)), seen((20, 20, 60, 60))]
    second = FaceOptions(choose="index", index=1)
    with pytest.raises(errors.FaceIndexError, match="picture 1 of 2"):
        detail.crop_faces(images, found, second, 0.25, 64)
    _, _, region = detail.crop_faces(images, found, second, 0.25, 64, "skip")
    assert [(s.frame, s.left) for s in region.squares] == [(0, 110)]
