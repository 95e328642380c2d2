"""Several GPUs: ComfyUI's own Split, and a device chosen for the model, before Apply and after.

The second GPU here is the CPU under another name: the host makes models, patchers and threads for
it as for any other device, and every tensor can go there.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_multigpu

import nodes as host_nodes

from .tiny_sdxl import conditioning, latent, tiny_adapter, tiny_identity, tiny_model

FIRST, SECOND = torch.device("cpu"), torch.device("cpu", 1)


@pytest.fixture(scope="module")
def host(pack: Any) -> Any:
    return pack.infinite_id_core.hosts.comfyui


@pytest.fixture(scope="module")
def identity(pack: Any) -> Any:
    return tiny_identity(pack)


@pytest.fixture(autouse=True)
def two_devices(monkeypatch: Any) -> Any:
    monkeypatch.setattr(
        comfy.model_management,
        "get_all_torch_devices",
        lambda exclude_current=False: [FIRST, SECOND],
    )
    yield
    comfy.model_management.unload_all_models()


@pytest.fixture
def model() -> Any:
    """As a loader of the host leaves it: with the way to make it again."""
    made = tiny_model()
    made.cached_patcher_init = (tiny_model, ())
    return made


@pytest.fixture
def adapter(pack: Any, model: Any) -> Any:
    return tiny_adapter(pack, model)


def split(model: Any) -> Any:
    return nodes_multigpu.MultiGPUCFGSplitNode.execute(model, 2).args[0]


def select(model: Any) -> Any:
    """As Select Model, CLIP or VAE Device do for a GPU; these nodes take any CPU for the first."""
    return model.clone().deepclone_multigpu(new_load_device=SECOND)


def copies(model: Any) -> Any:
    """The copies of a model on other devices."""
    return model.get_additional_models_with_key("multigpu")


def run(model: Any, rows: int = 2, cfg: float = 4.0) -> torch.Tensor:
    noise = latent(rows, 8)
    with torch.inference_mode():
        out: torch.Tensor = comfy.sample.sample(
            model, noise, 3, cfg, "euler", "normal", conditioning(1), conditioning(2),
            torch.zeros_like(noise), seed=11, disable_pbar=True,
        )  # fmt: skip
    return out


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def with_a_spy(model: Any) -> tuple[Any, set[Any]]:
    """A clone of the model that notes on which device, and in which thread, attention runs."""
    seen: set[Any] = set()

    def look(out: torch.Tensor, extra: Any) -> torch.Tensor:
        seen.add((extra.get("multigpu_thread_device"), threading.get_ident()))
        return out

    watched = model.clone()
    watched.set_model_attn2_output_patch(look)
    return watched, seen


@pytest.mark.parametrize("text_stream", ["own", "shared"])
@pytest.mark.parametrize("order", ["split, apply", "apply, split", "apply, split, apply"])
def test_split_on_either_side_of_apply(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any, order: str, text_stream: str
) -> None:
    options = pack.infinite_id_core.method.attention.StreamOptions(text_stream=text_stream)
    people = [tiny_identity(pack, seed) for seed in (3, 4)]
    one, several = model, model
    for step in order.split(", "):
        if step == "split":
            several = split(several)
            continue
        person = people.pop()
        one = host.apply_identity(one, adapter, person, options=options)
        several = host.apply_identity(several, adapter, person, options=options)
    wanted = run(one)
    watched, seen = with_a_spy(several)
    found = run(watched)
    assert {device for device, _ in seen} == {FIRST, SECOND}
    assert len({thread for _, thread in seen}) == 2
    assert error(found, wanted) < 1e-4
    assert error(wanted, run(model)) > 1e-3
    assert error(run(watched), wanted) < 1e-4  # again, with the copies of the first run


@pytest.mark.parametrize("before", [True, False])
def test_each_device_runs_its_own_module_once_a_run(
    host: Any, model: Any, adapter: Any, identity: Any, before: bool
) -> None:
    """Modules are not shared between threads, nor is what they computed."""
    if before:
        several = host.apply_identity(split(model), adapter, identity)
        several.match_multigpu_clones()
    else:
        several = split(host.apply_identity(model, adapter, identity))
    (clone,) = copies(several)
    path = next(iter(adapter.adapter.widths))
    runs: list[tuple[str, int]] = []
    hooks = [
        module.key_value(path).register_forward_hook(
            lambda *_, name=name: runs.append((name, threading.get_ident()))
        )
        for name, module in (("first", adapter.adapter), ("second", adapter.carried_by(clone)))
    ]
    run(several)
    for hook in hooks:
        hook.remove()
    assert sorted(name for name, _ in runs) == ["first", "second"]
    assert len({thread for _, thread in runs}) == 2


@pytest.mark.parametrize("before", [True, False])
def test_each_device_has_a_module_of_its_own_over_the_same_weights(
    host: Any, model: Any, adapter: Any, identity: Any, before: bool
) -> None:
    if before:
        several = host.apply_identity(split(model), adapter, identity)
        several.match_multigpu_clones()  # what ComfyUI does when sampling begins
    else:
        several = split(host.apply_identity(model, adapter, identity))
    (clone,) = copies(several)
    assert adapter.carried_by(several) is adapter.adapter
    other = adapter.carried_by(clone)
    assert other is not None and other is not adapter.adapter
    assert other.widths == adapter.adapter.widths
    (patcher,) = clone.get_additional_models_with_key(host.KEY)
    assert patcher.load_device == SECOND
    ours, theirs = adapter.adapter.state_dict(), other.state_dict()
    assert {n: t.data_ptr() for n, t in ours.items()} == {
        n: t.data_ptr() for n, t in theirs.items()
    }
    assert adapter.carried_by(model) is None


def test_a_patch_runs_the_module_of_its_device(
    host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    several = split(host.apply_identity(model, adapter, identity))
    (clone,) = copies(several)
    guider = comfy.samplers.CFGGuider(several)
    assert adapter.in_call(guider, {}) is adapter.adapter  # one GPU
    guider.model_options["multigpu_clones"] = {FIRST: several, SECOND: clone}
    found = [adapter.in_call(guider, call(device)) for device in (FIRST, SECOND)]
    assert found == [adapter.adapter, adapter.carried_by(clone)]


def call(device: torch.device) -> dict[str, Any]:
    """What tells a patch on which of several GPUs it runs."""
    return {"multigpu_thread_device": device}


def test_a_copy_without_the_adapter_is_named(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    several = split(host.apply_identity(model, adapter, identity))
    (clone,) = copies(several)
    clone.remove_additional_models(host.KEY)
    guider = comfy.samplers.CFGGuider(several)
    guider.model_options["multigpu_clones"] = {FIRST: several, SECOND: clone}
    with pytest.raises(
        pack.infinite_id_core.errors.AdapterNotCarriedError, match="cpu:1.*MultiGPU CFG Split"
    ):
        adapter.in_call(guider, call(SECOND))


def test_two_adapters_are_both_carried(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    other = tiny_adapter(pack, model, seed=10)
    several = host.apply_identity(
        split(host.apply_identity(model, adapter, identity)), other, identity
    )
    several.match_multigpu_clones()
    (clone,) = copies(several)
    for loaded in (adapter, other):
        module = loaded.carried_by(clone)
        assert module is not None
        weight = "clip_mapper.proj_in.weight"
        assert torch.equal(module.state_dict()[weight], loaded.adapter.state_dict()[weight])


def test_a_file_replaced_since_does_not_reach_the_second_device(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any, tmp_path: Any
) -> None:
    write, path = (
        pack.infinite_id_core.files.infinite_id_format.write_adapter,
        tmp_path / "adapter.safetensors",
    )
    write(path, adapter.adapter)
    loaded = pack.infinite_id_core.hosts.comfyui_adapter.load_adapter(path)
    write(path, tiny_adapter(pack, model, seed=10).adapter)
    (clone,) = copies(split(host.apply_identity(model, loaded, identity)))
    weight = "clip_mapper.proj_in.weight"
    found = loaded.carried_by(clone).state_dict()[weight]
    assert torch.equal(found, adapter.adapter.state_dict()[weight])


@pytest.mark.parametrize("before", [True, False])
def test_a_selected_device_has_the_adapter_as_well(
    host: Any, model: Any, adapter: Any, identity: Any, before: bool
) -> None:
    if before:
        there = host.apply_identity(select(model), adapter, identity)
    else:
        there = select(host.apply_identity(model, adapter, identity))
    (patcher,) = there.get_additional_models_with_key(host.KEY)
    assert there.load_device == patcher.load_device == SECOND
    assert adapter.carried_by(there) is patcher.model is not adapter.adapter
    assert error(run(there), run(host.apply_identity(model, adapter, identity))) < 1e-4


def test_applying_again_makes_no_further_copy(
    host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    there = select(model)
    first, again = (host.apply_identity(there, adapter, identity) for _ in range(2))
    assert adapter.carried_by(first) is adapter.carried_by(again)
    both = host.apply_identity(first, adapter, identity)
    assert len(both.get_additional_models_with_key(host.KEY)) == 1


def test_copies_go_with_the_models_that_carried_them(
    host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    several = split(model)
    alive = []
    for _ in range(2):
        patched = host.apply_identity(several, adapter, identity)
        run(patched)
        (clone,) = copies(patched)
        alive.append(weakref.ref(adapter.carried_by(clone)))
    del patched, clone
    comfy.model_management.unload_all_models()
    gc.collect()
    assert [module() for module in alive] == [None, None]


def test_an_exception_on_the_second_device_is_kept(
    host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    patched = host.apply_identity(split(model), adapter, identity)
    wanted, broken = run(patched), patched.clone()

    def fail(out: torch.Tensor, extra: Any) -> torch.Tensor:
        if extra.get("multigpu_thread_device") == SECOND:
            raise ZeroDivisionError("of the second device")
        return out

    broken.set_model_attn2_output_patch(fail)
    with pytest.raises(ZeroDivisionError, match="of the second device"):
        run(broken)
    assert error(run(patched), wanted) < 1e-6


# --- the Micro Model ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def micro(pack: Any) -> Any:
    with torch.inference_mode():
        return host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDMicroModel"].execute().args


def paint(model: Any, clip: Any) -> torch.Tensor:
    with torch.inference_mode():
        encode = host_nodes.CLIPTextEncode().encode
        empty = {"samples": torch.zeros(1, 4, 16, 16)}
        (out,) = host_nodes.KSampler().sample(
            model, 3, 3, 5.0, "euler", "normal", *encode(clip, "a person"), *encode(clip, ""), empty
        )
        samples: torch.Tensor = out["samples"]
        return samples


def test_the_micro_model_runs_on_several_devices(micro: Any) -> None:
    model, clip, _ = micro
    wanted = paint(model, clip)
    watched, seen = with_a_spy(split(model))
    assert error(paint(watched, clip), wanted) < 1e-4
    assert {device for device, _ in seen} == {FIRST, SECOND}
    there = select(model)
    assert there.load_device == SECOND and there.model is not model.model
    assert error(paint(there, clip), wanted) < 1e-4
    again = host_nodes.NODE_CLASS_MAPPINGS["InfiniteIDMicroModel"].execute().args[0]
    assert again.model is model.model  # still one set of weights


def test_the_micro_models_encoders_go_to_another_device(micro: Any) -> None:
    _, clip, vae = micro
    there = clip.clone()
    there.patcher = select(clip.patcher)
    there.cond_stage_model = there.patcher.model
    assert there.patcher.load_device == SECOND and clip.patcher.load_device == FIRST
    with torch.inference_mode():
        found, wanted = (
            host_nodes.CLIPTextEncode().encode(c, "a person")[0] for c in (there, clip)
        )
        assert error(found[0][0], wanted[0][0]) < 1e-5
        moved = copy.copy(vae)
        moved.patcher = select(vae.patcher)
        moved.first_stage_model, moved.device = moved.patcher.model, SECOND
        assert moved.first_stage_model is not vae.first_stage_model
        picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
        assert error(moved.encode(picture), vae.encode(picture)) < 1e-5
