"""ComfyUI's dynamic VRAM, the default on NVIDIA: its own patchers, on the CPU.

Its library that pages weights into a GPU is not there, so none is resident and each call casts
what it needs. All else is the host's own: lazily made layers, loading, copies without dynamic VRAM.
"""

from __future__ import annotations

from typing import Any

import comfy.hooks
import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy_aimdo.host_buffer
import pytest
import torch

import nodes as host_nodes

from .test_lazy_layers import paint, stranger

DEVICE = torch.device("cpu", 0)  # ComfyUI takes plain patchers for torch.device("cpu")


class NoPinnedMemory:
    """An empty buffer of the host's library, which needs a GPU."""

    size = 0

    def __init__(self, *_: Any) -> None:
        pass

    def truncate(self, *_: Any, **__: Any) -> None:
        pass


class Dynamic(comfy.model_patcher.ModelPatcherDynamic):  # type: ignore[misc]
    """The host's patcher, also for the CPU."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def _vbar_get(self, create: bool = False) -> None:
        return None


@pytest.fixture(autouse=True)
def dynamic_vram(monkeypatch: Any) -> Any:
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", NoPinnedMemory)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    for name in ("get_torch_device", "text_encoder_device", "vae_device"):
        monkeypatch.setattr(comfy.model_management, name, lambda: DEVICE)
    with torch.inference_mode():
        yield
    comfy.model_management.unload_all_models()


@pytest.fixture
def micro(pack: Any, monkeypatch: Any) -> Any:
    """UNet, text encoders and VAE, built under dynamic VRAM."""
    module = pack.microworld.comfy_models
    for name in ("_unet", "_clip", "load_vae"):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    return host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDMicroModel"].execute().args


@pytest.fixture
def adapter() -> Any:
    node = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDAdapterLoader"]
    return node.execute("microworld (embedded)").args[0]


@pytest.fixture
def patched(pack: Any, micro: Any, adapter: Any) -> Any:
    person = stranger(pack, adapter.adapter.config)
    return pack.infinite_id_core.hosts.comfyui.apply_identity(micro[0], adapter, person)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def test_all_weights_are_paged(micro: Any, adapter: Any) -> None:
    model, clip, vae = micro
    patchers = [model, clip.patcher, vae.patcher, adapter.patcher]
    assert all(patcher.is_dynamic() for patcher in patchers)


def test_the_same_picture_with_and_without(micro: Any, patched: Any, monkeypatch: Any) -> None:
    model, clip, vae = micro
    plain, found = paint(model, clip), paint(patched, clip)
    assert error(found, plain) > 1e-2
    assert patched.is_dynamic()
    for static in (patched.clone(disable_dynamic=True), patched.get_non_dynamic_delegate()):
        assert not static.is_dynamic() and static.model is not model.model
        assert error(paint(static, clip), found) < 1e-5
    comfy.model_management.unload_all_models()
    assert error(paint(patched, clip), found) < 1e-5
    static = clip.clone(disable_dynamic=True)
    assert not static.patcher.is_dynamic()
    picture = vae.decode(found)
    vae.patcher, vae.first_stage_model = (p := vae.patcher.clone(disable_dynamic=True)), p.model
    assert not vae.patcher.is_dynamic() and error(vae.decode(found), picture) < 1e-5


def test_a_lora_hook_under_dynamic_vram(micro: Any, patched: Any) -> None:
    """ComfyUI runs hooks on a copy without dynamic VRAM; the copy has to carry the adapter."""
    model, clip, _ = micro
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(2)
    lora = {
        f"{name}.lora_up.weight": torch.randn(64, 4, generator=generator) * 0.3,
        f"{name}.lora_down.weight": torch.randn(4, 128, generator=generator) * 0.3,
    }
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)

    def hooked(model: Any) -> torch.Tensor:
        encode = host_nodes.CLIPTextEncode().encode
        (positive,) = encode(clip, "a person")
        positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
        empty = {"samples": torch.zeros(1, 4, 16, 16)}
        (out,) = host_nodes.KSampler().sample(
            model, 3, 3, 5.0, "euler", "normal", positive, *encode(clip, ""), empty
        )
        samples: torch.Tensor = out["samples"]
        return samples

    found = hooked(patched)
    assert found.isfinite().all()
    assert error(found, paint(patched, clip)) > 1e-4  # the LoRA acts
    assert error(found, hooked(model)) > 1e-2  # and so does the identity


def test_the_adapters_copy_without_dynamic_vram(adapter: Any) -> None:
    static = adapter.patcher.clone(disable_dynamic=True)
    assert not static.is_dynamic() and static.model is not adapter.adapter
    ours, copy = adapter.adapter.state_dict(), static.model.state_dict()
    assert ours.keys() == copy.keys() and all(torch.equal(ours[n], copy[n]) for n in ours)
