"""Detection, choice and alignment: logic on a made detector, insightface's own code for the rest.

The made detector reports every red block it is shown as a face, so that a test draws its faces.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from insightface.app.common import Face
from insightface.utils import face_align
from onnx import TensorProto, helper

from infinite_id_core import errors, packages
from infinite_id_core.faces.align import _TEMPLATE, align, crop_matrix, read_face, similarity
from infinite_id_core.faces.detect import DetectedFace, detect_faces
from infinite_id_core.faces.find import (
    FaceOptions,
    find_faces,
    find_faces_in_batch,
    nothing_wanted_message,
)
from infinite_id_core.faces.pack import (
    _check_provider,
    choose_providers,
    load_face_models,
    recogniser_name,
)
from infinite_id_core.faces.pixels import to_bgr, to_rgb
from infinite_id_core.faces.preview import _CHOSEN, _OTHER, numbered_preview

TEMPLATE = _TEMPLATE / 112
RED = torch.tensor([1.0, 0.0, 0.0])


class RedDetector:
    """insightface's detector interface; finds red blocks of 8 px and more at any of its sizes."""

    def __init__(self, smallest_size: int = 10**9, needs_border: bool = False) -> None:
        self.input_sizes = [(640, 640)]
        self.input_size = (640, 640)
        self.static_input_size = None
        self.largest = smallest_size
        self.needs_border = needs_border
        self.calls: list[tuple[tuple[int, ...], object]] = []

    def detect(self, img, input_size=None, max_num=0, metric="default"):
        self.calls.append((img.shape, input_size))
        assert img.dtype == np.uint8 and img.flags.c_contiguous
        size = (input_size or self.input_size)[0]
        red = (img[..., 2] > 200) & (img[..., 0] < 60) & (img[..., 1] < 60)
        _, _, stats, _ = cv2.connectedComponentsWithStats(red.astype(np.uint8))
        boxes, points = [], []
        for x, y, w, h, _ in stats[1:]:
            touches = x == 0 or y == 0 or x + w == img.shape[1] or y + h == img.shape[0]
            if size > self.largest or (self.needs_border and touches) or min(w, h) < 8:
                continue
            boxes.append([x, y, x + w, y + h, min(0.99, w / 1000 + 0.5)])
            points.append(np.array([x, y]) + TEMPLATE * [w, h])
        if not boxes:
            return np.empty((0, 5), np.float32), np.empty((0, 5, 2), np.float32)
        return np.array(boxes, np.float32), np.array(points, np.float32)


class CropRecogniser:
    """Reads a face as 512 of the pixels of insightface's own aligned crop."""

    model_file = "somewhere/models/made/reader.onnx"
    width = 512

    def get(self, img, record):
        crop = face_align.norm_crop(img, landmark=record.kps, image_size=112)
        record.embedding = crop.reshape(-1)[:: crop.size // self.width][: self.width] + 1.0
        return record.embedding


class MadeAnalysis:
    """What insightface's FaceAnalysis shows to other packs."""

    def __init__(self, detector: RedDetector | None = None) -> None:
        self.det_model = detector or RedDetector()
        self.models = {"detection": self.det_model, "recognition": CropRecogniser()}


def picture(*blocks: tuple[int, int, int], size: tuple[int, int] = (300, 400)) -> torch.Tensor:
    """[H, W, 3] with a red block (x, y, side) for every face."""
    image = torch.full((*size, 3), 0.5)
    for x, y, side in blocks:
        image[y : y + side, x : x + side] = RED
    return image


THREE = ((300, 20, 40), (20, 100, 60), (150, 200, 80))


# --- choice ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "sides"),
    [
        ("left to right", [60, 80, 40]),
        ("top to bottom", [40, 60, 80]),
        ("size", [80, 60, 40]),
        ("score", [80, 60, 40]),
    ],
)
def test_numbering(order, sides):
    options = FaceOptions(choose="all", order=order)
    found = find_faces(MadeAnalysis(), picture(*THREE), options)
    assert [round(f.box[2] - f.box[0]) for f in found.detected] == sides
    assert [f.index for f in found.chosen] == [0, 1, 2]


def test_largest_is_the_default_and_keeps_its_number():
    found = find_faces(MadeAnalysis(), picture(*THREE))
    (chosen,) = found.chosen
    assert chosen.index == 1
    assert chosen.detected.box == pytest.approx((150, 200, 230, 280))
    assert chosen.recogniser == "made/reader"


def test_index_picks_that_number():
    options = FaceOptions(choose="index", index=2)
    found = find_faces(MadeAnalysis(), picture(*THREE), options)
    assert found.chosen[0].detected.box[0] == pytest.approx(300)


@pytest.mark.parametrize("index", [3, -1, 10**6])
def test_index_out_of_range_names_the_number_found(index):
    options = FaceOptions(choose="index", index=index)
    with pytest.raises(errors.FaceIndexError, match=r"3 were found \(numbers 0 to 2"):
        find_faces(MadeAnalysis(), picture(*THREE), options)


def test_a_hundred_faces():
    blocks = [(10 + 40 * x, 10 + 40 * y, 24) for y in range(10) for x in range(10)]
    found = find_faces(MadeAnalysis(), picture(*blocks, size=(420, 420)), FaceOptions(choose="all"))
    assert len(found.detected) == len(found.chosen) == 100
    assert {f.index for f in found.chosen} == set(range(100))
    preview = numbered_preview(picture(*blocks, size=(420, 420)), found)
    assert preview.shape == (420, 420, 3)


@pytest.mark.parametrize(
    "values",
    [{"choose": "best"}, {"order": "age"}, {"padding": -0.1}, {"padding": 1.5}, {"size": 8}],
)
def test_options_outside_their_range(values):
    with pytest.raises(errors.OptionError):
        FaceOptions(**values)


# --- nothing found -----------------------------------------------------------------------------


def test_no_face_says_what_was_tried():
    app = MadeAnalysis()
    with pytest.raises(errors.NoFaceError) as caught:
        find_faces(app, picture())
    for text in ("detector size 640;", "detector size 640 with a border", "detector size 128"):
        assert text in str(caught.value)
    assert len(app.det_model.calls) == 14  # its own size and six others, each with a border too


def test_smaller_detector_sizes_are_tried_and_the_detectors_own_stays():
    app = MadeAnalysis(RedDetector(smallest_size=320))
    found = find_faces(app, picture(*THREE))
    assert found.tried[-1] == "detector size 320"
    assert app.det_model.input_sizes == [(640, 640)] and app.det_model.input_size == (640, 640)


def test_tight_crops_get_a_border_and_coordinates_without_it():
    app = MadeAnalysis(RedDetector(needs_border=True))
    found = find_faces(app, RED.expand(200, 200, 3).clone())
    assert found.tried == ("detector size 640", "detector size 640 with a border")
    assert found.detected[0].box == pytest.approx((0, 0, 200, 200))
    assert np.allclose(found.detected[0].landmarks, TEMPLATE * 200, atol=0.01)


def test_a_detector_of_one_size_is_not_asked_for_others():
    app = MadeAnalysis()
    app.det_model.static_input_size = (640, 640)
    assert detect_faces(app, picture()) == (
        (),
        ("detector size 640", "detector size 640 with a border"),
    )
    assert {size for _, size in app.det_model.calls} == {None}


def test_the_detectors_failure_is_kept_and_leaves_its_size():
    app = MadeAnalysis()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    app.det_model.detect = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        find_faces(app, picture(*THREE))
    assert app.det_model.input_sizes == [(640, 640)]


def test_a_detector_without_landmarks_is_named():
    app = MadeAnalysis()
    app.det_model.detect = lambda img, input_size=None: (np.ones((1, 5), np.float32), None)
    with pytest.raises(errors.FaceModelError, match="landmarks"):
        find_faces(app, picture())


# --- batches -----------------------------------------------------------------------------------


def test_a_frame_without_a_face_stops_or_is_skipped():
    frames = torch.stack([picture(THREE[0]), picture(), picture(*THREE)])
    with pytest.raises(errors.NoFaceError, match="in picture 1 of 3"):
        find_faces_in_batch(MadeAnalysis(), frames)
    found = find_faces_in_batch(MadeAnalysis(), frames, FaceOptions(choose="all"), "skip")
    assert [len(f.chosen) for f in found] == [1, 0, 3]
    assert [c.frame for f in found for c in f.chosen] == [0, 2, 2, 2]


def test_a_frame_without_the_wanted_face_stops_or_is_skipped():
    frames = torch.stack([picture(*THREE), picture(THREE[0]), picture()])
    second = FaceOptions(choose="index", index=1)
    with pytest.raises(errors.FaceIndexError, match="in picture 1 of 3 .*, and 1 were found"):
        find_faces_in_batch(MadeAnalysis(), frames, second)
    found = find_faces_in_batch(MadeAnalysis(), frames, second, "skip")
    assert [[c.index for c in f.chosen] for f in found] == [[1], [], []]
    assert [len(f.detected) for f in found] == [3, 1, 0]
    with pytest.raises(errors.OptionError, match="if_no_face"):
        find_faces_in_batch(MadeAnalysis(), frames, second, "leave")


def test_what_is_said_where_every_frame_was_skipped():
    frames = torch.stack([picture(THREE[0]), picture(*THREE)])
    options = FaceOptions(choose="index", index=3)
    found = find_faces_in_batch(MadeAnalysis(), frames, options, "skip")
    assert "no picture shows more than 3 (numbers 0 to 2" in nothing_wanted_message(found, options)
    nobody = find_faces_in_batch(MadeAnalysis(), frames[:1] * 0, options, "skip")
    assert "No face was found" in nothing_wanted_message(nobody, options)


@pytest.mark.parametrize("app", [5, None, {}, "buffalo_l", object()])
def test_what_is_no_analysis_is_named(app):
    for find in (find_faces, detect_faces):
        with pytest.raises(errors.FaceModelError):
            find(app, picture(*THREE))


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (64, 64, 3), (1, 64, 64, 2), (1, 0, 64, 3)])
def test_a_batch_that_is_none(shape):
    with pytest.raises(errors.ImageError):
        find_faces_in_batch(MadeAnalysis(), torch.zeros(shape))


# --- pictures of every kind --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (0, 0, 3), (500, 15, 3)])
def test_too_small_is_an_image_error(shape):
    with pytest.raises(errors.ImageError, match="too small"):
        find_faces(MadeAnalysis(), torch.zeros(shape))


def test_grey_equals_the_same_grey_in_rgb():
    grey = torch.rand(64, 80, 1, generator=torch.Generator().manual_seed(0))
    one, three = (to_bgr(image).astype(int) for image in (grey, grey.expand(64, 80, 3)))
    assert one.shape == (64, 80, 3) and np.abs(one - three).max() <= 1  # a rounding apart at most


def test_rgba_is_laid_on_white():
    rgba = torch.zeros(4, 4, 4)
    rgba[:2] = torch.tensor([0.2, 0.4, 0.6, 1.0])
    rgba[2:] = torch.tensor([0.2, 0.4, 0.6, 0.5])
    rgb = to_rgb(rgba)
    assert rgb[0, 0].tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert rgb[3, 3].tolist() == pytest.approx([0.6, 0.7, 0.8])


def test_rgba_and_half_precision_find_the_same_faces():
    image = picture(*THREE)
    rgba = torch.cat([image, torch.ones(*image.shape[:2], 1)], dim=2).half()
    boxes = [find_faces(MadeAnalysis(), i).detected[0].box for i in (image, rgba)]
    assert boxes[0] == pytest.approx(boxes[1], abs=1e-3)  # pixels


def test_nan_pixels_are_black():
    image = torch.full((32, 32, 3), float("nan"))
    assert to_bgr(image).max() == 0


@pytest.mark.parametrize("shape", [(16, 3000, 3), (3000, 16, 3)])
def test_thin_pictures_reach_the_detector_less_thin(shape):
    app = MadeAnalysis()
    detect_faces(app, torch.zeros(shape))
    assert all(max(s[:2]) / min(s[:2]) <= 8.5 for s, _ in app.det_model.calls)


def test_twenty_thousand_pixels_square_without_a_large_copy():
    resource = pytest.importorskip("resource")  # absent on Windows
    huge = RED.expand(20000, 20000, 3)  # itself 12 bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    app = MadeAnalysis()
    result = find_faces(app, huge)
    (found,) = result.chosen
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * (1 if sys.platform == "darwin" else 1024) < 1.0e9  # the picture: 4.8e9 bytes
    assert max(app.det_model.calls[0][0]) == 4000
    assert found.detected.box == pytest.approx((0, 0, 20000, 20000), abs=10)
    assert found.crop.shape == (224, 224, 3)
    assert numbered_preview(huge, result).shape == (1024, 1024, 3)


def test_more_than_that_is_refused():
    with pytest.raises(errors.ImageError, match="70000"):
        find_faces(MadeAnalysis(), torch.zeros(1, 1, 1).expand(70000, 100, 3))


def test_a_reduced_picture_gives_the_originals_coordinates():
    image = torch.full((1, 1, 1), 0.5).repeat(600, 9000, 3)
    image[120:420, 6000:6300] = RED
    app = MadeAnalysis()
    found = find_faces(app, image)
    assert app.det_model.calls[0][0][1] == 3000
    assert found.detected[0].box == pytest.approx((6000, 120, 6300, 420), abs=3)


# --- alignment ---------------------------------------------------------------------------------


@pytest.fixture
def photo() -> torch.Tensor:
    from skimage import data

    return torch.from_numpy(data.astronaut()).float() / 255


EYES = np.array([[206.0, 114.0], [248.0, 111.0], [232.0, 139.0], [214.0, 160.0], [249.0, 157.0]])


@pytest.mark.parametrize("size", [112, 224])
def test_without_padding_it_is_insightfaces_crop(photo, size):
    ours = align(photo, EYES, size, padding=0.0)
    theirs = face_align.norm_crop((photo.numpy() * 255).astype(np.uint8), EYES, size)
    difference = (ours * 255 - torch.from_numpy(theirs).float()).abs()
    assert difference.mean() < 0.35 and difference.max() < 8  # theirs rounds to 8 bits


@pytest.mark.parametrize("padding", [0.0, 0.25, 1.0])
def test_landmarks_land_on_the_template(padding):
    matrix = crop_matrix(EYES, 224, padding)
    at = EYES @ matrix[:, :2].T + matrix[:, 2]
    wanted = (TEMPLATE + padding) / (1 + 2 * padding) * 224
    assert np.abs(at - wanted).max() < 8  # a similarity cannot fit five points exactly
    exact = similarity(wanted @ [[0.6, 0.8], [-0.8, 0.6]] * 3 + 7, wanted)
    assert exact[:, :2] @ exact[:, :2].T == pytest.approx(np.eye(2) / 9)


def test_similarity_never_mirrors():
    mirrored = TEMPLATE * [-1, 1]
    assert np.linalg.det(similarity(mirrored, TEMPLATE)[:, :2]) > 0


def test_points_in_one_place_cannot_be_aligned():
    with pytest.raises(errors.FaceError, match="coincide"):
        similarity(np.full((5, 2), 3.0), TEMPLATE)


def test_large_faces_are_averaged_not_sampled():
    checker = torch.zeros(2240, 2240, 3)
    checker[::2, ::2] = checker[1::2, 1::2] = 1.0
    crop = align(checker, TEMPLATE * 2240, 224, padding=0.0)
    assert crop[20:-20, 20:-20].std() < 0.02
    assert crop[20:-20, 20:-20].mean() == pytest.approx(0.5, abs=0.01)


def test_padding_shows_more():
    image = torch.zeros(400, 400, 3)
    image[100:300, 100:300] = 1.0
    shown = [align(image, TEMPLATE * 200 + 100, 224, p).mean() for p in (0.0, 0.25, 0.5)]
    assert [float(s) for s in shown] == pytest.approx([1.0, 1 / 2.25, 0.25], abs=0.02)


def test_the_recogniser_reads_the_same_from_a_part_of_the_picture(photo):
    app = MadeAnalysis()
    detected = DetectedFace(box=(180, 80, 270, 190), landmarks=EYES, score=0.9)
    record = Face(bbox=np.array(detected.box), kps=EYES.astype(np.float32), det_score=0.9)
    whole = app.models["recognition"].get(to_bgr(photo), record)
    part = read_face(app, photo, detected).numpy()
    assert np.abs(part - whole).max() <= 2 and np.abs(part - whole).mean() < 0.2


@pytest.mark.parametrize("embedding", [np.zeros(512), np.full(512, np.nan), np.ones(128)])
def test_a_recogniser_that_gives_nonsense(embedding):
    app = MadeAnalysis()
    app.models["recognition"].get = lambda img, record: embedding
    with pytest.raises(errors.FaceModelError, match="made/reader"):
        find_faces(app, picture(*THREE))


def test_the_preview_marks_chosen_and_others(photo):
    found = find_faces(MadeAnalysis(), picture(*THREE))
    preview = numbered_preview(picture(*THREE), found)
    green, amber = (torch.tensor(c) / 255 for c in (_CHOSEN, _OTHER))
    assert ((preview - green).abs().sum(-1) < 0.02).sum() > 200
    assert ((preview - amber).abs().sum(-1) < 0.02).sum() > 200


# --- face models on disk -----------------------------------------------------------------------


def write_onnx(path: Path, inputs: list[int | str], outputs: int) -> None:
    """An ONNX file that insightface's router takes for a detector (9) or a recogniser (1)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"out{i}" for i in range(outputs)]
    nodes = [helper.make_node("GlobalAveragePool", ["x"], [name]) for name in names]
    graph = helper.make_graph(
        nodes,
        "made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3, 1, 1]) for n in names],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, path)


def detector_and_recogniser(folder: Path) -> None:
    write_onnx(folder / "det_made.onnx", [1, 3, "h", "w"], 9)
    write_onnx(folder / "w600k_made.onnx", [1, 3, 112, 112], 1)


def test_a_pack_loads_as_insightfaces_own_object(tmp_path):
    from insightface.app import FaceAnalysis

    detector_and_recogniser(tmp_path / "b" / "models" / "mine")
    app = load_face_models("mine", [tmp_path / "a", tmp_path / "b"], "CPU", 320)
    assert isinstance(app, FaceAnalysis)
    assert app.det_model is app.models["detection"]
    assert app.det_model.input_sizes == [(320, 320)]
    assert app.models["recognition"].session.get_providers() == ["CPUExecutionProvider"]
    assert recogniser_name(app) == "mine/w600k_made"


def test_a_missing_pack_lists_every_folder_and_downloads_nothing(tmp_path, monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", None)
    with pytest.raises(errors.FaceModelError) as caught:
        load_face_models("buffalo_l", [tmp_path / "a", tmp_path / "b"])
    for root in "ab":
        assert str(tmp_path / root / "models" / "buffalo_l") in str(caught.value)


def test_a_nested_pack_names_the_fix(tmp_path):
    folder = tmp_path / "models" / "antelopev2"
    detector_and_recogniser(folder / "antelopev2")
    with pytest.raises(errors.FaceModelError, match="one folder too deep") as caught:
        load_face_models("antelopev2", [tmp_path])
    assert f"up into {folder}." in str(caught.value)


def test_a_zip_that_is_not_unpacked(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "buffalo_l.zip").touch()
    with pytest.raises(errors.FaceModelError, match="not unpacked"):
        load_face_models("buffalo_l", [tmp_path])


@pytest.mark.parametrize(
    ("file", "inputs", "outputs", "missing"),
    [
        ("det.onnx", [1, 3, "h", "w"], 9, "recogniser"),
        ("rec.onnx", [1, 3, 112, 112], 1, "detector"),
    ],
)
def test_half_a_pack(tmp_path, file, inputs, outputs, missing):
    write_onnx(tmp_path / "models" / "half" / file, inputs, outputs)
    with pytest.raises(errors.FaceModelError, match=f"has no {missing}.*holds {file}"):
        load_face_models("half", [tmp_path], "CPU")


def test_a_damaged_file(tmp_path):
    detector_and_recogniser(tmp_path / "models" / "bad")
    (tmp_path / "models" / "bad" / "det_made.onnx").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(errors.FaceModelError, match="cannot be loaded"):
        load_face_models("bad", [tmp_path], "CPU")


@pytest.mark.parametrize(
    "pack",
    ["", "..", "../buffalo_l", "a/b", "a\\b", "/etc", "a\0b", "x" * 5000, "\ud800", 5, None, {}],
)
def test_a_pack_name_stays_in_its_folder(tmp_path, pack):
    with pytest.raises(errors.NameNotAllowedError):
        load_face_models(pack, [tmp_path])


@pytest.mark.parametrize("size", [0, 100, 8192, -640])
def test_detector_sizes_that_cannot_be(tmp_path, size):
    with pytest.raises(errors.OptionError):
        load_face_models("x", [tmp_path], "CPU", size)


def test_analysis_of_another_pack_without_recogniser_is_named():
    app = MadeAnalysis()
    del app.models["recognition"]
    with pytest.raises(errors.FaceModelError, match="They hold detection"):
        find_faces(app, picture(*THREE))


# --- providers and packages --------------------------------------------------------------------

CPU, CUDA, DML = "CPUExecutionProvider", "CUDAExecutionProvider", "DmlExecutionProvider"


@pytest.mark.parametrize(
    ("provider", "available", "chosen"),
    [
        ("auto", [CPU], [CPU]),
        ("auto", [CPU, CUDA], [CUDA, CPU]),
        ("auto", [DML, CPU], [DML, CPU]),
        ("CPU", [CUDA, CPU], [CPU]),
        ("ROCm", ["MIGraphXExecutionProvider", CPU], ["MIGraphXExecutionProvider", CPU]),
        ("CoreML", ["CoreMLExecutionProvider", CPU], ["CoreMLExecutionProvider", CPU]),
    ],
)
def test_providers(provider, available, chosen):
    assert choose_providers(provider, available) == chosen


def test_a_provider_that_is_not_there_names_those_that_are():
    with pytest.raises(errors.FaceModelError, match="CUDA; this build has DirectML, CPU"):
        choose_providers("CUDA", [DML, CPU])


def test_a_provider_that_does_not_start(caplog):
    app = MadeAnalysis()
    app.models["recognition"].session = type("S", (), {"get_providers": lambda self: [CPU]})()
    with pytest.raises(errors.FaceModelError, match="cannot start it"):
        _check_provider(app, "CUDA", [CUDA, CPU])
    _check_provider(app, "auto", [CUDA, CPU])
    assert "cannot start it" in caplog.text


def test_a_missing_package_is_named_with_its_cure(tmp_path, monkeypatch):
    detector_and_recogniser(tmp_path / "models" / "mine")
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(errors.MissingPackageError, match="pip install insightface onnxruntime"):
        load_face_models("mine", [tmp_path])
    with pytest.raises(errors.MissingPackageError, match="'no_such_thing' is needed to test"):
        packages.require("no_such_thing.part", "to test", "no-such-thing")


def test_two_onnxruntimes_side_by_side_are_reported(monkeypatch):
    versions = {"onnxruntime": "1.23", "onnxruntime-gpu": "1.22"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "version", version)
    message = packages.onnxruntime_conflict()
    assert message is not None and "uninstall -y onnxruntime onnxruntime-gpu" in message
    del versions["onnxruntime"]
    assert packages.onnxruntime_conflict() is None
