"""Published adapters of every family, from a file to a picture: ComfyUI and diffusers agree."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch

from ..core import published_files as files
from . import tiny_sdxl
from .test_parity_hosts import Case, comfy_model, host, relative, unet
from .test_second_projector import APPLY, core, diffusers_host, in_both, node

__all__ = ["comfy_model", "core", "diffusers_host", "host", "unet"]  # fixtures


@pytest.fixture(scope="module")
def sizes(host: Any, comfy_model: Any) -> files.Sizes:
    """Of files for the tiny model."""
    found = [
        files.Layer(number=2 * i + 1, path=layer.path, width=layer.width)
        for i, layer in enumerate(host.model_layers(comfy_model))
    ]
    return files.Sizes(
        layers=tuple(found), context=tiny_sdxl.CONTEXT, width=40, heads=1, face_heads=1, tokens=5,
        face_hidden=32, rank=2, states=24, pulid=24, former_heads=1, former_tokens=6, eva=20,
        level=28,
    )  # fmt: skip


@pytest.fixture(params=sorted(files.PROJECTORS))
def file(request: Any, sizes: files.Sizes, tmp_path: Path) -> Path:
    made = files.made(request.param, sizes, seed=9)
    return files.write(tmp_path / "adapter.bin", "nested pickle", made, sizes)


@pytest.fixture
def adapters(file: Path, core: Any, host: Any, comfy_model: Any) -> tuple[Any, Any]:
    """The same file under ComfyUI's memory management, and in torch's own layers."""
    module = importlib.import_module(f"{core.__name__}.files.adapters")
    options = module.AdapterOptions(
        layers=tuple(host.model_layers(comfy_model)), image_encoder="made-H"
    )
    managed = module.read_adapter(file, comfy.ops.manual_cast, options)
    return host.LoadedAdapter(managed), module.read_adapter(file, options=options)


def person(core: Any, adapter: Any, photos: int = 2, scale: float = 1.0) -> Any:
    draw, features = torch.Generator().manual_seed(4), core.method.features
    made = {}
    for name, reading in adapter.needs.items():
        value, null = (torch.randn(n, *reading.shape, generator=draw) for n in (photos, 1))
        if reading.is_embedding:
            value = scale * torch.nn.functional.normalize(value, dim=-1)
        made[name] = features.Feature(reading=reading, value=value, null=null[0])
    weight = torch.arange(1.0, photos + 1)
    return core.method.identity.Identity(features=made, weight=weight)


@pytest.mark.parametrize("stream", ["two streams", "one stream"])
def test_both_hosts_paint_the_same(
    stream: str, core: Any, diffusers_host: Any, comfy_model: Any, unet: Any, adapters: Any,
) -> None:  # fmt: skip
    case, applied = Case(), [{"identity": person(core, adapters[1])}]
    one = {"mixing": "off", "text_stream": "shared"} if stream == "one stream" else {}
    in_comfy, picture = in_both(
        case, core, diffusers_host, comfy_model, unet, adapters, applied, **one
    )
    assert relative(picture, in_comfy) < 1e-4
    assert relative(case.comfy(comfy_model, "normal"), in_comfy) > 0.002
    other = person(core, adapters[1], photos=1, scale=3.0)
    another = node("InfiniteIDApply", comfy_model, adapters[0], identity=other, **{**APPLY, **one})
    assert relative(case.comfy(another, "normal"), in_comfy) > 1e-4


def test_another_gpus_copy_has_all_its_parts(core: Any, adapters: Any) -> None:
    """What ComfyUI makes again for another GPU: modules of its own, the same weights."""
    ours = adapters[0].adapter
    again = importlib.import_module(type(adapters[0]).__module__)._copied(ours)
    state = ours.state_dict()
    assert list(again.state_dict()) == list(state) and again is not ours
    assert all(t.data_ptr() == state[n].data_ptr() for n, t in again.state_dict().items())
    who = person(core, ours)
    assert torch.equal(again.tokens(who), ours.tokens(who))
    assert again.low_rank_parts.keys() == ours.low_rank_parts.keys()
    counted = adapters[0].patcher.model_size()
    assert counted == sum(t.numel() * t.element_size() for t in state.values())
