"""What the pack promises in real ComfyUI: batches, what is left behind, other packs' pieces."""

from __future__ import annotations

import copy
import gc
from typing import Any

import comfy.cldm.cldm
import comfy.context_windows
import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sample
import comfy.samplers
import comfy.sd
import node_helpers
import pytest
import torch

import nodes as host_nodes
from microworld.comfy_models import plain_layers

from .runs import SIZE, both_ways, error, run
from .tiny_sdxl import (
    UNET_CONFIG,
    conditioning,
    latent,
    random_weights,
    tiny_adapter,
    tiny_identity,
    tiny_model,
)

# --- 1. batches and calls --------------------------------------------------------------------


def test_conds_in_separate_calls(patched: Any, monkeypatch: Any) -> None:
    together = run(patched)
    calls = []
    unet = patched.model.diffusion_model
    monkeypatch.setattr(patched.model, "memory_required", lambda *a, **k: 1e30)
    handle = unet.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[0]))
    apart = run(patched)
    handle.remove()
    assert set(calls) == {4} and len(calls) == 6  # one cond a call, both streams in each
    assert error(apart, together) < 1e-5


class UncondFirst(comfy.samplers.CFGGuider):
    """A guider that hands the negative over first, as DualCFG does."""

    def predict_noise(self, x: Any, timestep: Any, model_options: Any, seed: Any = None) -> Any:
        conds = [self.conds["negative"], self.conds["positive"]]
        negative, positive = comfy.samplers.calc_cond_batch(
            self.inner_model, conds, x, timestep, model_options
        )
        return negative + (positive - negative) * self.cfg


def test_uncond_first(patched: Any) -> None:
    def guided(guider_class: Any) -> torch.Tensor:
        guider = guider_class(patched)
        guider.set_conds(conditioning(1), conditioning(2))
        guider.set_cfg(4.0)
        noise = latent(2, SIZE)
        sigmas = comfy.samplers.calculate_sigmas(patched.model.model_sampling, "normal", 3)
        with torch.inference_mode():
            return guider.sample(
                noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas
            )

    assert error(guided(UncondFirst), guided(comfy.samplers.CFGGuider)) < 1e-5


@pytest.mark.parametrize("text_stream", ["own", "shared"])
def test_batches_are_rows(
    pack: Any, host: Any, model: Any, adapter: Any, identity: Any, text_stream: str
) -> None:
    options = pack.infinite_id_core.method.attention.StreamOptions(text_stream=text_stream)
    patched = host.apply_identity(model, adapter, identity, options=options)
    noise = latent(5, SIZE)
    whole = run(patched, noise=noise)
    for rows in (1, 2):
        parts = [run(patched, noise=part) for part in noise.split(rows)]
        assert error(torch.cat(parts), whole) < 1e-5


def test_conditioning_of_another_batch_size(silent: Any, model: Any) -> None:
    """Rows of conditioning that do not divide the batch land on the same rows as without us."""
    for rows in (1, 3):
        positive = conditioning(4, rows=2)
        plain = run(model, rows=rows, positive=positive)
        for stream in ("own", "shared"):
            found = run(silent(model, stream), rows=rows, positive=positive)
            assert error(found, plain) < 1e-5


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler_keeps_its_picture(silent: Any, model: Any, sampler: str) -> None:
    """Random draws, previews and adaptive steps are those of an unpatched run."""
    plain = run(model, sampler, rows=2, cfg=1.5)
    assert error(run(silent(model), sampler, rows=2, cfg=1.5), plain) < 1e-4


def test_previews_and_result_show_only_the_identity(patched: Any) -> None:
    seen = []
    result = run(patched, callback=lambda i, x0, x, n: seen.append((x0.clone(), x.shape)))
    assert [shape for _, shape in seen] == [(2, 4, SIZE, SIZE)] * 3
    assert result.shape == (2, 4, SIZE, SIZE)
    last = seen[-1][0] / 0.13025
    assert error(last, result) < 1e-5  # Euler's last step lands on the denoised latent


# --- 2. nothing left behind ------------------------------------------------------------------


def test_strength_zero_is_the_unpatched_model(
    host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    zero = host.apply_identity(model, adapter, identity, strength=0.0)
    assert torch.equal(run(zero, "euler_ancestral"), run(model, "euler_ancestral"))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.model.state_dict().items()}


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "exception",
    [Stop, comfy.model_management.InterruptProcessingException],
    ids=lambda e: e.__name__,
)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_sde"])
def test_exception_mid_run(model: Any, patched: Any, exception: Any, sampler: str) -> None:
    before, options = run(model, sampler), copy.deepcopy(model.model_options)
    stored = weights(model)
    raised = exception("here")

    def stop(step: int, *_: Any) -> None:
        if step == 1:
            raise raised

    with pytest.raises(exception) as caught:
        run(patched, sampler, callback=stop)
    assert caught.value is raised
    assert torch.equal(run(model, sampler), before)
    assert model.model_options == options
    assert all(torch.equal(v, stored[k]) for k, v in model.model.state_dict().items())


def test_exception_inside_the_model(model: Any, patched: Any, monkeypatch: Any) -> None:
    before = run(model, "euler_ancestral")
    noise = torch.randn(3)
    with monkeypatch.context() as patch:
        patch.setattr(patched.model.diffusion_model.out[0], "forward", lambda x: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(patched, "euler_ancestral")
    assert (
        torch.overrides._len_torch_function_stack() == 0
        if hasattr(torch.overrides, "_len_torch_function_stack")
        else True
    )
    assert noise.shape == (3,)
    assert torch.equal(run(model, "euler_ancestral"), before)


def test_upstream_and_branches_are_untouched(
    host: Any, model: Any, adapter: Any, identity: Any, pack: Any
) -> None:
    options = copy.deepcopy(model.model_options)
    one = host.apply_identity(model, adapter, identity)
    alone = run(one)
    two = host.apply_identity(one, adapter, tiny_identity(pack, seed=8))
    both = run(two)
    assert len(host.streams_of(two).applied) == 2
    assert len(host.streams_of(one).applied) == 1 and host.streams_of(model) is None
    assert model.model_options == options and not model.wrappers and not model.additional_models
    assert torch.equal(run(one), alone)
    assert error(both, alone) > 1e-3


def storage_bytes() -> int:
    gc.collect()
    seen = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def test_twenty_clones(host: Any, model: Any, adapter: Any, pack: Any) -> None:
    patched = host.apply_identity(
        model, adapter, tiny_identity(pack, references=4), mask=torch.ones(1, 64, 64)
    )
    run(patched)
    before = storage_bytes()
    clones = [patched]
    for _ in range(20):
        clones.append(clones[-1].clone())
    run(clones[-1])
    assert storage_bytes() < before * 1.01


def test_runs_leave_no_cache(host: Any, patched: Any) -> None:
    run(patched)
    before = storage_bytes()
    for _ in range(3):
        run(patched)
    assert storage_bytes() <= before
    assert not [o for o in gc.get_objects() if type(o) is host.SamplingRun]


def test_identity_is_projected_once_per_run(adapter: Any, patched: Any) -> None:
    calls = []
    path = next(iter(adapter.adapter.widths))
    hooks = [
        module.register_forward_hook(lambda m, args, out: calls.append(args[0].shape))
        for module in (adapter.adapter.key_value(path).to_k, adapter.adapter.face_mapper)
    ]
    run(patched, steps=4)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 4  # person and null identity, K and mapper; not once per step


def test_text_rows_run_only_while_they_are_needed(
    host: Any, model: Any, adapter: Any, identity: Any
) -> None:
    patched = host.apply_identity(model, adapter, identity, start_percent=0.3, end_percent=0.6)
    rows: list[int] = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda m, args: rows.append(args[0].shape[0])
    )
    found = run(patched, rows=1, steps=8)
    handle.remove()
    assert rows[0] == 2 and rows[-1] == 2 and 4 in rows  # pos + neg, one stream; two; one
    assert rows == sorted(rows[: rows.index(4)]) + [4] * rows.count(4) + [2] * rows[::-1].index(4)
    assert error(found, run(model, rows=1, steps=8)) > 1e-4


# --- 3. other pieces of a graph --------------------------------------------------------------


@pytest.mark.parametrize(("rows", "hints"), [(2, 2), (2, 3), (3, 2), (1, 3), (2, 1)])
def test_controlnet(silent: Any, patched: Any, model: Any, rows: int, hints: int) -> None:
    """Each picture of the batch gets the hint it gets without us, however many there are."""
    config = {
        k: v
        for k, v in UNET_CONFIG.items()
        if k not in ("out_channels", "transformer_depth_output")
    }
    made = {"hint_channels": 3, **config}
    twin = comfy.cldm.cldm.ControlNet(**made, device="meta", operations=plain_layers())
    net = comfy.cldm.cldm.ControlNet(**made, operations=comfy.ops.disable_weight_init)
    net.load_state_dict(random_weights(twin.state_dict(), 21))
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    apply = host_nodes.ControlNetApplyAdvanced().apply_controlnet
    hint = torch.rand(hints, SIZE * 8, SIZE * 8, 3, generator=torch.Generator().manual_seed(1))
    hint *= 1000.0 * torch.arange(1.0, hints + 1)[:, None, None, None]  # hints that differ

    def under(hint: Any) -> dict[str, Any]:
        positive, negative = apply(conditioning(1), conditioning(2), control, hint, 1.0, 0.0, 1.0)
        return {"positive": positive, "negative": negative, "rows": rows}

    both_ways(silent, patched, model, **under(hint))
    assert error(run(model, **under(hint)), run(model, rows=rows)) > 1e-3
    if hints > 1:
        assert error(run(model, **under(hint)), run(model, **under(hint.flip(0)))) > 1e-3


@pytest.mark.parametrize("mask_rows", [1, 2, 3])
def test_inpaint_mask(silent: Any, patched: Any, model: Any, mask_rows: int) -> None:
    mask = torch.zeros(mask_rows, 1, SIZE, SIZE)
    mask[:, :, :, : SIZE // 2] = 1
    picture = latent(3, SIZE, seed=6)
    kwargs = {"noise_mask": mask, "latent_image": picture, "rows": 3}
    both_ways(silent, patched, model, **kwargs)
    kept = run(patched, **kwargs)[..., SIZE // 2 :]
    assert error(kept, picture[..., SIZE // 2 :]) < 1e-4


def area_conds() -> Any:
    left = node_helpers.conditioning_set_values(
        conditioning(1), {"area": (SIZE, SIZE // 2, 0, 0), "strength": 1.0}
    )
    right = node_helpers.conditioning_set_values(
        conditioning(3), {"area": (SIZE, SIZE // 2, 0, SIZE // 2), "strength": 1.0}
    )
    return left + right


def test_area_conds(silent: Any, patched: Any, model: Any) -> None:
    both_ways(silent, patched, model, positive=area_conds())


def test_masked_conds(silent: Any, patched: Any, model: Any) -> None:
    mask = torch.zeros(2, SIZE * 8, SIZE * 8)
    mask[0, : SIZE * 4], mask[1, SIZE * 4 :] = 1, 1
    masked = node_helpers.conditioning_set_values(conditioning(3), {"mask": mask})
    both_ways(silent, patched, model, positive=conditioning(1) + masked)


def test_lora(host: Any, model: Any, adapter: Any, identity: Any) -> None:
    """LoRA under the identity equals the identity on a model with those weights baked in."""
    generator = torch.Generator().manual_seed(2)
    name = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    up, down = torch.randn(64, 4, generator=generator), torch.randn(4, 48, generator=generator)
    lora = {
        f"lora_unet_{name.replace('.', '_')}.lora_up.weight": up * 0.2,
        f"lora_unet_{name.replace('.', '_')}.lora_down.weight": down * 0.2,
    }
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    baked = tiny_model()
    weight = baked.model.diffusion_model.get_submodule(name).weight
    with torch.no_grad():
        weight += (up * 0.2) @ (down * 0.2)
    first = host.apply_identity(with_lora, adapter, identity)
    wanted = run(host.apply_identity(baked, adapter, identity))
    assert error(run(first), wanted) < 1e-5
    patched = host.apply_identity(model, adapter, identity)
    second, _ = comfy.sd.load_lora_for_models(patched, None, lora, 1.0, 0.0)
    assert error(run(second), wanted) < 1e-5
    assert error(run(patched), wanted) > 1e-5


def test_lora_hook_on_one_cond(silent: Any, patched: Any, model: Any) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    generator = torch.Generator().manual_seed(2)
    lora = {
        f"{name}.lora_up.weight": torch.randn(64, 4, generator=generator) * 0.3,
        f"{name}.lora_down.weight": torch.randn(4, 48, generator=generator) * 0.3,
    }
    hooks = comfy.hooks.create_hook_lora(lora=lora, strength_model=1.0, strength_clip=0.0)
    positive = comfy.hooks.set_hooks_for_conditioning(conditioning(1), hooks)
    both_ways(silent, patched, model, positive=positive)


def test_fp8_weights(silent: Any, host: Any, pack: Any, identity: Any) -> None:
    model = tiny_model(dtype=torch.float8_e4m3fn, cast_to=torch.float32)
    assert model.model.diffusion_model.out[2].weight.dtype == torch.float8_e4m3fn
    loud = host.apply_identity(model, tiny_adapter(pack, model), identity)
    both_ways(silent, loud, model)


def test_half_precision_adapter(host: Any, pack: Any, model: Any, identity: Any) -> None:
    full, half = tiny_adapter(pack, model), tiny_adapter(pack, model)
    half.adapter.half()
    wanted = run(host.apply_identity(model, full, identity))
    assert error(run(host.apply_identity(model, half, identity)), wanted) < 1e-3


def test_lowvram(patched: Any, model: Any, adapter: Any, monkeypatch: Any) -> None:
    """Weights stay where they are and are cast layer by layer, the adapter's too."""
    management = comfy.model_management
    wanted = run(patched)
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    try:
        found = run(patched)
        assert model.model.model_lowvram
        assert adapter.adapter.model_lowvram
    finally:
        management.unload_all_models()
    assert error(found, wanted) < 1e-5  # copies lie at other addresses


def test_adapter_is_loaded_by_the_host(patched: Any, adapter: Any) -> None:
    comfy.model_management.unload_all_models()
    run(patched)
    assert any(m.model is adapter.adapter for m in comfy.model_management.loaded_models())


# --- other packs' attention patches ----------------------------------------------------------


def louder_text(q: Any, k: Any, v: Any, extra: Any) -> Any:
    """Stands for another pack's image prompt: attention plus a term of its own."""
    out = comfy.ldm.modules.attention.optimized_attention(q, k, v, extra["n_heads"])
    return out + 0.5 * q


@pytest.mark.parametrize("with_index", [True, False])
def test_other_packs_cross_attention_composes(
    silent: Any, host: Any, model: Any, adapter: Any, identity: Any, with_index: bool
) -> None:
    index = (0,) if with_index else ()
    theirs = model.clone()
    theirs.set_model_attn2_replace(louder_text, "input", 4, *index)
    plain = run(theirs)
    for stream in ("own", "shared"):
        assert error(run(silent(theirs, stream)), plain) < 1e-5
    before = host.apply_identity(theirs, adapter, identity)
    after = host.apply_identity(model, adapter, identity)
    after.set_model_attn2_replace(louder_text, "input", 4, *index)
    assert error(run(before), run(after)) < 1e-5
    assert error(run(before), run(host.apply_identity(model, adapter, identity))) > 1e-3
    assert error(run(before), plain) > 1e-3


def test_conflict_is_named(errors: Any, model: Any, patched: Any) -> None:
    before = run(model)
    bad = patched.clone()
    bad.set_model_attn2_replace(lambda q, k, v, extra: q[:1], "middle", 0, 1)
    with pytest.raises(errors.PatchConflictError, match="test_promises.*mid_block"):
        run(bad)
    assert torch.equal(run(model), before)


def test_perturbed_attention_guidance(silent: Any, patched: Any, model: Any, caplog: Any) -> None:
    """A self-attention replacement that is no attention at all, put there between our calls."""
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    def guided(model: Any) -> Any:
        return PerturbedAttentionGuidance.execute(model, 2.0).result[0]

    both_ways(silent, guided(patched), guided(model))
    assert error(run(guided(model)), run(model)) > 1e-3
    assert "replaces self-attention" in caplog.text


def test_context_windows_over_the_batch(silent: Any, patched: Any, model: Any) -> None:
    windows = comfy.context_windows
    handler = windows.IndexListContextHandler(
        context_schedule=windows.get_matching_context_schedule("standard_static"),
        fuse_method=windows.get_matching_fuse_method("pyramid"),
        context_length=2,
        context_overlap=1,
    )

    # The host compares all timesteps with all sigmas, so the batch must have as many rows.
    def windowed(model: Any) -> Any:
        clone = model.clone()
        clone.model_options["context_handler"] = handler
        return clone

    both_ways(silent, windowed(patched), windowed(model), rows=4, steps=3)


# --- several people --------------------------------------------------------------------------


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    left = torch.zeros(1, SIZE * 8, SIZE * 8)
    left[..., : SIZE * 4] = 1
    return left, 1 - left


def test_complementary_masks_add_up(host: Any, model: Any, adapter: Any, identity: Any) -> None:
    left, right = halves()
    one = host.apply_identity(model, adapter, identity, mask=left)
    both = host.apply_identity(one, adapter, identity, mask=right)
    assert error(run(both), run(host.apply_identity(model, adapter, identity))) < 1e-5


def test_masks_in_area_conds(host: Any, model: Any, adapter: Any, identity: Any, pack: Any) -> None:
    """In a cond's area a mask is cut with it: complements add up, swapped masks differ."""
    left, right = halves()
    other = tiny_identity(pack, seed=8)

    def two(a: Any, b: Any, first: Any, second: Any) -> torch.Tensor:
        one = host.apply_identity(model, adapter, a, mask=first)
        return run(host.apply_identity(one, adapter, b, mask=second), positive=area_conds())

    whole = run(host.apply_identity(model, adapter, identity), positive=area_conds())
    assert error(two(identity, identity, left, right), whole) < 1e-5
    assert error(two(identity, other, left, right), two(identity, other, right, left)) > 1e-3


def test_mask_per_batch_row(host: Any, model: Any, adapter: Any, identity: Any) -> None:
    masks = torch.cat(halves())
    noise = latent(2, SIZE)
    together = run(host.apply_identity(model, adapter, identity, mask=masks), noise=noise)
    for i in range(2):
        alone = host.apply_identity(model, adapter, identity, mask=masks[i : i + 1])
        assert error(run(alone, noise=noise[i : i + 1]), together[i : i + 1]) < 1e-5


def test_reference_weight_counts_copies(host: Any, model: Any, adapter: Any, pack: Any) -> None:
    core = pack.infinite_id_core.method.identity
    a, b = tiny_identity(pack, 3), tiny_identity(pack, 8)
    weighted = run(host.apply_identity(model, adapter, core.stack([a, b], [2.0, 1.0])))
    copies = run(host.apply_identity(model, adapter, core.stack([a, a, b])))
    even = run(host.apply_identity(model, adapter, core.stack([a, b])))
    assert error(weighted, copies) < 1e-5
    assert error(weighted, even) > 1e-4


def test_streams_must_agree(
    errors: Any, host: Any, pack: Any, patched: Any, adapter: Any, identity: Any
) -> None:
    options = pack.infinite_id_core.method.attention.StreamOptions(mixing="off")
    with pytest.raises(errors.StreamConflictError, match="mixing"):
        host.apply_identity(patched, adapter, identity, options=options)


def test_misfits_are_named(
    errors: Any, host: Any, pack: Any, model: Any, adapter: Any, identity: Any
) -> None:
    shallow = tiny_model(transformer_depth_middle=1)
    with pytest.raises(errors.ModelMismatchError, match="mid_block"):
        host.apply_identity(shallow, adapter, identity)
    core = pack.infinite_id_core.method.face_clip
    stranger = core.face_clip_identity(
        face=identity["face"].value,
        clip=identity["clip"].value,
        weight=identity.weight,
        config=core.IdentityConfig(recogniser="antelopev2/glintr100", clip_model="tiny"),
    )
    with pytest.raises(errors.IdentityMismatchError, match="antelopev2.*|tiny"):
        host.apply_identity(model, adapter, stranger)
    assert not model.wrappers
