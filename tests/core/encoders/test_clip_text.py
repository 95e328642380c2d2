"""E_text against open_clip's own model, from a state dict and from a file, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from infinite_id_core import errors
from infinite_id_core.encoders import clip_text
from infinite_id_core.encoders.open_clip import build_open_clip, load_open_clip
from infinite_id_core.scores import metrics
from microworld.config import OPEN_CLIP

TEXTS = ["a photo of a person", "a sketch of someone, smiling, at the beach", ""]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).eval()


@pytest.fixture(scope="module")
def wanted(model) -> torch.Tensor:
    tokens = open_clip.tokenizer.SimpleTokenizer()(TEXTS, model.context_length)
    with torch.no_grad():
        return model.encode_text(tokens)


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal but for the order in which sums are added up: another batch, another address."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def saved(path: Path, state: dict[str, torch.Tensor]) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def test_a_state_dict_gives_open_clips_own_embeddings(model, wanted):
    found = clip_text.build_text_tower(OPEN_CLIP, "tiny", model.state_dict()).encode(TEXTS)
    assert found.dtype == torch.float32 and not found.requires_grad
    same(found, wanted)
    assert metrics.cosine(found[:2], found[1:]).max() < 0.999  # the texts do tell


@pytest.mark.parametrize("prefix", ["", "text."])
def test_a_file_gives_the_same_and_only_its_text_side_is_read(model, wanted, tmp_path, prefix):
    state = model.state_dict()
    text = {prefix + k: v for k, v in state.items() if not k.startswith("visual.")}
    path = saved(
        tmp_path / "both.safetensors", text | {"visual.proj": torch.full((2, 2), torch.nan)}
    )
    found = clip_text.load_text_tower(OPEN_CLIP, "tiny", path).encode(TEXTS)
    same(found, wanted)


def test_half_precision_files_are_computed_in_float32(model, wanted, tmp_path):
    state = {k: v.half() for k, v in model.state_dict().items() if v.is_floating_point()}
    path = saved(tmp_path / "half.safetensors", state)
    found = clip_text.load_text_tower(OPEN_CLIP, "tiny", path).encode(TEXTS)
    assert found.dtype == torch.float32
    assert metrics.cosine(found, wanted).min() > 0.999


def test_many_and_overlong_texts(model):
    tower = clip_text.build_text_tower(OPEN_CLIP, "tiny", model.state_dict())
    many = tower.encode([f"a person number {i}" for i in range(130)])
    assert many.shape[0] == 130
    same(many[100:101], tower.encode(["a person number 100"]))
    cut = tower.encode(["word " * 400, "word " * 500])
    same(cut[0], cut[1])


def test_the_image_encoder_reads_texts_beside_its_pictures(model, wanted, tmp_path):
    tiny = build_open_clip(OPEN_CLIP, model.state_dict(), "tiny")
    assert tiny.read_texts is not None
    same(tiny.read_texts(TEXTS), wanted)
    embeds = tiny.encode_image(torch.rand(2, 64, 64, 3)).image_embeds
    assert embeds.shape == (2, wanted.shape[1])
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    assert build_open_clip(OPEN_CLIP, tower, "tiny").read_texts is None


def test_a_named_model_from_a_file_reads_texts(model, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "list_models", lambda: ["tiny"])
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: copy.deepcopy(OPEN_CLIP))
    path = saved(tmp_path / "tiny.safetensors", model.state_dict())
    vision = load_open_clip("tiny", path)
    assert vision.read_texts is not None
    with torch.no_grad():
        tokens = open_clip.tokenizer.SimpleTokenizer()(TEXTS, model.context_length)
        same(vision.read_texts(TEXTS), model.encode_text(tokens))


# --- what is refused -----------------------------------------------------------------------------


def test_a_file_without_a_text_side(model, tmp_path):
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    path = saved(tmp_path / "visual.safetensors", tower)
    with pytest.raises(errors.MissingTensorError, match="text side.*CLIP-T needs") as caught:
        clip_text.load_text_tower(OPEN_CLIP, "tiny", path)
    assert caught.value.path == path


def test_another_models_shapes_and_broken_numbers(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    wide = state | {"ln_final.weight": torch.ones(3)}
    with pytest.raises(errors.WrongShapeError, match="ln_final.weight"):
        clip_text.load_text_tower(OPEN_CLIP, "tiny", saved(tmp_path / "a.safetensors", wide))
    broken = state | {"ln_final.weight": torch.full_like(state["ln_final.weight"], torch.inf)}
    with pytest.raises(errors.NotFiniteError, match="ln_final.weight"):
        clip_text.load_text_tower(OPEN_CLIP, "tiny", saved(tmp_path / "b.safetensors", broken))


def test_a_tokenizer_that_would_be_downloaded(tmp_path):
    config = copy.deepcopy(OPEN_CLIP)
    config["text_cfg"]["hf_tokenizer_name"] = "some/tokenizer"
    with pytest.raises(errors.EncoderError, match="would have to be downloaded"):
        clip_text.load_text_tower(config, "other", tmp_path / "never read.safetensors")
