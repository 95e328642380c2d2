"""Image encoders in transformers' naming, as ComfyUI users have them: the same states."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from infinite_id_core import errors
from infinite_id_core.encoders import clip_text
from infinite_id_core.encoders.clip_vision import hidden_states, preprocess
from infinite_id_core.encoders.open_clip import load_open_clip
from microworld.config import OPEN_CLIP
from trainer.models.image_encoder import check_image_encoder, load_image_encoder

NAME = "tiny-of-two-names"
TEXTS = ["a photo of a person", "a red hat"]


@pytest.fixture
def listed(tmp_path: Path) -> Any:
    """The tiny model under a name in open_clip's own list."""
    path = tmp_path / f"{NAME}.json"
    path.write_text(json.dumps(OPEN_CLIP), encoding="utf-8")
    configs = dict(open_clip.factory._MODEL_CONFIGS)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    open_clip.add_model_config(path)
    yield NAME
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(configs)


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' own model of the tiny model's shape, with random weights."""
    from transformers import CLIPConfig, CLIPModel

    vision, text = OPEN_CLIP["vision_cfg"], OPEN_CLIP["text_cfg"]
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=OPEN_CLIP["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision["head_width"],
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "hidden_act": "gelu",
            "eos_token_id": text["vocab_size"] - 1,
        },
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():  # fresh norms are ones and zeros: a wrong place would not show
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture
def file(theirs: Any, tmp_path: Path) -> Path:
    state = {k: v.contiguous() for k, v in theirs.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(257)[None]
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_states_are_transformers_own(theirs: Any, file: Path, listed: str) -> None:
    vision = load_open_clip(listed, file)
    images = torch.rand(2, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    pixels = preprocess(images)
    with torch.no_grad():
        inner = theirs.vision_model(pixels, output_hidden_states=True)
        embeds = theirs.visual_projection(inner.pooler_output)
    found = vision.encode_image(images)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.last_hidden_state, inner.hidden_states[-1], **close)
    torch.testing.assert_close(found.penultimate_hidden_states, inner.hidden_states[-2], **close)
    torch.testing.assert_close(found.image_embeds, embeds, **close)
    tokens = open_clip.tokenizer.SimpleTokenizer()(TEXTS, 77)
    with torch.no_grad():
        inner = theirs.text_model(input_ids=tokens)
        wanted = theirs.text_projection(inner.pooler_output)
    assert vision.read_texts is not None
    torch.testing.assert_close(vision.read_texts(TEXTS), wanted, **close)


def test_both_namings_give_the_same_weights_and_states(
    file: Path, listed: str, tmp_path: Path
) -> None:
    """In the trainer as in the node: it is one function."""
    first = load_image_encoder(listed, str(file))
    other = tmp_path / "open_clip.safetensors"
    tower = {f"visual.{k}": v.contiguous() for k, v in first.model.state_dict().items()}
    save_file(tower, other)
    second = load_image_encoder(listed, str(other))
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    images = torch.rand(1, 224, 224, 3, generator=torch.Generator().manual_seed(0))
    states = [hidden_states(v, list(images), "last") for v in (first, second)]
    torch.testing.assert_close(states[0], states[1], rtol=1e-5, atol=1e-5)


def test_both_namings_pass_the_trainers_check(file: Path, listed: str) -> None:
    check_image_encoder(listed, str(file))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"vision_model.encoder.layers.1.self_attn.k_proj.bias": None}, errors.MissingTensorError),
        ({"visual_projection.weight": None}, errors.MissingTensorError),
        ({"vision_model.encoder.layers.9.mlp.fc1.bias": 1}, errors.UnexpectedTensorError),
        ({"vision_model.encoder.layers.0.self_attn.q_proj.weight": 3}, errors.WrongShapeError),
        ({"visual_projection.weight": 3}, errors.WrongShapeError),
    ],
)
def test_what_does_not_fit_is_named_by_check_and_load(
    file: Path, listed: str, changes: dict[str, Any], error: type[Exception]
) -> None:
    state = load_file(file)
    for name, size in changes.items():
        if size is None:
            del state[name]
        else:
            state[name] = torch.zeros(size, size)
    save_file(state, file)
    for read in (check_image_encoder, load_image_encoder):
        with pytest.raises(error, match="model.safetensors"):
            read(listed, str(file))


def test_a_file_of_the_image_side_alone_has_no_texts(file: Path, listed: str) -> None:
    """As IP-Adapter's image encoders are."""
    state = {k: v for k, v in load_file(file).items() if k.startswith("vi")}
    save_file(state, file)
    assert load_open_clip(listed, file).clip_model == listed
    with pytest.raises(errors.MissingTensorError, match="text side"):
        clip_text.load_text_tower(copy.deepcopy(OPEN_CLIP), listed, file)
