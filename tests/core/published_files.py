"""Made files of the published families: their true names, at true or at scaled sizes.

Names and shapes are written down here from the published files' own, without the code under test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A cross-attention layer by its number in published files."""

    number: int
    path: str
    width: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The UNet's, and the projectors'."""

    layers: tuple[Layer, ...]
    context: int
    width: int
    """Of the plus family's latent tokens; the face perceiver's is the context's."""
    heads: int
    face_heads: int
    tokens: int
    """Of resamplers."""
    face_hidden: int
    rank: int
    states: int = 1280
    """Width of the image encoder's hidden states."""
    pulid: int = 1024
    former_heads: int = 16
    former_tokens: int = 32
    eva: int = 768
    level: int = 1024


def _true_layers() -> tuple[Layer, ...]:
    """From the header of the published ViT-H file: 70 odd numbers, in order down, up, mid."""
    named = [
        ("down_blocks.1.attentions.0", range(1, 5, 2), 640),
        ("down_blocks.1.attentions.1", range(5, 9, 2), 640),
        ("down_blocks.2.attentions.0", range(9, 29, 2), 1280),
        ("down_blocks.2.attentions.1", range(29, 49, 2), 1280),
        ("up_blocks.0.attentions.0", range(49, 69, 2), 1280),
        ("up_blocks.0.attentions.1", range(69, 89, 2), 1280),
        ("up_blocks.0.attentions.2", range(89, 109, 2), 1280),
        ("up_blocks.1.attentions.0", range(109, 113, 2), 640),
        ("up_blocks.1.attentions.1", range(113, 117, 2), 640),
        ("up_blocks.1.attentions.2", range(117, 121, 2), 640),
        ("mid_block.attentions.0", range(121, 141, 2), 1280),
    ]
    return tuple(
        Layer(number=number, path=f"{place}.transformer_blocks.{i}", width=width)
        for place, numbers, width in named
        for i, number in enumerate(numbers)
    )


TRUE = Sizes(
    layers=_true_layers(), context=2048, width=1280, heads=20, face_heads=32, tokens=16,
    face_hidden=1024, rank=128,
)  # fmt: skip
SMALL = Sizes(
    layers=(
        Layer(number=1, path="down_blocks.1.attentions.0.transformer_blocks.0", width=64),
        Layer(number=3, path="up_blocks.0.attentions.0.transformer_blocks.0", width=64),
        Layer(number=5, path="up_blocks.0.attentions.1.transformer_blocks.0", width=32),
        Layer(number=7, path="mid_block.attentions.0.transformer_blocks.0", width=64),
    ),
    context=32, width=48, heads=2, face_heads=3, tokens=5, face_hidden=1024, rank=4,
    pulid=24, former_heads=2, former_tokens=6, eva=20, level=28,
)  # fmt: skip

WIDE = dataclasses.replace(TRUE, layers=SMALL.layers)
"""Projectors of true size, and few layers."""


# --- projectors ------------------------------------------------------------------------------


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _block(prefix: str, d: int, heads: int) -> Shapes:
    """One layer of a perceiver: 11 tensors."""
    return {
        **_norm(f"{prefix}.0.norm1", d), **_norm(f"{prefix}.0.norm2", d),
        f"{prefix}.0.to_q.weight": (64 * heads, d),
        f"{prefix}.0.to_kv.weight": (128 * heads, d),
        f"{prefix}.0.to_out.weight": (d, 64 * heads),
        **_norm(f"{prefix}.1.0", d),
        f"{prefix}.1.1.weight": (4 * d, d), f"{prefix}.1.3.weight": (d, 4 * d),
    }  # fmt: skip


def _perceiver(prefix: str, inputs: int, d: int, heads: int, context: int) -> Shapes:
    shapes = {
        **_linear(f"{prefix}proj_in", d, inputs), **_linear(f"{prefix}proj_out", context, d),
        **_norm(f"{prefix}norm_out", context),
    }  # fmt: skip
    for i in range(4):
        shapes |= _block(f"{prefix}layers.{i}", d, heads)
    return shapes


def _resampler(s: Sizes, inputs: int) -> Shapes:
    latents = {"latents": (1, s.tokens, s.width)}
    return {**latents, **_perceiver("", inputs, s.width, s.heads, s.context)}


def _face(s: Sizes, tokens: int) -> Shapes:
    return {
        **_linear("proj.0", s.face_hidden, 512),
        **_linear("proj.2", tokens * s.context, s.face_hidden),
        **_norm("norm", s.context),
    }


def _stack(prefix: str, inputs: int, hidden: int, out: int) -> Shapes:
    """Linear, LayerNorm, LeakyReLU, twice, and a last linear layer."""
    return {
        **_linear(f"{prefix}.0", hidden, inputs), **_norm(f"{prefix}.1", hidden),
        **_linear(f"{prefix}.3", hidden, hidden), **_norm(f"{prefix}.4", hidden),
        **_linear(f"{prefix}.6", out, hidden),
    }  # fmt: skip


def base(s: Sizes, width: int = 1280) -> Shapes:
    return {**_linear("proj", 4 * s.context, width), **_norm("norm", s.context)}


def full(s: Sizes) -> Shapes:
    return {
        **_linear("proj.0", s.states, s.states), **_linear("proj.2", s.context, s.states),
        **_norm("proj.3", s.context),
    }  # fmt: skip


def plus(s: Sizes) -> Shapes:
    return _resampler(s, s.states)


def raw_face(s: Sizes) -> Shapes:
    """InstantID and portrait-unnorm."""
    return _resampler(s, 512)


def faceid(s: Sizes) -> Shapes:
    return _face(s, 4)


def portrait(s: Sizes) -> Shapes:
    return _face(s, 16)


def plus_v2(s: Sizes) -> Shapes:
    perceiver = _perceiver("perceiver_resampler.", s.states, s.context, s.face_heads, s.context)
    return {**_face(s, 4), **perceiver}


def pulid_v1(s: Sizes) -> Shapes:
    shapes = _stack("body", 512 + s.eva, s.pulid, 5 * s.context)
    for i in range(5):
        shapes |= _stack(f"mapping_{i}", s.level, s.pulid, s.context)
        shapes |= _stack(f"mapping_patch_{i}", s.level, s.pulid, s.context)
    return shapes


def pulid_v11(s: Sizes) -> Shapes:
    d = s.pulid
    shapes = {"latents": (1, s.former_tokens, d), "proj_out": (d, s.context)}
    for i in range(10):
        shapes |= _block(f"layers.{i}", d, s.former_heads)
    for i in range(5):
        shapes |= _stack(f"mapping_{i}", s.level, d, d)
    return {**shapes, **_stack("id_embedding_mapping", 512 + s.eva, d, 5 * d)}


PROJECTORS: dict[str, Callable[[Sizes], Shapes]] = {
    "base bigG": base,
    "base H": lambda s: base(s, 1024),
    "full": full,
    "plus": plus,
    "faceid": faceid,
    "portrait": portrait,
    "plus v2": plus_v2,
    "raw face": raw_face,
    "pulid v1": pulid_v1,
    "pulid v1.1": pulid_v11,
}
WITH_LORA = {"faceid", "plus v2"}


# --- attention -------------------------------------------------------------------------------


def key_values(s: Sizes, leaf: str = "to_{}_ip") -> Shapes:
    return {
        f"{layer.number}.{leaf.format(part)}.weight": (layer.width, s.context)
        for layer in s.layers
        for part in "kv"
    }


def lora(s: Sizes) -> Shapes:
    """Of every attention: self-attention has the even number before."""
    shapes: Shapes = {}
    for layer in s.layers:
        for number, cross in ((layer.number - 1, False), (layer.number, True)):
            for linear in ("q", "k", "v", "out"):
                inputs = s.context if cross and linear in "kv" else layer.width
                shapes[f"{number}.to_{linear}_lora.down.weight"] = (s.rank, inputs)
                shapes[f"{number}.to_{linear}_lora.up.weight"] = (layer.width, s.rank)
    return shapes


def attention(s: Sizes, family: str) -> Shapes:
    return {**key_values(s), **(lora(s) if family in WITH_LORA else {})}


def by_path(s: Sizes, names: Shapes) -> dict[str, str]:
    """The names of training checkpoints, by those with numbers."""
    paths = {layer.number: f"{layer.path}.attn2" for layer in s.layers}
    paths |= {layer.number - 1: f"{layer.path}.attn1" for layer in s.layers}
    result = {}
    for name in names:
        number, _, rest = name.partition(".")
        result[name] = f"{paths[int(number)]}.processor.{rest}"
    return result


# --- numbers, and containers -----------------------------------------------------------------

State = dict[str, Tensor]
Nested = dict[str, State]


def filled(shapes: Shapes, seed: int, dtype: torch.dtype = torch.float32) -> State:
    """Numbers that keep activations near 1; norms are not the identity."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=draw) / math.sqrt(shape[-1] if len(shape) > 1 else 2))
        .to(dtype)
        for name, shape in shapes.items()
    }  # fmt: skip


def made(
    family: str, s: Sizes = SMALL, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Nested:
    """``image_proj`` and ``ip_adapter`` of one family."""
    return {
        "image_proj": filled(PROJECTORS[family](s), seed, dtype),
        "ip_adapter": filled(attention(s, family), seed + 100, dtype),
    }


def flat(**groups: State) -> State:
    return {f"{group}.{name}": t for group, state in groups.items() for name, t in state.items()}


def _nested(names: tuple[str, str]) -> Callable[[Path, Nested, Sizes], None]:
    return lambda path, m, s: torch.save(
        dict(zip(names, (m["image_proj"], m["ip_adapter"]), strict=True)), path
    )


def _flat_safetensors(path: Path, m: Nested, s: Sizes) -> None:
    save_file(flat(**m), path)


def _pulid_names(state: State) -> State:
    return {n.replace("to_k_ip", "id_to_k").replace("to_v_ip", "id_to_v"): t
            for n, t in state.items()}  # fmt: skip


def _pulid_flat(path: Path, m: Nested, s: Sizes) -> None:
    attention = _pulid_names(m["ip_adapter"])
    torch.save(flat(id_adapter=m["image_proj"], id_adapter_attn_layers=attention), path)


def _training(m: Nested, s: Sizes) -> tuple[State, State, State]:
    names = by_path(s, {n: () for n in m["ip_adapter"]})
    inside = {names[n]: t for n, t in m["ip_adapter"].items()}
    frozen = {
        "conv_in.weight": torch.ones(4, 4),
        "mid_block.attentions.0.norm.weight": torch.ones(4),
    }
    return m["image_proj"], m["ip_adapter"], {**inside, **frozen}


def _training_bin(path: Path, m: Nested, s: Sizes) -> None:
    """The K/V are there twice, over the same memory."""
    projector, modules, unet = _training(m, s)
    torch.save(flat(image_proj_model=projector, adapter_modules=modules, unet=unet), path)


def _training_safetensors(path: Path, m: Nested, s: Sizes) -> None:
    """Writers of safetensors keep one of two tensors over the same memory."""
    projector, _, unet = _training(m, s)
    save_file(flat(image_proj_model=projector, unet=unet), path)


def _paths_inside(path: Path, m: Nested, s: Sizes) -> None:
    """Some users' conversions."""
    names = by_path(s, {n: () for n in m["ip_adapter"]})
    inside = {names[n]: t for n, t in m["ip_adapter"].items()}
    save_file(flat(image_proj=m["image_proj"], ip_adapter=inside), path)


CONTAINERS: dict[str, Callable[[Path, Nested, Sizes], None]] = {
    "nested pickle": _nested(("image_proj", "ip_adapter")),
    "flat safetensors": _flat_safetensors,
    "flat pickle": lambda path, m, s: torch.save(flat(**m), path),
    "old pickle": lambda path, m, s: torch.save(m, path, _use_new_zipfile_serialization=False),
    "pulid pickle": _pulid_flat,
    "pulid names, swapped prefix": lambda path, m, s: save_file(
        flat(image_proj=m["image_proj"], ip_adapter=_pulid_names(m["ip_adapter"])), path
    ),
    "storymaker's prefixes": _nested(("image_proj_model", "ip_adapter")),
    "consistentid's prefixes": _nested(("image_proj_model", "adapter_modules")),
    "kolors' prefixes": _nested(("image_proj", "adapter_modules")),
    "training pickle": _training_bin,
    "training safetensors": _training_safetensors,
    "paths inside ip_adapter": _paths_inside,
    "wrapped": lambda path, m, s: torch.save(
        {"state_dict": {f"module.{n}": t for n, t in flat(**m).items()}, "step": 7}, path
    ),
}


def write(path: Path, container: str, made: Nested, s: Sizes = SMALL) -> Path:
    CONTAINERS[container](path, made, s)
    return path


def layers_of(s: Sizes, core: Any) -> Any:
    """The layers as the core describes a UNet's; ``core``: the module ``sdxl.layers``."""
    return tuple(
        core.CrossAttentionLayer(
            path=layer.path, block=("input", 0, i), width=layer.width, context_width=s.context
        )
        for i, layer in enumerate(s.layers)
    )
