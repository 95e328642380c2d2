"""With ``mixing`` off nobody reads the text stream: the UNet sees no row of it, in either host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from infinite_id_core.hosts import diffusers_sample
from infinite_id_core.method.attention import StreamOptions

from .runs import error, run
from .test_parity_hosts import STEPS, Case, both, comfy_model, host, unet
from .tiny_sdxl import tiny_adapter, tiny_identity

__all__ = ["comfy_model", "host", "unet"]  # fixtures
ROWS = 2


@contextmanager
def rows_seen(module: torch.nn.Module) -> Iterator[list[int]]:
    """Rows of each call of a UNet."""
    seen: list[int] = []

    def note(_module: Any, positional: Any, named: Any) -> None:
        seen.append((positional[0] if positional else named["x"]).shape[0])

    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def options(pack: Any, **chosen: Any) -> Any:
    return pack.infinite_id_core.method.attention.StreamOptions(**chosen)


@pytest.mark.parametrize("stream", ["own", "shared"])
def test_comfyui_gives_the_unet_no_text_rows(
    pack: Any, host: Any, comfy_model: Any, stream: str
) -> None:
    adapter, person = tiny_adapter(pack, comfy_model), tiny_identity(pack)
    counted = {}
    for mixing in ("off", "mixed"):
        chosen = options(pack, mixing=mixing, text_stream=stream)
        patched = host.apply_identity(comfy_model, adapter, person, options=chosen)
        with rows_seen(patched.model.diffusion_model) as seen:
            run(patched, rows=ROWS)
        counted[mixing] = sum(seen)
    with rows_seen(comfy_model.model.diffusion_model) as seen:
        plain = run(comfy_model, rows=ROWS)
    assert counted["off"] == sum(seen) > 0
    assert counted["mixed"] == 2 * sum(seen)
    chosen = options(pack, mixing="off", text_stream=stream)
    shown = run(host.apply_identity(comfy_model, adapter, person, options=chosen), rows=ROWS)
    assert error(shown, plain) > 1e-3


@pytest.mark.parametrize("stream", ["own", "shared"])
def test_diffusers_gives_the_unet_no_text_rows(
    pack: Any, host: Any, comfy_model: Any, unet: Any, stream: str
) -> None:
    _, ours, _, (person,) = both(pack, host, comfy_model)
    case = Case(rows=ROWS)
    counted = []
    for mixing in ("off", "mixed"):
        placed = [diffusers_sample.AppliedIdentity(adapter=ours, identity=person)]
        chosen = StreamOptions(mixing=mixing, text_stream=stream)  # type: ignore[arg-type]
        with rows_seen(unet) as seen:
            case.diffusers(unet, placed, chosen, "normal")
        counted.append(sum(seen))
    assert counted == [STEPS * 2 * ROWS, STEPS * 4 * ROWS]


def test_both_text_streams_are_the_same_run(pack: Any, host: Any, comfy_model: Any) -> None:
    """Where it is not read, it does not matter where it would come from."""
    adapter, person = tiny_adapter(pack, comfy_model), tiny_identity(pack)
    own, shared = (
        run(
            host.apply_identity(
                comfy_model, adapter, person, options=options(pack, mixing="off", text_stream=s)
            ),
            "euler_ancestral",
        )
        for s in ("own", "shared")
    )
    assert torch.equal(own, shared)


def test_other_packs_functions_are_called_once_a_step(
    pack: Any, host: Any, comfy_model: Any
) -> None:
    adapter, person = tiny_adapter(pack, comfy_model), tiny_identity(pack)
    calls: list[int] = []

    def note(arguments: Any) -> torch.Tensor:
        calls.append(arguments["denoised"].shape[0])
        denoised: torch.Tensor = arguments["denoised"]
        return denoised

    model = comfy_model.clone()
    model.set_model_sampler_post_cfg_function(note)
    run(host.apply_identity(model, adapter, person, options=options(pack, mixing="off")), steps=3)
    assert calls == [2, 2, 2]


def test_self_attention_of_other_packs_stays_their_own(
    pack: Any, host: Any, comfy_model: Any
) -> None:
    """It is not patched at all, so that whatever replaces it gets the rows it would get."""
    adapter, person = tiny_adapter(pack, comfy_model), tiny_identity(pack)
    seen: list[int] = []
    layers = host.model_layers(comfy_model)

    def values(q: Any, k: Any, v: torch.Tensor, extra: Any) -> torch.Tensor:
        seen.append(v.shape[0])
        return v

    model = comfy_model.clone()
    model.set_model_patch_replace(values, "attn1", *layers[0].block)
    run(host.apply_identity(model, adapter, person, options=options(pack, mixing="off")), steps=2)
    assert seen and set(seen) == {4}


def test_outside_its_range_a_step_is_the_plain_models(
    pack: Any, host: Any, comfy_model: Any
) -> None:
    adapter, person = tiny_adapter(pack, comfy_model), tiny_identity(pack)
    late = host.apply_identity(
        comfy_model, adapter, person, options=options(pack, mixing="off"), start_percent=1.0
    )
    assert error(run(late), run(comfy_model)) < 1e-6
