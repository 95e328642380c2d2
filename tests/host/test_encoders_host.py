"""open_clip and ComfyUI give the same hidden states on the same weights."""

from __future__ import annotations

import copy
import json
from typing import Any

import comfy.clip_vision
import comfy.model_management
import pytest
import torch

from nodes import NODE_CLASS_MAPPINGS


@pytest.fixture(scope="module")
def weights(pack) -> dict[str, torch.Tensor]:
    """The embedded open_clip model, rounded to float16: ComfyUI keeps encoders so on the CPU."""
    _, state = pack.microworld.image_encoder.config_and_weights()
    return {k: v.half().float() for k, v in state.items()}


@pytest.fixture(scope="module")
def config(pack) -> dict[str, Any]:
    return copy.deepcopy(pack.microworld.config.OPEN_CLIP)


@pytest.fixture(scope="module")
def ours(pack, weights, config) -> Any:
    return pack.infinite_id_core.encoders.open_clip.build_open_clip(config, weights, "microworld")


@pytest.fixture(scope="module")
def theirs(weights, config, tmp_path_factory) -> Any:
    """The same weights as ComfyUI's own CLIP_VISION object."""
    vision = config["vision_cfg"]
    path = tmp_path_factory.mktemp("clip") / "config.json"
    values = {
        "hidden_act": "gelu",
        "hidden_size": vision["width"],
        "image_size": vision["image_size"],
        "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
        "model_type": "clip_vision_model",
        "num_attention_heads": vision["width"] // vision["head_width"],
        "num_channels": 3,
        "num_hidden_layers": vision["layers"],
        "patch_size": vision["patch_size"],
        "projection_dim": config["embed_dim"],
    }
    path.write_text(json.dumps(values), encoding="utf-8")
    model = comfy.clip_vision.ClipVisionModel(str(path))
    tower = {k: v.clone() for k, v in weights.items() if k.startswith("visual.")}
    missing, unexpected = model.load_sd(comfy.clip_vision.convert_to_transformers(tower, "visual."))
    assert not missing and not unexpected
    return model


SAME = 1e-4  # relative: a pixel or two may be rounded to the next of 256 levels
LEVEL = 1 / 255 / 0.26130258  # one of those levels after normalisation, at CLIP's least deviation


def pictures(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize(
    ("shape", "crop"),
    [((2, 224, 224, 3), True), ((2, 300, 200, 3), True), ((1, 200, 333, 3), False),
     ((1, 1024, 1024, 4), True), ((1, 32, 48, 3), True)],
)  # fmt: skip
def test_same_hidden_states(ours, theirs, shape, crop):
    images = pictures(*shape)
    a, b = ours.encode_image(images, crop=crop), theirs.encode_image(images, crop=crop)
    assert a.last_hidden_state.shape == (shape[0], 257, 96)
    for name in ("last_hidden_state", "penultimate_hidden_states", "image_embeds"):
        assert a[name].dtype == torch.float32
        assert relative(a[name], b[name]) < SAME, name
    assert relative(a.last_hidden_state, a.penultimate_hidden_states) > 1e-2


@pytest.mark.parametrize("shape", [(1, 224, 224, 3), (2, 300, 200, 3), (1, 63, 511, 4)])
@pytest.mark.parametrize("crop", [True, False])
def test_same_preprocessing(pack, shape, crop):
    images = pictures(*shape) * 1.2 - 0.1  # beyond [0, 1] as well
    ours = pack.infinite_id_core.encoders.clip_vision.preprocess(images, 224, crop=crop)
    theirs = comfy.clip_vision.clip_preprocess(images, 224, crop=crop)
    difference = (ours - theirs).abs()
    assert difference.max() < 1.01 * LEVEL and difference.mean() < 1e-5


def test_comfyuis_encoder_makes_the_same_identity(pack, ours, theirs):
    core = pack.infinite_id_core
    face = core.faces.align.AlignedFace(
        crop=pictures(224, 224, 3),
        embedding=torch.arange(512.0),
        recogniser="made/reader",
        detected=core.faces.detect.DetectedFace(box=(0, 0, 1, 1), landmarks=None, score=1.0),
    )
    for layer in ("last", "penultimate"):
        options = core.encoders.encode.EncodeOptions(clip_layer=layer)
        a, b = (core.encoders.encode.encode_faces([face], v, options) for v in (ours, theirs))
        assert (
            relative(a["clip"].value, b["clip"].value) < SAME
            and relative(a["face"].value, b["face"].value) < 1e-6
        )
    assert b["clip"].reading.model == "vit-96"


def test_our_encoder_fits_comfyuis_nodes(ours):
    (out,) = NODE_CLASS_MAPPINGS["CLIPVisionEncode"]().encode(
        ours, pictures(1, 64, 64, 3), "center"
    )
    assert out["image_embeds"].shape == (1, 64) and out.mm_projected is None


def test_the_host_manages_the_encoders_memory(pack, ours):
    node = NODE_CLASS_MAPPINGS["InfiniteIDOpenClipLoader"]
    (encoder,) = node.execute("microworld (embedded)", "none (embedded)").args
    images = pictures(1, 224, 224, 3)
    comfy.model_management.unload_all_models()
    first = encoder.encode_image(images).last_hidden_state
    loaded = [m.model for m in comfy.model_management.current_loaded_models]
    assert encoder.patcher in loaded
    assert encoder.patcher.model_size() == sum(
        p.numel() * p.element_size() for p in encoder.model.parameters()
    )
    comfy.model_management.unload_all_models()
    assert encoder.patcher not in [m.model for m in comfy.model_management.current_loaded_models]
    assert relative(encoder.encode_image(images).last_hidden_state, first) < 1e-5
    assert encoder.clip_model == "microworld"


def test_a_real_model_without_a_file_and_a_file_that_is_none(pack, comfy_base):
    node, errors = NODE_CLASS_MAPPINGS["InfiniteIDOpenClipLoader"], pack.infinite_id_core.errors
    with pytest.raises(errors.OptionError, match="choose a .safetensors file"):
        node.execute("ViT-H-14", "none (embedded)")
    with pytest.raises(errors.FileMissingError, match="clip_vision"):
        node.execute("ViT-H-14", "absent.safetensors")
    with pytest.raises(errors.NameNotAllowedError):
        node.execute("ViT-H-14", "../../secret.safetensors")
    trap = comfy_base / "models" / "clip_vision" / "trap.safetensors"
    trap.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"visual.conv1.weight": torch.zeros(1)}, trap)
    with pytest.raises(errors.NotSafetensorsError):
        node.execute("ViT-H-14", "trap.safetensors")
    trap.unlink()
