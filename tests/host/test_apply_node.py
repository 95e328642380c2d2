"""The adapter loader and Apply as ComfyUI calls them, on the embedded default."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nodes as host_nodes


@pytest.fixture(scope="module")
def parts(pack: Any) -> dict[str, Any]:
    made = host_nodes.NODE_CLASS_MAPPINGS
    model, clip, _ = made["InfiniteIDMicroModel"].execute().result
    adapter = made["InfiniteIDAdapterLoader"].execute(file="microworld (embedded)").result[0]
    core = pack.infinite_id_core.method.face_clip
    generator = torch.Generator().manual_seed(0)
    config = adapter.adapter.config
    identity = core.face_clip_identity(
        face=torch.nn.functional.normalize(torch.randn(1, 512, generator=generator), dim=1),
        clip=torch.randn(1, 257, config.clip_width, generator=generator),
        weight=torch.ones(1),
        config=core.IdentityConfig(recogniser=config.recogniser, clip_model=config.clip_model),
    )
    return {"model": model, "clip": clip, "adapter": adapter, "identity": identity}


DEFAULTS: dict[str, Any] = {
    "strength": 1.0,
    "mixing": "mixed",
    "style": "adain_mean",
    "style_strength": 1.0,
    "merge_text": True,
    "text_stream": "own",
    "start_percent": 0.0,
    "end_percent": 1.0,
}


def test_defaults_are_the_schemas(pack: Any) -> None:
    schema = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDApply"].define_schema()
    found = {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
    assert found == DEFAULTS
    assert all(i.tooltip for i in schema.inputs)


def test_paints_someone_else_than_the_prompt_alone(parts: dict[str, Any]) -> None:
    apply = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDApply"]
    who = {k: parts[k] for k in ("model", "adapter", "identity")}
    patched = apply.execute(**who, **DEFAULTS).result[0]
    encode = host_nodes.CLIPTextEncode().encode
    positive, negative = (encode(parts["clip"], text)[0] for text in ("a portrait", ""))

    def run(model: Any) -> torch.Tensor:
        empty = {"samples": torch.zeros(1, 4, 16, 16)}
        (out,) = host_nodes.KSampler().sample(
            model, 1, 3, 5.0, "ddim", "normal", positive, negative, empty
        )
        return out["samples"]

    with torch.inference_mode():
        plain, painted = run(parts["model"]), run(patched)
    assert painted.isfinite().all()
    assert float((painted - plain).norm() / plain.norm()) > 1e-2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"strength": 4.0}, "strength"),
        ({"style_strength": -1.0}, "style_strength"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent"),
        ({"mixing": "blend"}, "mixing"),
        ({"mask": torch.zeros(64, 64)}, "mask"),
    ],
)
def test_values_out_of_range(
    pack: Any, parts: dict[str, Any], wrong: dict[str, Any], words: str
) -> None:
    """Over HTTP a value can arrive that the page would not let a user choose."""
    apply = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDApply"]
    who = {k: parts[k] for k in ("model", "adapter", "identity")}
    with pytest.raises(pack.infinite_id_core.errors.OptionError, match=words):
        apply.execute(**who, **{**DEFAULTS, **wrong})
    assert not parts["model"].wrappers
