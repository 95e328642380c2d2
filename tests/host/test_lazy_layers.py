"""Layers that have no weights before a file is loaded, as ComfyUI makes them under dynamic VRAM.

Made here, so that every host is held to it: the newest make Linear and Embedding so, and only on
some machines.
"""

from __future__ import annotations

from typing import Any

import comfy
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from safetensors.torch import save_file

import nodes as host_nodes

from .tiny_sdxl import adapter_config, tiny_adapter, tiny_identity, tiny_model


def lazily_made(layer: Any) -> Any:
    """``layer``, a class of the host's, whose weights are the tensors that are loaded into it."""

    class Lazy(layer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.awaited = [name for name, p in self._parameters.items() if p is not None]
            for name in self.awaited:
                self.register_parameter(name, None)

        def _load_from_state_dict(
            self, state: Any, prefix: str, _metadata: Any, _strict: Any, missing: Any, *_: Any
        ) -> None:
            for name in self.awaited:
                if prefix + name in state:
                    weight = torch.nn.Parameter(state[prefix + name], requires_grad=False)
                    setattr(self, name, weight)
                else:
                    missing.append(prefix + name)

    return Lazy


class LazyLayers(comfy.ops.manual_cast):  # type: ignore[misc]
    """ComfyUI's ``operations``, all made lazily."""

    Linear = lazily_made(comfy.ops.manual_cast.Linear)
    LayerNorm = lazily_made(comfy.ops.manual_cast.LayerNorm)


@pytest.fixture
def lazy_host(monkeypatch: Any) -> None:
    """The host makes its Linear and Embedding lazily, for every model built from now on.

    By the classes here; its own way is turned off where it is on.
    """
    memory = getattr(comfy, "memory_management", None)
    if memory is not None:
        monkeypatch.setattr(memory, "aimdo_enabled", False)
    for operations in (comfy.ops.disable_weight_init, comfy.ops.manual_cast):
        for name in ("Linear", "Embedding"):
            monkeypatch.setattr(operations, name, lazily_made(getattr(operations, name)))


@pytest.fixture
def micro(pack: Any, monkeypatch: Any) -> Any:
    """The Micro Model's builders, without what they have built for others."""
    module = pack.microworld.comfy_models
    for name in ("_unet", "_clip", "load_vae"):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    return module


def lazy_count(module: torch.nn.Module) -> int:
    return sum(hasattr(layer, "awaited") for layer in module.modules())


# --- the adapter -------------------------------------------------------------------------------


def test_an_adapter_of_lazy_layers_is_the_adapter(pack: Any) -> None:
    core, model = pack.infinite_id_core, tiny_model()
    wanted = tiny_adapter(pack, model).adapter
    empty = core.method.adapter.infinite_id_adapter(adapter_config(pack), wanted.widths, LazyLayers)
    assert not list(empty.parameters()) and empty.widths == wanted.widths
    found = core.files.infinite_id_format.build_adapter(
        wanted.config, wanted.state_dict(), LazyLayers
    )
    assert lazy_count(found) == len(wanted.state_dict()) - 6  # the mappers' have two weights
    assert found.widths == wanted.widths and list(found.state_dict()) == list(wanted.state_dict())
    who = tiny_identity(pack)
    tokens = wanted.tokens(who)
    torch.testing.assert_close(found.tokens(who), tokens)
    for path in wanted.widths:
        torch.testing.assert_close(found.key_value(path)(tokens), wanted.key_value(path)(tokens))


def test_a_tensor_too_few_for_lazy_layers_is_named(pack: Any) -> None:
    adapter = tiny_adapter(pack, tiny_model()).adapter
    tensors = dict(adapter.state_dict())
    del tensors["face_mapper.proj_in.bias"]
    with pytest.raises(RuntimeError, match="face_mapper.proj_in.bias"):
        pack.infinite_id_core.files.infinite_id_format.build_adapter(
            adapter.config, tensors, LazyLayers
        )


# --- the Micro Model ---------------------------------------------------------------------------


def paint(model: Any, clip: Any) -> torch.Tensor:
    encode = host_nodes.CLIPTextEncode().encode
    (out,) = host_nodes.KSampler().sample(
        model, 3, 3, 5.0, "euler", "normal", *encode(clip, "a person"), *encode(clip, ""),
        {"samples": torch.zeros(1, 4, 16, 16)},
    )  # fmt: skip
    samples: torch.Tensor = out["samples"]
    return samples


@pytest.mark.parametrize("applied", [False, True])
@torch.inference_mode()
def test_the_micro_model_of_lazy_layers_paints_the_same(
    pack: Any, micro: Any, applied: bool, request: Any
) -> None:
    node = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDMicroModel"]
    load = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDAdapterLoader"]

    def painted() -> torch.Tensor:
        model, clip, _ = node.execute().args
        (adapter,) = load.execute("microworld (embedded)").args
        wanted = [model.model.diffusion_model, clip.cond_stage_model, adapter.adapter]
        lazy.append([lazy_count(module) > 0 for module in wanted])
        if applied:
            apply = pack.infinite_id_core.hosts.comfyui.apply_identity
            model = apply(model, adapter, stranger(pack, adapter.adapter.config))
        return paint(model, clip)

    lazy: list[list[bool]] = []
    plain = painted()
    request.getfixturevalue("lazy_host")
    torch.testing.assert_close(painted(), plain, rtol=1e-4, atol=1e-4)
    assert lazy == [[False] * 3, [True] * 3]


def stranger(pack: Any, config: Any) -> Any:
    """An identity that goes with an adapter of this configuration."""
    core, generator = pack.infinite_id_core.method.face_clip, torch.Generator().manual_seed(1)
    record = core.IdentityConfig(
        recogniser=config.recogniser,
        embedding=config.embedding,
        clip_model=config.clip_model,
        clip_layer=config.clip_layer,
    )
    return core.face_clip_identity(
        face=torch.nn.functional.normalize(torch.randn(1, 512, generator=generator)),
        clip=torch.randn(1, 257, config.clip_width, generator=generator),
        weight=torch.ones(1),
        config=record,
    )


@pytest.mark.parametrize("file", ["UNET", "TEXT_ENCODERS"])
def test_weight_files_are_still_held_against_the_model(
    pack: Any, micro: Any, lazy_host: None, monkeypatch: Any, tmp_path: Any, file: str
) -> None:
    files = pack.microworld.files
    state = files.read_weights(getattr(files, file))
    linear = ("to_k.weight", "q_proj.weight")
    gone = next(name for name in sorted(state) if name.endswith(linear))
    save_file({n: t.contiguous() for n, t in state.items() if n != gone}, tmp_path / "weights")
    monkeypatch.setattr(files, file, tmp_path / "weights")
    with pytest.raises(files.MicroWeightsError, match=gone):
        (micro.load_unet if file == "UNET" else micro.load_clip)()


# --- who manages the weights -------------------------------------------------------------------


class Preferred(comfy.model_patcher.ModelPatcher):  # type: ignore[misc]
    """What a host may prefer to its plain patcher."""


def test_the_hosts_kind_of_patcher_manages_the_weights(
    pack: Any, micro: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Preferred, raising=False)
    model = micro.load_unet()
    adapter = tiny_adapter(pack, tiny_model())
    assert [type(model), type(adapter.patcher)] == [Preferred, Preferred]


def test_an_encoder_of_torchs_own_layers_is_loaded_whole(pack: Any, monkeypatch: Any) -> None:
    """Its layers cannot run on weights that stayed elsewhere, however little memory there is."""
    management = comfy.model_management
    node = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDOpenClipLoader"]
    (encoder,) = node.execute("microworld (embedded)", "none (embedded)").args
    assert type(encoder.patcher) is comfy.model_patcher.ModelPatcher
    image = torch.rand(1, 224, 224, 3)
    wanted = encoder.encode_image(image).last_hidden_state
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.LOW_VRAM)
    monkeypatch.setattr(management, "lowvram_available", True)
    monkeypatch.setattr(management, "get_free_memory", lambda *_, **__: 1000)
    try:
        found = encoder.encode_image(image).last_hidden_state
        assert encoder.patcher.loaded_size() == encoder.patcher.model_size()
        assert not encoder.model.model_lowvram
    finally:
        management.unload_all_models()
    torch.testing.assert_close(found, wanted)
