"""PuLID's image encoder: its outputs, its files' namings, and the way from a photo to tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from infinite_id_core.encoders import eva
from infinite_id_core.encoders.eva import EvaVision, filled, load_eva, prefix_of
from infinite_id_core.encoders.references import Reference, read_references
from infinite_id_core.errors import (
    EncoderError,
    MissingTensorError,
    UnexpectedTensorError,
    WrongFormatError,
)
from infinite_id_core.faces import pulid as pulid_faces
from infinite_id_core.faces.align import AlignedFace
from infinite_id_core.faces.pulid import pulid_picture
from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.sdxl import layers as sdxl_layers

from .. import published_files as files
from ..tiny_eva import BLOCKS, HEAD, WIDTH, tower


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As EVA-CLIP's own file has them."""
    pairs = (
        ("attn.norm", "attn.inner_attn_ln"), ("mlp.norm", "mlp.ffn_ln"), ("mlp.fc1_g", "mlp.w1"),
        ("mlp.fc1_x", "mlp.w2"), ("mlp.fc2", "mlp.w3"), ("q_proj.bias", "q_bias"),
        ("v_proj.bias", "v_bias"),
    )  # fmt: skip
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in pairs:
            name = name.replace(ours, theirs)
        renamed[f"visual.{name}"] = tensor
    return renamed


def test_the_states_enter_the_blocks_and_the_head_has_unit_length() -> None:
    model = tower(size=56).eval()
    encoder = EvaVision(model, BLOCKS)
    pictures = [torch.rand(56, 56, 3), torch.rand(56, 56, 3)]
    head, levels = encoder.read(pictures)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    rounded = (torch.stack(pictures) * 255).round() / 255
    x = ((rounded - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        tokens, rope = model._pos_embed(model.patch_embed(x))
        for number, block in enumerate(model.blocks):
            if number in BLOCKS:
                found = levels[:, BLOCKS.index(number)]
                torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-4)
            tokens = block(tokens, rope=rope)
        whole = model.head(model.norm(tokens)[:, 0])
    torch.testing.assert_close(head, whole / whole.norm(dim=-1, keepdim=True), rtol=1e-4, atol=1e-4)


def test_the_same_pictures_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, picture = EvaVision(tower(size=56), BLOCKS), torch.rand(56, 56, 3)
    first = encoder.read([picture])
    monkeypatch.setattr(encoder, "_read", None)
    assert encoder.read([picture.clone()]) is first
    with pytest.raises(TypeError):
        encoder.read([picture * 0.5])


def test_all_three_namings_give_the_same_tower(tmp_path: Path) -> None:
    state = tower().state_dict()
    for named in (state, {f"visual.trunk.{n}": t for n, t in state.items()}, original_names(state)):
        again = filled(tower(seed=2), tmp_path, named).state_dict()
        assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_tower_with_a_tensor_too_few_too_many_or_of_another_shape(tmp_path: Path) -> None:
    state = tower().state_dict()
    with pytest.raises(MissingTensorError, match=r"head\.bias"):
        filled(tower(), tmp_path, {n: t for n, t in state.items() if n != "head.bias"})
    with pytest.raises(UnexpectedTensorError, match="more"):
        filled(tower(), tmp_path, {**state, "more": torch.zeros(1)})
    with pytest.raises(WrongFormatError, match=r"head\.weight is \[3, 3\]"):
        filled(tower(), tmp_path, {**state, "head.weight": torch.zeros(3, 3)})


def test_the_true_towers_shapes_are_recognised_in_every_naming() -> None:
    import timm

    with torch.device("meta"):
        state = timm.create_model(eva.TIMM_MODEL, num_classes=eva.HEAD_WIDTH).state_dict()
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    assert prefix_of(shapes) == ""
    assert prefix_of({f"visual.trunk.{n}": s for n, s in shapes.items()}) == "visual.trunk."
    original = {n: tuple(t.shape) for n, t in original_names(state).items()}
    assert prefix_of({**original, "text.positional_embedding": (77, 768)}) == "visual."
    fewer = {n: s for n, s in shapes.items() if not n.startswith("blocks.23.")}
    assert prefix_of(fewer) is None
    assert prefix_of({"visual.conv1.weight": (1024, 3, 14, 14)}) is None


def test_another_file_is_refused_with_the_name_of_the_right_one(tmp_path: Path) -> None:
    torch.save({"visual.proj": torch.zeros(3)}, tmp_path / "clip.pt")
    with pytest.raises(WrongFormatError, match=r"EVA02_CLIP_L_336_psz14_s6B\.pt"):
        load_eva(tmp_path / "clip.pt")


# --- from a photo ----------------------------------------------------------------------------

LANDMARKS = np.array([[40.0, 50.0], [70, 50], [55, 66], [43, 80], [68, 80]])


def face(photo: Tensor) -> AlignedFace:
    return AlignedFace(
        crop=torch.zeros(224, 224, 3),
        embedding=torch.randn(512, generator=torch.Generator().manual_seed(5)) * 9,
        recogniser="antelopev2/glintr100",
        detected=SimpleNamespace(landmarks=LANDMARKS),  # type: ignore[arg-type]
        photo=photo,
    )


@pytest.mark.parametrize("family", ["pulid v1", "pulid v1.1"])
def test_a_photo_becomes_pulids_tokens(family: str, tmp_path: Path) -> None:
    sizes = dataclasses.replace(files.SMALL, eva=HEAD, level=WIDTH)
    path = files.write(tmp_path / "x.bin", "nested pickle", files.made(family, sizes, 2), sizes)
    layers = files.layers_of(sizes, sdxl_layers)
    adapter = read_adapter(path, options=AdapterOptions(layers=layers))
    photo = torch.rand(120, 110, 3, generator=torch.Generator().manual_seed(3))
    reference = Reference(photo=photo, face=face(photo))
    identity = read_references([reference], [adapter], EvaVision(tower(), BLOCKS))
    tokens = adapter.tokens(identity)
    assert tokens.shape == (1, adapter.projector.tokens_per_reference, sizes.context)
    assert not torch.allclose(tokens, adapter.null_tokens(identity))
    darker = Reference(photo=photo * 0.3, face=face(photo * 0.3))
    other = read_references([darker], [adapter], EvaVision(tower(), BLOCKS))
    assert not torch.allclose(adapter.tokens(other), tokens)
    with pytest.raises(EncoderError, match=r"EVA02_CLIP_L_336_psz14_s6B\.pt"):
        read_references([reference], [adapter], None)


def test_another_family_refuses_this_encoder(tmp_path: Path) -> None:
    path = files.write(tmp_path / "x.bin", "nested pickle", files.made("plus", files.SMALL, 2))
    layers = files.layers_of(files.SMALL, sdxl_layers)
    adapter = read_adapter(path, options=AdapterOptions(layers=layers, image_encoder="ViT-H-14"))
    photo = torch.rand(120, 110, 3)
    with pytest.raises(EncoderError, match="the image encoder given is EVA02"):
        read_references(
            [Reference(photo=photo, face=face(photo))], [adapter], EvaVision(tower(), BLOCKS)
        )


def test_the_landmarks_land_on_facexlibs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A white dot at each landmark of a black photo, in grey, at the template's places."""
    monkeypatch.setattr(pulid_faces, "face_parser", lambda: None)
    template = pulid_faces._TEMPLATE
    photo = torch.zeros(256, 256, 3)
    points = (template / 2).round().astype(int)
    for x, y in points:
        photo[y - 1 : y + 2, x - 1 : x + 2] = torch.tensor([1.0, 0.0, 0.0])
    crop = pulid_picture(photo, points.astype(float))
    assert crop.shape == (512, 512, 3)
    assert torch.equal(crop[..., 0], crop[..., 1])  # grey
    for x, y in template.round().astype(int):
        assert abs(float(crop[y, x, 0]) - 0.299) < 0.02
    assert float(crop[240:370, 200:320].max()) < 0.31  # the photo's own part


def test_the_background_is_white_where_it_can_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = torch.rand(120, 110, 3)
    monkeypatch.setattr(pulid_faces, "face_parser", lambda: None)
    plain = pulid_picture(photo, LANDMARKS)
    assert "stays" in pulid_faces.parsing_told()

    def parser(pixels: Tensor) -> list[Tensor]:
        """Skin (1) on the left, cloth (16) on the right."""
        labels = torch.zeros(1, 19, *pixels.shape[2:])
        labels[:, 1, :, :256] = 1.0
        labels[:, 16, :, 256:] = 1.0
        return [labels]

    monkeypatch.setattr(pulid_faces, "face_parser", lambda: parser)
    parsed = pulid_picture(photo, LANDMARKS)
    assert torch.equal(parsed[:, :256], plain[:, :256])
    assert bool((parsed[:, 256:] == 1.0).all()) and not pulid_faces.parsing_told()
