"""E_face and E_clip without a host: open_clip's own code on the embedded tiny model's shape."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from infinite_id_core import errors
from infinite_id_core.encoders.clip_vision import (
    CLIP_MEAN,
    CLIP_STD,
    hidden_states,
    preprocess,
)
from infinite_id_core.encoders.encode import (
    EncodeOptions,
    encode_faces,
    face_embedding,
    parse_weights,
)
from infinite_id_core.encoders.named import encoder_name
from infinite_id_core.encoders.open_clip import OpenClipVision, build_open_clip, load_open_clip
from infinite_id_core.faces.align import AlignedFace
from infinite_id_core.faces.detect import DetectedFace
from infinite_id_core.method.features import Reading
from microworld.config import OPEN_CLIP


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).eval()


@pytest.fixture(scope="module")
def tiny(model) -> OpenClipVision:
    return build_open_clip(OPEN_CLIP, model.state_dict(), "microworld")


def made_face(seed: int = 0, recogniser: str = "made/reader", size: int = 224) -> AlignedFace:
    return AlignedFace(
        crop=torch.rand(size, size, 3, generator=generator(seed)),
        embedding=torch.randn(512, generator=generator(seed)) * 20,
        recogniser=recogniser,
        detected=DetectedFace(box=(0, 0, 1, 1), landmarks=np.zeros((5, 2)), score=1.0),
    )


class MadeVision:
    """Another encoder behind ComfyUI's interface."""

    clip_model = "made-vision"

    def __init__(self, tokens: int = 257, width: int = 1280, value: float = 1.0) -> None:
        self.shape, self.value, self.sizes = (tokens, width), value, []

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        self.sizes.append(image.shape[0])
        states = torch.full((image.shape[0], *self.shape), self.value, dtype=torch.float16)
        return type("Output", (), {
            "last_hidden_state": states, "penultimate_hidden_states": states * 2
        })()  # fmt: skip


# --- E_face --------------------------------------------------------------------------------------


def test_normed_has_length_one_and_raw_is_untouched():
    face = made_face()
    assert face_embedding(face).norm() == pytest.approx(1.0)
    assert torch.equal(face_embedding(face, "raw"), face.embedding)


# --- an identity ---------------------------------------------------------------------------------


def test_stack_keeps_every_face_with_its_weight():
    options = EncodeOptions(weights=(1.0, 0.5), clip_layer="penultimate", embedding="raw")
    identity = encode_faces([made_face(0), made_face(1)], MadeVision(), options)
    assert identity["face"].value.shape == (2, 512) and identity["clip"].value.shape == (
        2,
        257,
        1280,
    )
    assert identity.weight.tolist() == [1.0, 0.5]
    assert identity["clip"].value.unique().tolist() == [2.0]  # the penultimate states
    assert torch.equal(identity["face"].value[1], made_face(1).embedding)
    assert identity["face"].reading == Reading(model="made/reader", output="raw", shape=(512,))
    wanted = Reading(model="made-vision", output="penultimate", shape=(257, 1280))
    assert identity["clip"].reading == wanted


def test_average_is_one_reference():
    options = EncodeOptions(combine="average", weights=(3.0, 1.0))
    identity = encode_faces([made_face(0), made_face(1)], MadeVision(), options)
    first, second = (face_embedding(made_face(i)) for i in (0, 1))
    wanted = torch.nn.functional.normalize(0.75 * first + 0.25 * second, dim=0)
    assert torch.allclose(identity["face"].value[0], wanted, atol=1e-6)


def test_a_hundred_faces_are_encoded_in_parts():
    vision = MadeVision(width=8)
    identity = encode_faces([made_face(i, size=32) for i in range(100)], vision)
    assert identity.references == 100
    assert max(vision.sizes) == 16 and sum(vision.sizes) == 100


def test_no_face_wrong_weights_and_mixed_recognisers():
    with pytest.raises(errors.OptionError, match="At least one face"):
        encode_faces([], MadeVision())
    with pytest.raises(errors.OptionError, match="Expected 1 weights, .* got 2"):
        encode_faces([made_face()], MadeVision(), EncodeOptions(weights=(1.0, 2.0)))
    with pytest.raises(errors.OptionError, match="positive"):
        encode_faces([made_face()], MadeVision(), EncodeOptions(weights=(0.0,)))
    with pytest.raises(errors.IdentityMismatchError, match="made/reader.*other/reader"):
        encode_faces([made_face(), made_face(1, "other/reader")], MadeVision())
    with pytest.raises(errors.OptionError, match="combine"):
        EncodeOptions(combine="sum")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "weights"), [("", ()), ("  ", ()), ("1, 0.5", (1.0, 0.5)), ("2;3", (2.0, 3.0))]
)
def test_weights_as_text(text, weights):
    assert parse_weights(text) == weights


@pytest.mark.parametrize("text", ["a", "1,,2", "1 2", ","])
def test_weights_that_are_no_numbers(text):
    with pytest.raises(errors.OptionError, match="separated by commas"):
        parse_weights(text)


# --- encoders that do not fit --------------------------------------------------------------------


def test_wrong_tokens_name_what_is_wanted_and_what_was_given():
    with pytest.raises(errors.EncoderError, match="257 tokens.*577 tokens of width 1024"):
        encode_faces([made_face()], MadeVision(577, 1024))


def test_nan_and_nothing_are_refused():
    with pytest.raises(errors.EncoderError, match="NaN"):
        encode_faces([made_face()], MadeVision(value=float("nan")))
    with pytest.raises(errors.EncoderError, match="got nothing"):
        hidden_states(
            type("V", (), {"encode_image": lambda self, image: None})(), [made_face().crop], "last"
        )


class MadeTower(torch.nn.Module):
    """The modules of a CLIP vision model as ComfyUI names them, without weights."""

    def __init__(self, width: int, blocks: int, patch: int = 14, embeds: int = 1024) -> None:
        super().__init__()
        self.vision_model = torch.nn.Module()
        self.vision_model.embeddings = torch.nn.Module()
        self.vision_model.encoder = torch.nn.Module()
        with torch.device("meta"):
            patches = torch.nn.Conv2d(3, width, patch)
            self.visual_projection = torch.nn.Linear(width, embeds)
        self.vision_model.embeddings.patch_embedding = patches
        self.vision_model.encoder.layers = torch.nn.ModuleList(
            torch.nn.Identity() for _ in range(blocks)
        )


@pytest.mark.parametrize(
    ("tower", "name"),
    [
        (MadeTower(1280, 32), "ViT-H-14"),
        (MadeTower(1664, 48, embeds=1280), "ViT-bigG-14"),
        (MadeTower(1024, 24, embeds=768), "ViT-L-14"),
        (MadeTower(1280, 24), "vit-1280"),  # as wide as ViT-H, and another network
        (MadeTower(1024, 24, patch=16, embeds=768), "vit-1024"),
        (MadeTower(1024, 24, embeds=1024), "vit-1024"),
        (MadeTower(96, 2, embeds=64), "vit-96"),
        (torch.nn.Linear(1, 1), "vit-7"),
        (None, "vit-7"),
    ],
)
def test_encoders_are_named_by_their_network_not_by_its_width(tower, name):
    vision = type("Vision", (), {"model": tower})()
    width = tower.visual_projection.in_features if isinstance(tower, MadeTower) else 7
    assert encoder_name(vision, width) == name


def test_an_encoders_own_name_comes_first(tiny):
    assert encoder_name(tiny, 96) == "microworld"
    quick = OpenClipVision(tiny.model, "ViT-L-14-quickgelu")
    assert encoder_name(quick, 1024) == "ViT-L-14"


# --- open_clip -----------------------------------------------------------------------------------


def by_hooks(model: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Outputs of the last two blocks of open_clip's unchanged forward pass, and its features."""
    kept: list[torch.Tensor] = []
    blocks = model.visual.transformer.resblocks
    handles = [b.register_forward_hook(lambda *a: kept.append(a[2])) for b in blocks[-2:]]
    with torch.no_grad():
        features = model.encode_image(pixels)
    for handle in handles:
        handle.remove()
    return *kept, features


def test_hidden_states_are_those_inside_open_clips_own_pass(model, tiny):
    images = torch.rand(3, 224, 224, 3, generator=generator())
    before_last, last, features = by_hooks(model, preprocess(images))
    out = tiny.encode_image(images)
    assert out.last_hidden_state.shape == (3, 257, 96)
    assert torch.allclose(out.last_hidden_state, last, rtol=1e-4, atol=1e-5)
    assert torch.allclose(out["penultimate_hidden_states"], before_last, rtol=1e-4, atol=1e-5)
    assert torch.allclose(out.image_embeds, features, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(last, before_last, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_compute_in_float32_and_stay_half(model, dtype):
    narrow = {k: v.to(dtype) for k, v in model.state_dict().items()}
    wide = {k: v.float() for k, v in narrow.items()}
    images = torch.rand(2, 224, 224, 3, generator=generator())
    vision = build_open_clip(OPEN_CLIP, narrow, "microworld")
    out = vision.encode_image(images).last_hidden_state
    wanted = build_open_clip(OPEN_CLIP, wide, "x").encode_image(images).last_hidden_state
    assert out.dtype == torch.float32 and torch.allclose(out, wanted, rtol=1e-4, atol=1e-5)
    assert vision.model.transformer.resblocks[0].mlp.c_fc.weight.dtype == dtype


def test_preprocessing_against_open_clips_own(model):
    """open_clip resizes an 8-bit PIL picture; ours a float one: the same to two grey levels."""
    from PIL import Image

    pixels = torch.rand(40, 60, 3, generator=generator())
    pixels = torch.nn.functional.interpolate(
        pixels.permute(2, 0, 1)[None], size=(400, 600), mode="bicubic"
    ).clamp(0, 1)[0].permute(1, 2, 0)  # fmt: skip
    pixels = (pixels * 255).round() / 255
    transform = open_clip.image_transform(224, is_train=False, mean=CLIP_MEAN,
                                          std=CLIP_STD)  # fmt: skip
    theirs = transform(Image.fromarray((pixels.numpy() * 255).astype(np.uint8)))
    ours = preprocess(pixels[None])[0]
    levels = ((ours - theirs) * torch.tensor(CLIP_STD).view(3, 1, 1) * 255).abs()
    assert ours.shape == (3, 224, 224) and levels.max() < 2.1


def test_the_list_of_models_holds_those_that_fit_without_importing_open_clip():
    code = (
        "import sys; from infinite_id_core.encoders.open_clip import open_clip_models as models;"
        "print(models());"
        "assert not {'open_clip', 'insightface', 'cv2', 'onnxruntime'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[3]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("('ViT-H-14', 'ViT-L-14', 'ViT-bigG-14'")
    for name in ("ViT-L-14-336", "ViT-B-32", "RN50", "ViT-H-14-CLIPA"):
        assert f"'{name}'" not in out.stdout


# --- open_clip files -----------------------------------------------------------------------------


@pytest.fixture
def named_tiny(tmp_path, monkeypatch) -> str:
    """The tiny model under a name in open_clip's own list."""
    path = tmp_path / "tiny-test-model.json"
    path.write_text(json.dumps(OPEN_CLIP), encoding="utf-8")
    configs = dict(open_clip.factory._MODEL_CONFIGS)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    open_clip.add_model_config(path)
    yield "tiny-test-model"
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(configs)


def weights(model: Any, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {k: v.clone() for k, v in model.state_dict().items()} | changes
    return {k: v for k, v in tensors.items() if v is not None}


CONV = "visual.conv1.weight"


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_a_file_gives_the_models_states(tmp_path, model, tiny, named_tiny, prefix):
    tower = {prefix + k: v.clone() for k, v in model.visual.state_dict().items()}
    save_file(tower, tmp_path / "w.safetensors")
    loaded = load_open_clip(named_tiny, tmp_path / "w.safetensors")
    images = torch.rand(1, 224, 224, 3, generator=generator())
    for name, tensor in tiny.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor), name  # as it was written
    # The tensors lie at other addresses, so sums may be added up in another order.
    out = loaded.encode_image(images).last_hidden_state
    torch.testing.assert_close(
        out, tiny.encode_image(images).last_hidden_state, rtol=1e-4, atol=1e-5
    )
    assert loaded.clip_model == named_tiny


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({CONV: None}, errors.MissingTensorError),
        ({"visual.extra": torch.zeros(1)}, errors.UnexpectedTensorError),
        ({CONV: torch.zeros(96, 3, 16, 16)}, errors.WrongShapeError),
        ({CONV: torch.zeros(96, 3, 14, 14, dtype=torch.int8)}, errors.WrongDtypeError),
        ({CONV: torch.full((96, 3, 14, 14), float("inf"))}, errors.NotFiniteError),
        ({"vision_model.embeddings.class_embedding": torch.zeros(1)}, errors.MissingTensorError),
    ],
)
def test_bad_files_are_named(tmp_path, model, named_tiny, changes, error):
    path = tmp_path / "bad.safetensors"
    save_file(weights(model, **changes), path)
    with pytest.raises(error, match="bad.safetensors"):
        load_open_clip(named_tiny, path)


def test_a_pickle_is_refused_and_does_not_run(tmp_path, named_tiny):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "open_clip_model.safetensors"
    torch.save({"visual.conv1.weight": Trap()}, path)
    with pytest.raises(errors.NotSafetensorsError):
        load_open_clip(named_tiny, path)
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file(tmp_path, model, named_tiny):
    path = tmp_path / "cut.safetensors"
    save_file(weights(model), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.TruncatedFileError):
        load_open_clip(named_tiny, path)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no-such-model", "no model 'no-such-model'"),
        ("hf-hub:someone/something", "no model"),
        ("ViT-H-14-CLIPA", "preprocessing"),
        ("RN50", "ModifiedResNet"),
        ("ViT-L-14-336", "gives 577 tokens"),
        ("ViT-B-32", "gives 50 tokens"),
    ],
)
def test_models_that_do_not_fit(tmp_path, name, problem):
    with pytest.raises(errors.EncoderError, match=problem):
        load_open_clip(name, tmp_path / "none.safetensors")


def test_open_clip_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(errors.MissingPackageError, match="pip install open_clip_torch"):
        load_open_clip("ViT-H-14", tmp_path / "none.safetensors")
