"""Photos read for published adapters without ComfyUI, and what inspect says of their files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infinite_id_core.files.adapter_options import AdapterOptions
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.sdxl import layers
from microworld import files as embedded
from microworld.people import reference_picture
from trainer import painter
from trainer.inspect import inspect_file

from .. import published_files as files
from .. import tiny_eva
from ..published_files import SMALL

LAYERS = files.layers_of(SMALL, layers)


class Encoder:
    """As wide as ViT-H; what it gives follows from the picture's mean colour."""

    clip_model = "ViT-H-14"

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Any:
        mean = image.mean(dim=(1, 2, 3))
        states = mean[:, None, None].expand(len(image), 257, 1280)
        return SimpleNamespace(
            last_hidden_state=states,
            penultimate_hidden_states=states,
            image_embeds=mean[:, None].expand(len(image), 1024),
        )


@pytest.mark.parametrize("family", ["base H", "plus", "faceid", "plus v2", "raw face"])
def test_a_photo_is_read_as_the_adapter_needs_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.write(tmp_path / "a.bin", "nested pickle", files.made(family))
    options = AdapterOptions(layers=LAYERS, recogniser="microworld/rec")
    adapter = read_adapter(path, options=options)
    monkeypatch.setattr(painter, "load_image_encoder", lambda *_: Encoder())
    photo = torch.from_numpy(np.array(reference_picture())).float() / 255
    reader = painter.IdentityReader(embedded.FACE_MODELS)
    identity = reader.read(adapter, {"a photo": photo, "the same": photo})
    assert identity.references == 2
    assert adapter.tokens(identity).isfinite().all()
    assert adapter.null_tokens(identity).isfinite().all()
    nobody = torch.from_numpy(np.array(Image.new("RGB", (64, 64), "teal"))).float() / 255
    if family == "base H":  # reads the whole picture: no face is looked for
        assert reader.read(adapter, {"nobody": nobody}).references == 1
    else:
        with pytest.raises(painter.NoFaceError, match="nobody: "):
            reader.read(adapter, {"nobody": nobody})


def test_pulid_reads_a_photo_without_comfyui(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = dataclasses.replace(SMALL, eva=tiny_eva.HEAD, level=tiny_eva.WIDTH)
    path = files.write(tmp_path / "a.bin", "nested pickle", files.made("pulid v1", sizes), sizes)
    options = AdapterOptions(layers=LAYERS, recogniser="microworld/rec")
    adapter = read_adapter(path, options=options)
    photo = torch.from_numpy(np.array(reference_picture())).float() / 255
    with pytest.raises(painter.EncoderError, match=r"EVA02_CLIP_L_336_psz14_s6B\.pt"):
        painter.IdentityReader(embedded.FACE_MODELS).read(adapter, {"a photo": photo})
    encoder = painter.EvaVision(tiny_eva.tower(), tiny_eva.BLOCKS)
    monkeypatch.setattr(painter, "load_eva", lambda _: encoder)
    reader = painter.IdentityReader(embedded.FACE_MODELS, "a file")
    assert adapter.tokens(reader.read(adapter, {"a photo": photo})).isfinite().all()


@pytest.mark.parametrize("container", ["flat safetensors", "nested pickle"])
def test_inspect_tells_the_family(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infinite_id_core.files.published.family.SDXL_LAYERS", LAYERS)
    monkeypatch.setattr("infinite_id_core.files.published.family.check_generation", lambda *_: None)
    path = files.write(tmp_path / "a", container, files.made("plus v2"))
    said = inspect_file(path).facts["adapter"]
    assert "FaceID plus v2" in said and "buffalo_l/w600k_r50" in said
