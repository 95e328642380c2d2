"""The face and identity nodes in ComfyUI, with the embedded face models on a real photograph."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from skimage import data

from nodes import NODE_CLASS_MAPPINGS

from .executor import Executor, failures, shown

EMBEDDED = "microworld (embedded)"


def run(node: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return NODE_CLASS_MAPPINGS[node].execute(*args, **kwargs).args


def align(analysis: Any, image: torch.Tensor, **changes: Any) -> tuple[Any, ...]:
    values = {"choose": "largest", "index": 0, "order": "left to right", "padding": 0.25,
              "if_no_face": "error"} | changes  # fmt: skip
    return run("InfiniteIDAlignFace", analysis, image, **values)


@pytest.fixture(scope="module")
def analysis(pack) -> Any:
    (app,) = run("InfiniteIDFaceModelLoader", EMBEDDED, "CPU", 640)
    return app


@pytest.fixture(scope="module")
def clip_vision(pack) -> Any:
    (encoder,) = run("InfiniteIDOpenClipLoader", EMBEDDED, "none (embedded)")
    return encoder


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return torch.from_numpy(data.astronaut()).float().unsqueeze(0) / 255


@pytest.fixture(scope="module")
def identity(analysis, clip_vision, photo) -> Any:
    faces = align(analysis, photo)[0]
    return run("InfiniteIDEncode", faces, clip_vision, "stack")[0]


@pytest.fixture
def errors(pack) -> Any:
    return pack.infinite_id_core.errors


def cosine(a: Any, b: Any) -> float:
    return float(torch.cosine_similarity(a.embedding, b.embedding, dim=0))


# --- the loader --------------------------------------------------------------------------


def test_the_embedded_pack_is_insightfaces_own_object(pack, analysis):
    from insightface.app import FaceAnalysis

    assert isinstance(analysis, FaceAnalysis) and set(analysis.models) >= {"recognition"}
    assert pack.infinite_id_core.faces.pack.recogniser_name(analysis) == "microworld/rec"
    (face,) = analysis.get(np.ascontiguousarray(data.astronaut()[..., ::-1]))  # as others call it
    assert face.normed_embedding.shape == (512,)


def test_another_packs_analysis_fits(pack, photo, tmp_path, monkeypatch):
    """Built as the InstantID and PuLID packs build theirs."""
    from insightface.app import FaceAnalysis

    monkeypatch.chdir(tmp_path)  # insightface takes any folder of that name for the pack
    root = pack.microworld.files.INSIGHTFACE_ROOT
    theirs = FaceAnalysis(name="microworld", root=str(root), providers=["CPUExecutionProvider"])
    theirs.prepare(ctx_id=0, det_size=(640, 640))
    faces, *_ = align(theirs, photo)
    assert faces[0].recogniser == "microworld/rec"


def test_packs_are_listed_and_found_in_every_root(pack, comfy_base, tmp_path, monkeypatch):
    folders, source = pack.nodes.folders, pack.microworld.files.FACE_MODELS
    extra = tmp_path / "elsewhere"
    paths = folder_paths.folder_names_and_paths["insightface"][0]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "insightface", ([*paths, str(extra)], {".onnx"})
    )
    target = extra / "models" / "mine"
    target.mkdir(parents=True)
    for file in source.glob("*.onnx"):
        (target / file.name).write_bytes(file.read_bytes())
    assert folders.face_packs() == ["mine"]
    schema = NODE_CLASS_MAPPINGS["InfiniteIDFaceModelLoader"].INPUT_TYPES()
    options = schema["required"]["pack"][1]["options"]
    assert options == ["mine", EMBEDDED, "buffalo_l", "antelopev2"]
    (app,) = run("InfiniteIDFaceModelLoader", "mine", "auto", 320)
    assert pack.infinite_id_core.faces.pack.recogniser_name(app) == "mine/rec"


def test_a_missing_pack_and_provider(errors, comfy_base):
    with pytest.raises(errors.FaceModelError) as caught:
        run("InfiniteIDFaceModelLoader", "buffalo_l", "CPU", 640)
    assert str(comfy_base / "models" / "insightface" / "models" / "buffalo_l") in str(caught.value)
    with pytest.raises(errors.FaceModelError, match="this build has.*CPU"):
        run("InfiniteIDFaceModelLoader", EMBEDDED, "ROCm", 640)
    with pytest.raises(errors.NameNotAllowedError):
        run("InfiniteIDFaceModelLoader", "../../..", "CPU", 640)


def test_a_missing_package_fails_only_in_the_node(errors, monkeypatch):
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(errors.MissingPackageError, match="insightface"):
        run("InfiniteIDFaceModelLoader", EMBEDDED, "CPU", 640)


# --- align ---------------------------------------------------------------------------------


def test_the_astronaut_is_found_and_aligned(analysis, photo):
    faces, crops, preview, count = align(analysis, photo)
    assert count == 1 and crops.shape == (1, 224, 224, 3) and preview.shape == photo.shape
    x0, y0, x1, y1 = faces[0].detected.box
    assert 160 < x0 < 210 and 40 < y0 < 110 and 250 < x1 < 300 and 160 < y1 < 240
    left_eye, right_eye, nose = faces[0].detected.landmarks[:3]
    assert left_eye[0] < nose[0] < right_eye[0] and nose[1] > left_eye[1]
    assert not torch.equal(preview, photo)


def test_the_same_embedding_as_insightfaces_own_call(analysis, photo):
    (theirs,) = analysis.get(np.ascontiguousarray(data.astronaut()[..., ::-1]))
    (ours,) = align(analysis, photo)[0]
    assert np.abs(ours.detected.box - theirs.bbox).max() < 0.01
    similarity = torch.cosine_similarity(ours.embedding, torch.from_numpy(theirs.embedding), dim=0)
    assert similarity > 0.9999


def test_two_faces_are_numbered_and_chosen(analysis, photo, errors):
    scene = torch.cat([photo, photo.flip(2)], dim=2)
    every = align(analysis, scene, choose="all")
    assert every[3] == 2 and every[1].shape[0] == 2
    (right,) = align(analysis, scene, choose="index", index=1)[0]
    assert right.index == 1 and right.detected.box[0] > 512
    with pytest.raises(errors.FaceIndexError, match="2 were found"):
        align(analysis, scene, choose="index", index=2)


def test_a_hundred_faces(photo, pack):
    (app,) = run("InfiniteIDFaceModelLoader", EMBEDDED, "CPU", 1280)
    head = photo[:, 32:224, 128:320]
    scene = torch.nn.functional.interpolate(
        head.permute(0, 3, 1, 2), size=(128, 128), mode="area"
    ).permute(0, 2, 3, 1).repeat(1, 10, 10, 1)  # fmt: skip
    faces, crops, _, count = align(app, scene, choose="all", order="score")
    assert count == len(faces) == crops.shape[0] and count >= 95
    assert [face.index for face in faces] == list(range(count))


@pytest.mark.parametrize("kind", ["grey", "rgba", "half", "large", "tight"])
def test_pictures_of_every_kind_give_the_same_person(analysis, photo, kind):
    (plain,) = align(analysis, photo)[0]
    changed = {
        "grey": photo.mean(-1, keepdim=True),
        "rgba": torch.cat([photo, torch.ones(1, 512, 512, 1)], -1),
        "half": photo.half(),
        "large": photo.repeat_interleave(10, 1).repeat_interleave(10, 2),
        "tight": photo[:, 60:200, 165:290],
    }[kind]
    (other,) = align(analysis, changed)[0]
    assert other.crop.dtype == torch.float32 and other.crop.shape == (224, 224, 3)
    scale = 10 if kind == "large" else 1
    shift = np.array([165, 60]) if kind == "tight" else 0
    landmarks = other.detected.landmarks / scale + shift
    assert np.abs(landmarks - plain.detected.landmarks).max() < 12
    if kind in ("rgba", "half"):
        assert cosine(plain, other) > 0.99


@pytest.mark.parametrize("shape", [(0, 64, 64, 3), (1, 1, 1, 3), (1, 0, 9, 3), (1, 64, 64, 2)])
def test_what_is_no_picture(analysis, errors, shape):
    with pytest.raises(errors.ImageError):
        align(analysis, torch.zeros(shape))


def test_a_huge_picture_is_read_through_a_reduced_copy(analysis, errors):
    with pytest.raises(errors.NoFaceError, match="Tried: detector size 640;"):
        align(analysis, torch.zeros(1, 1, 1, 1).expand(1, 20000, 20000, 3))


def test_frames_without_a_face(analysis, photo, errors):
    frames = torch.cat([torch.zeros_like(photo), photo])
    with pytest.raises(errors.NoFaceError, match="picture 0 of 2"):
        align(analysis, frames)
    faces, crops, preview, count = align(analysis, frames, if_no_face="skip")
    assert count == 1 and faces[0].frame == 1
    assert crops.shape[0] == 1 and preview.shape[0] == 2


def test_all_frames_skipped_block_what_follows(analysis, photo):
    faces, crops, preview, count = align(analysis, torch.zeros_like(photo), if_no_face="skip")
    assert isinstance(faces, ExecutionBlocker) and "No face was found" in faces.message
    assert isinstance(crops, ExecutionBlocker) and count == 0 and preview.shape == photo.shape


def test_the_preview_is_shown_on_the_node(analysis, photo):
    node = NODE_CLASS_MAPPINGS["InfiniteIDAlignFace"]
    out = node.execute(analysis, photo, "largest", 0, "left to right", 0.25, "error")
    (shown,) = out.ui.as_dict()["images"]
    assert (Path(folder_paths.get_temp_directory()) / shown["filename"]).is_file()


# --- the detail pass -----------------------------------------------------------------------


def test_crop_and_paste_are_each_others_inverse(analysis, photo):
    crop, region, mask = run(
        "InfiniteIDFaceCrop", analysis, photo, "largest", 0, "left to right", 0.5, 256
    )
    assert crop.shape == (1, 256, 256, 3) and mask.shape == (1, 256, 256)
    assert mask[0, 128, 128] > 1 - 1e-6
    (back,) = run("InfiniteIDFacePaste", photo, crop, region, 0.15)
    assert (back - photo).abs().mean() < 0.002
    square = region.squares[0]
    away = torch.ones(512, 512, dtype=torch.bool)
    away[square.top : square.top + square.side, square.left : square.left + square.side] = False
    assert torch.equal(back[0][away], photo[0][away])


def test_paste_needs_the_picture_that_was_cropped(analysis, photo, errors):
    crop, region, _ = run(
        "InfiniteIDFaceCrop", analysis, photo, "largest", 0, "left to right", 0.5, 64
    )
    with pytest.raises(errors.ImageError, match="Connect the picture"):
        run("InfiniteIDFacePaste", photo[:, :256], crop, region, 0.15)
    with pytest.raises(errors.NoFaceError):
        run("InfiniteIDFaceCrop", analysis, photo * 0, "largest", 0, "left to right", 0.5, 64)


# --- identities ----------------------------------------------------------------------------


def test_encode_records_what_made_it(identity):
    assert identity["face"].value.shape == (1, 512) and identity["clip"].value.shape == (1, 257, 96)
    assert identity["face"].value.norm() == pytest.approx(1.0, abs=1e-5)
    models = {name: reading.model for name, reading in identity.readings.items()}
    assert models == {"face": "microworld/rec", "clip": "microworld"}


def test_encode_with_weights_and_options(analysis, clip_vision, photo, errors):
    faces = align(analysis, torch.cat([photo, photo.flip(2)]))[0]
    (identity,) = run(
        "InfiniteIDEncode", faces, clip_vision, "stack", "1, 0.5", "penultimate", "raw"
    )
    assert identity.weight.tolist() == [1.0, 0.5]
    assert torch.equal(identity["face"].value[0], faces[0].embedding)
    assert identity["clip"].reading.output == "penultimate"
    with pytest.raises(errors.OptionError, match="Expected 2 weights"):
        run("InfiniteIDEncode", faces, clip_vision, "stack", "1")


def test_the_embedded_adapter_takes_the_embedded_identity(pack, identity):
    (adapter,) = run("InfiniteIDAdapterLoader", EMBEDDED)
    pack.infinite_id_core.method.adapter.check_identity(adapter.adapter, identity)


def test_mix(pack, analysis, clip_vision, photo, identity):
    other = run("InfiniteIDEncode", align(analysis, photo.flip(2))[0], clip_vision, "stack")[0]
    (stacked,) = run("InfiniteIDMix", identity, other, "stack", 0.25)
    assert stacked.references == 2 and stacked.weight.tolist() == [1.5, 0.5]
    (even,) = run("InfiniteIDMix", identity, other, "stack", 0.5)
    assert even.weight.tolist() == [1.0, 1.0]
    (between,) = run("InfiniteIDMix", identity, other, "interpolate", 0.5)
    assert between.references == 1
    assert torch.allclose(
        between["clip"].value, (identity["clip"].value + other["clip"].value) / 2, atol=1e-5
    )
    for mode in ("stack", "interpolate"):
        assert run("InfiniteIDMix", identity, other, mode, 0.0)[0] is identity
        assert run("InfiniteIDMix", identity, other, mode, 1.0)[0] is other


def test_save_and_load(identity, errors):
    (file,) = run("InfiniteIDSaveIdentity", identity, "anna", "keep both")
    assert file == "anna.safetensors"
    loader = NODE_CLASS_MAPPINGS["InfiniteIDLoadIdentity"]
    assert file in loader.INPUT_TYPES()["required"]["file"][1]["options"]
    (loaded,) = run("InfiniteIDLoadIdentity", file)
    assert torch.equal(loaded["clip"].value, identity["clip"].value) and torch.equal(
        loaded["face"].value, identity["face"].value
    )
    assert run("InfiniteIDSaveIdentity", identity, "anna", "keep both") == ("anna 2.safetensors",)
    with pytest.raises(errors.NameTakenError):
        run("InfiniteIDSaveIdentity", identity, "anna", "error")


def test_saving_again_is_seen_by_the_loader(identity):
    loader = NODE_CLASS_MAPPINGS["InfiniteIDLoadIdentity"]
    (file,) = run("InfiniteIDSaveIdentity", identity, "bert", "overwrite")
    first = loader.fingerprint_inputs(file)
    assert loader.fingerprint_inputs(file) == first
    time.sleep(0.02)
    run("InfiniteIDSaveIdentity", identity, "bert", "overwrite")
    assert loader.fingerprint_inputs(file) != first


@pytest.mark.parametrize("name", ["", "..", "../anna", "a/b", "a\\b", "/anna", "CON", "nul.x"])
def test_identity_names_never_leave_the_folder(identity, errors, comfy_base, name):
    before = sorted(p for p in comfy_base.rglob("*.safetensors"))
    with pytest.raises(errors.NameNotAllowedError):
        run("InfiniteIDSaveIdentity", identity, name, "overwrite")
    assert sorted(p for p in comfy_base.rglob("*.safetensors")) == before


@pytest.mark.parametrize(
    "name", ["", "..", "../secret.safetensors", "a/../../secret.safetensors", "..\\secret",
             "/etc/passwd", "C:\\secret.safetensors", "~/secret"],
)  # fmt: skip
def test_loading_by_a_name_from_outside_is_refused(errors, comfy_base, name):
    (comfy_base / "models" / "secret.safetensors").write_bytes(b"no")
    with pytest.raises(errors.NameNotAllowedError):
        run("InfiniteIDLoadIdentity", name)


def test_bad_identity_files_through_the_node(pack, errors, comfy_base, identity, tmp_path):
    folder = pack.nodes.folders.identity_folder()
    (file,) = run("InfiniteIDSaveIdentity", identity, "cut", "overwrite")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[:-10])
    with pytest.raises(errors.TruncatedFileError, match="cut.safetensors"):
        run("InfiniteIDLoadIdentity", file)
    torch.save({"face": torch.zeros(1, 512)}, folder / "pickle.safetensors")
    with pytest.raises(errors.NotSafetensorsError):
        run("InfiniteIDLoadIdentity", "pickle.safetensors")
    with pytest.raises(errors.FileMissingError, match="Searched"):
        run("InfiniteIDLoadIdentity", "nobody.safetensors")


# --- folders -------------------------------------------------------------------------------


def test_yaml_folders_and_the_default_are_both_searched(pack, identity, tmp_path, monkeypatch):
    """A yaml line reaches folder_paths before the pack is loaded, and sets no extensions."""
    folders, kind = pack.nodes.folders, "infinite_id_identities"
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, kind, ([str(tmp_path)], set()))
    (tmp_path / "readme.txt").touch()
    pack.infinite_id_core.files.store.save_identity(identity, tmp_path, "from yaml")
    default = Path(folder_paths.models_dir) / kind
    pack.infinite_id_core.files.store.save_identity(identity, default, "from default", "overwrite")
    folders.register()
    folders.register()
    assert known[kind] == ([str(tmp_path), str(default)], {".safetensors"})
    files = folders.identity_files()
    assert {"from yaml.safetensors", "from default.safetensors"} <= set(files)
    assert "readme.txt" not in files
    for file in ("from yaml.safetensors", "from default.safetensors"):
        assert run("InfiniteIDLoadIdentity", file)[0].references == 1


def test_a_yaml_line_may_name_the_models_folder(pack, tmp_path, monkeypatch):
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "insightface", ([str(tmp_path / "models")], set()))
    roots = pack.nodes.folders.insightface_roots()
    assert roots == [tmp_path, Path(folder_paths.models_dir) / "insightface"]


# --- through ComfyUI's executor --------------------------------------------------------------


def graph(image: str, name: str) -> dict[str, Any]:
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "models": ("InfiniteIDFaceModelLoader",
                   {"pack": EMBEDDED, "provider": "CPU", "detector_size": 640}),
        "image": ("LoadImage", {"image": image}),
        "align": ("InfiniteIDAlignFace",
                  {"face_analysis": ["models", 0], "image": ["image", 0], "choose": "largest",
                   "index": 0, "order": "left to right", "padding": 0.25, "if_no_face": "skip"}),
        "clip": ("InfiniteIDOpenClipLoader",
                 {"model": EMBEDDED, "weights_file": "none (embedded)"}),
        "encode": ("InfiniteIDEncode",
                   {"faces": ["align", 0], "clip_vision": ["clip", 0], "combine": "stack"}),
        "save": ("InfiniteIDSaveIdentity",
                 {"identity": ["encode", 0], "name": name, "if_exists": "overwrite"}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize(("picture", "saved"), [("face", True), ("nobody", False)])
def test_photo_to_identity_file_in_the_executor(pack, photo, picture, saved):
    from PIL import Image

    pixels = data.astronaut() if picture == "face" else np.zeros((64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(Path(folder_paths.get_input_directory()) / f"{picture}.png")
    sent = Executor().run(graph(f"{picture}.png", picture), ["save"])
    events = [event for event, _ in sent]
    (output,) = shown(sent, "align")
    assert output["images"]
    path = pack.nodes.folders.identity_folder() / f"{picture}.safetensors"
    assert path.is_file() == saved
    if saved:
        assert not failures(sent) and "execution_success" in events
    else:  # told why, and the rest of the queue would go on
        assert "No face was found" in failures(sent)[0]["exception_message"]
        assert "execution_success" in events
