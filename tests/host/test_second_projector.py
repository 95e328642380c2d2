"""A second kind of adapter (``core/pooled_kind``) through ComfyUI, its nodes and diffusers."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.ops
import pytest
import torch

import nodes as host_nodes

from ..core.pooled_kind import WIDTH, pooled_kind
from . import tiny_sdxl
from .test_parity_hosts import GUIDANCE, SIZE_IDS, STEPS, Case, comfy_model, host, relative, unet

__all__ = ["comfy_model", "host", "unet"]  # fixtures

APPLY = {
    "strength": 1.0,
    "mixing": "mixed",
    "style": "adain_mean",
    "style_strength": 1.0,
    "merge_text": True,
    "text_stream": "own",
    "start_percent": 0.0,
    "end_percent": 1.0,
}


def node(name: str, *args: Any, **kwargs: Any) -> Any:
    return host_nodes.NODE_CLASS_MAPPINGS[name].execute(*args, **kwargs).args[0]


@pytest.fixture(scope="module")
def core(pack: Any) -> Any:
    return pack.infinite_id_core


@pytest.fixture(scope="module")
def diffusers_host(core: Any) -> Any:
    """Of the pack's own import, so that both hosts take the same objects."""
    return importlib.import_module(f"{core.__name__}.hosts.diffusers_sample")


@pytest.fixture(scope="module")
def adapters(core: Any, host: Any, comfy_model: Any) -> tuple[Any, Any]:
    """The same adapter under ComfyUI's memory management, and in torch's own layers."""
    kind = pooled_kind(core)
    widths = {layer.path: layer.width for layer in host.model_layers(comfy_model)}
    plain = kind.adapter(tiny_sdxl.CONTEXT, widths).requires_grad_(False)
    weights = tiny_sdxl.random_weights(plain.state_dict(), 9, gain=1.0)
    managed = host.LoadedAdapter(plain.rebuilt(weights, comfy.ops.manual_cast))
    return managed, plain.rebuilt(weights)


@pytest.fixture(scope="module")
def people(core: Any) -> list[Any]:
    kind, draw = pooled_kind(core), torch.Generator().manual_seed(4)
    features = core.method.features
    return [
        core.method.identity.Identity(
            features={
                "image": features.Feature(
                    reading=kind.reading,
                    value=torch.randn(references, WIDTH, generator=draw),
                    null=torch.randn(WIDTH, generator=draw),
                )
            },
            weight=torch.arange(1.0, references + 1),
            name=name,
        )
        for name, references in (("Anna", 2), ("Bea", 1))
    ]


def in_both(
    case: Case, core: Any, diffusers_host: Any, comfy_model: Any, unet: Any, adapters: Any,
    applied: list[dict[str, Any]], **stream: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The same run by the Apply node in ComfyUI, and in diffusers."""
    managed, plain = adapters
    patched = comfy_model
    for one in applied:
        patched = node("InfiniteIDApply", patched, managed, **{**APPLY, **stream, **one})
    prompts = [
        diffusers_host.Prompt(context=cond[0][0], pooled=cond[0][1]["pooled_output"])
        for cond in (case.positive, case.negative)
    ]
    found = diffusers_host.sample(
        unet,
        [diffusers_host.AppliedIdentity(adapter=plain, **one) for one in applied],
        *prompts,
        case.noise,
        latent=case.latent,
        options=core.method.attention.StreamOptions(**stream),
        size_ids=SIZE_IDS,
        sampling=diffusers_host.SamplingOptions(steps=STEPS, guidance=GUIDANCE),
    )
    return case.comfy(patched, "normal"), found


@pytest.mark.parametrize("variant", ["one", "two with masks", "part of the run", "one stream"])
def test_both_hosts_paint_the_same(
    variant: str, core: Any, diffusers_host: Any, comfy_model: Any, unet: Any, adapters: Any,
    people: Any,
) -> None:  # fmt: skip
    case, stream = Case(), {}
    applied: list[dict[str, Any]] = [{"identity": people[0]}]
    if variant == "two with masks":
        left, right = torch.zeros(1, 64, 72), torch.zeros(1, 64, 72)
        left[..., :40], right[..., 32:] = 1.0, 0.7
        applied = [{"identity": people[0], "mask": left}, {"identity": people[1], "mask": right}]
    elif variant == "part of the run":
        applied[0] |= {"strength": 1.5, "start_percent": 0.2, "end_percent": 0.7}
    elif variant == "one stream":
        stream = {"mixing": "off", "text_stream": "shared"}
    comfy_picture, picture = in_both(
        case, core, diffusers_host, comfy_model, unet, adapters, applied, **stream
    )
    assert relative(picture, comfy_picture) < 1e-4
    assert relative(case.comfy(comfy_model, "normal"), comfy_picture) > 0.002


@pytest.mark.parametrize("mode", ["stack", "interpolate"])
def test_mixed_saved_and_loaded_it_paints_the_same(
    mode: str, core: Any, diffusers_host: Any, comfy_model: Any, unet: Any, adapters: Any,
    people: Any,
) -> None:  # fmt: skip
    mixed = node("InfiniteIDMix", *people, mode, 0.3)
    assert mixed.references == {"stack": 3, "interpolate": 1}[mode]
    file = node("InfiniteIDSaveIdentity", mixed, f"{mode} of two", "overwrite")
    loaded = node("InfiniteIDLoadIdentity", file)
    assert loaded.readings == mixed.readings and loaded.name == f"{mode} of two"
    case = Case()
    by_hosts = in_both(
        case, core, diffusers_host, comfy_model, unet, adapters, [{"identity": loaded}]
    )
    of_memory = node("InfiniteIDApply", comfy_model, adapters[0], identity=mixed, **APPLY)
    of_first = node("InfiniteIDApply", comfy_model, adapters[0], identity=people[0], **APPLY)
    assert torch.equal(case.comfy(of_memory, "normal"), by_hosts[0])
    assert relative(by_hosts[1], by_hosts[0]) < 1e-4
    assert relative(case.comfy(of_first, "normal"), by_hosts[0]) > 1e-3


def test_another_gpus_copy_is_the_same_kind(host: Any, adapters: Any, people: Any) -> None:
    """What ComfyUI makes again for another GPU: modules of its own, the same weights."""
    ours = adapters[0].adapter
    again = importlib.import_module(type(adapters[0]).__module__)._copied(ours)
    assert again is not ours and again.proj is not ours.proj
    assert torch.equal(again.tokens(people[0]), ours.tokens(people[0]))
    assert again.proj.weight.data_ptr() == ours.proj.weight.data_ptr()


def test_identities_of_the_other_kind_are_refused(
    pack: Any, comfy_model: Any, adapters: Any, people: Any
) -> None:
    errors = pack.infinite_id_core.errors
    with pytest.raises(errors.IdentityMismatchError, match="image: the adapter has"):
        node("InfiniteIDApply", comfy_model, adapters[0], tiny_sdxl.tiny_identity(pack), **APPLY)
    mappers = tiny_sdxl.tiny_adapter(pack, comfy_model)
    with pytest.raises(errors.IdentityMismatchError, match="face: the adapter has.*clip: the"):
        node("InfiniteIDApply", comfy_model, mappers, people[0], **APPLY)
    with pytest.raises(errors.IdentityMismatchError, match="face"):
        node("InfiniteIDMix", tiny_sdxl.tiny_identity(pack), people[0], "stack", 0.5)


def test_raw_embeddings_fit_an_adapter_that_wants_normed(
    pack: Any, core: Any, comfy_model: Any
) -> None:
    """Normed follows from raw; the other way round it is refused, both sides named."""
    features, who = core.method.features, tiny_sdxl.tiny_identity(pack)
    face = who["face"]
    reading = features.Reading(model="tiny", output="raw", shape=(512,))
    raw = core.method.identity.Identity(
        features={**who.features, "face": features.Feature(reading=reading, value=face.value * 21)},
        weight=who.weight,
    )
    case, adapter = Case(rows=1), tiny_sdxl.tiny_adapter(pack, comfy_model)
    first, second = (
        case.comfy(node("InfiniteIDApply", comfy_model, adapter, one, **APPLY), "normal")
        for one in (who, raw)
    )
    assert relative(second, first) < 1e-5
    config = core.method.records.AdapterConfig(**{**vars(adapter.adapter.config),
                                                  "embedding": "raw"})  # fmt: skip
    host = importlib.import_module(f"{core.__name__}.hosts.comfyui")
    build = core.files.infinite_id_format.build_adapter
    wants_raw = host.LoadedAdapter(
        build(config, adapter.adapter.state_dict(), comfy.ops.manual_cast)
    )
    with pytest.raises(core.errors.IdentityMismatchError, match="'raw', the identity has 'normed'"):
        node("InfiniteIDApply", comfy_model, wants_raw, who, **APPLY)
