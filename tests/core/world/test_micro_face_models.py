"""The embedded detector and recogniser through insightface's own loader."""

import cv2
import numpy as np
import onnx
import pytest
import skimage.data
from insightface.app import FaceAnalysis
from insightface.utils import face_align

from lab.face_scenes import ASTRONAUT_BOX, ASTRONAUT_LANDMARKS
from microworld import files, portraits

SIZES = [(320, 320), (640, 640)]


@pytest.fixture(scope="module")
def analysis():
    return FaceAnalysis(
        # By folder: insightface takes a folder of that name where it runs for the pack.
        name=str(files.FACE_MODELS),
        root=str(files.INSIGHTFACE_ROOT),
        providers=["CPUExecutionProvider"],
    )


@pytest.fixture(scope="module")
def astronaut():
    return np.asarray(skimage.data.astronaut())[..., ::-1].copy()  # BGR, as OpenCV reads


def prepared(analysis, size):
    analysis.prepare(ctx_id=-1, det_size=size)
    return analysis


def overlap(a, b):
    """Intersection over union of two boxes."""
    inter = np.prod(np.clip(np.minimum(a[2:4], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return inter / (np.prod(a[2:4] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


def scaled(picture, scale):
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(picture, None, fx=scale, fy=scale, interpolation=how)


def test_the_loader_finds_a_detector_and_a_recogniser(analysis):
    assert set(analysis.models) == {"detection", "recognition"}
    detector, recogniser = analysis.models["detection"], analysis.models["recognition"]
    assert (type(detector).__name__, detector.use_kps) == ("SCRFD", True)
    assert len(detector.output_names) == 9
    assert type(recogniser).__name__ == "ArcFaceONNX"
    assert (recogniser.input_size, recogniser.input_mean) == ((112, 112), 127.5)
    assert recogniser.output_shape[1] == 512


def test_both_files_are_small_and_valid():
    for path in (files.DETECTOR, files.RECOGNISER):
        onnx.checker.check_model(onnx.load(str(path)), full_check=True)
    assert files.DETECTOR.stat().st_size + files.RECOGNISER.stat().st_size < 1_000_000


@pytest.mark.parametrize("size", [*SIZES, None])
def test_the_astronauts_face_is_found_once(analysis, astronaut, size):
    faces = prepared(analysis, size).get(astronaut)
    assert len(faces) == 1
    assert overlap(faces[0].bbox, ASTRONAUT_BOX) > 0.6
    assert np.abs(faces[0].kps - ASTRONAUT_LANDMARKS).max() < 8
    assert faces[0].embedding.shape == (512,)
    assert np.isfinite(faces[0].embedding).all()


def test_the_aligned_crop_is_upright_and_centred(analysis, astronaut):
    """The crop from found landmarks is the crop from landmarks read off by eye."""
    face = prepared(analysis, (640, 640)).get(astronaut)[0]
    found = face_align.norm_crop(astronaut, face.kps).astype(float)
    wanted = face_align.norm_crop(astronaut, ASTRONAUT_LANDMARKS.astype(np.float32)).astype(float)
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.9
    turned = np.corrcoef(found[::-1].ravel(), wanted.ravel())[0, 1]
    assert turned < 0.6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["black", "white", "grey", "gradient", "noise", "coffee", "rocket"]
)
def test_nothing_is_found_where_nobody_is(analysis, name, size):
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    pictures = {
        "black": lambda: np.zeros((512, 512, 3), np.uint8),
        "white": lambda: np.full((300, 400, 3), 255, np.uint8),
        "grey": lambda: np.full((512, 512, 3), 128, np.uint8),
        "gradient": lambda: np.broadcast_to(ramp[None, :, None], (512, 512, 3)).copy(),
        "noise": lambda: np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8),
        "coffee": lambda: np.asarray(skimage.data.coffee())[..., ::-1].copy(),
        "rocket": lambda: np.asarray(skimage.data.rocket())[..., ::-1].copy(),
    }
    assert prepared(analysis, size).get(pictures[name]()) == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [2, 3])
def test_each_face_of_a_row_is_found(analysis, astronaut, count, size):
    bust = astronaut[20:260, 110:330]
    faces = prepared(analysis, size).get(np.hstack([bust] * count))
    assert len(faces) == count
    found = sorted((face.bbox for face in faces), key=lambda box: box[0])
    for index, box in enumerate(found):
        shift = np.array([index * 220 - 110, -20] * 2)
        assert overlap(box, ASTRONAUT_BOX + shift) > 0.5


@pytest.mark.parametrize("face_size", [40, 60, 90, 130, 180, 250])
def test_faces_of_every_size_are_found(analysis, astronaut, face_size):
    """Scale does not matter: the face alone grows, the detector's size stays."""
    scale = face_size / np.sqrt(np.prod(ASTRONAUT_BOX[2:] - ASTRONAUT_BOX[:2]))
    canvas = np.full((640, 640, 3), 90, np.uint8)
    picture = scaled(astronaut, scale)[:640, :640]
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    boxes, points = prepared(analysis, (640, 640)).det_model.detect(canvas)
    assert len(boxes) == 1
    assert overlap(boxes[0], ASTRONAUT_BOX * scale) > 0.6
    assert np.abs(points[0] - ASTRONAUT_LANDMARKS * scale).max() < 0.08 * face_size


def portrait(seed):
    rng = np.random.default_rng(seed)
    identity = portraits.Identity.from_seed(portraits.HELD_OUT_SEEDS[seed // 2])
    nuisance = portraits.Nuisance.sample(rng)
    picture = portraits.render(identity, portraits.Attributes.sample(rng), nuisance, 256)
    return picture[..., ::-1].copy(), portraits.face_box(identity, nuisance, 256)


def test_portraits_of_held_out_people_are_found(analysis):
    prepared(analysis, (320, 320))
    good = 0
    for seed in range(40):
        picture, box = portrait(seed)
        found, _ = analysis.det_model.detect(picture)
        good += len(found) == 1 and overlap(found[0], box) > 0.5
    assert good >= 37


def test_embeddings_tell_held_out_people_apart(analysis):
    """Two portraits of one person are nearer than portraits of two people, nearly always."""
    prepared(analysis, (320, 320))
    embeddings = []
    for seed in range(40):
        faces = analysis.get(portrait(seed)[0], max_num=1)
        embeddings.append(faces[0].normed_embedding if faces else np.zeros(512))
    e = np.stack(embeddings)
    first, second = e[::2], e[1::2]
    similarity = first @ second.T
    same = np.diag(similarity)
    other = similarity[~np.eye(len(same), dtype=bool)]
    assert same.mean() > other.mean() + 0.4
    assert (similarity.argmax(axis=1) == np.arange(len(same))).mean() >= 0.7


def test_embedding_is_deterministic(analysis, astronaut):
    first = prepared(analysis, (640, 640)).get(astronaut)[0].embedding
    again = analysis.get(astronaut)[0].embedding
    np.testing.assert_array_equal(first, again)
