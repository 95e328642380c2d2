"""Step 2: K/V pairs and, in FaceID files, a LoRA, of SDXL's layers and of no other model's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import (
    MissingTensorError,
    OtherFamilyError,
    UnexpectedTensorError,
    WrongShapeError,
)
from ...sdxl.layers import CrossAttentionLayer
from ...sdxl.published_layers import CONTEXT_WIDTH, SDXL_LAYERS, attention_of, number_of
from ..checked import Shapes

_NAME = re.compile(
    r"(?:(?P<number>\d{1,6})|(?P<path>(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+"
    r"\.transformer_blocks\.\d+\.attn[12]))(?:\.processor)?"
    r"\.(?:(?:to_(?P<kv>[kv])_ip|id_to_(?P<id_kv>[kv]))"
    r"|(?P<linear>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up))\.weight",
    re.ASCII,
)
_SD15_LAYERS = 16
_SD15_CONTEXTS = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2"}
LINEARS = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}
"""A LoRA's layers by their names in a file: the UNet's own names."""


def attention_names(
    path: Path, parts: Mapping[str, str], layers: Sequence[CrossAttentionLayer]
) -> dict[str, str]:
    """Our names of all tensors in ``parts``, each with the file's own.

    Raises ``UnexpectedTensorError`` for one of no layer, or two of one.
    """
    names: dict[str, str] = {}
    strangers = []
    for name, own in parts.items():
        ours = _our_name(name, layers)
        if ours is None or ours in names:
            strangers.append(own)
        else:
            names[ours] = own
    if strangers:
        raise UnexpectedTensorError(
            path, f"has {len(strangers)} tensors of no attention layer among the {2 * len(layers)} "
            f"of the UNet, or a second one of the same: {sorted(strangers)[:3]}."
        )  # fmt: skip
    return names


def _our_name(name: str, layers: Sequence[CrossAttentionLayer]) -> str | None:
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    number = match["number"]
    place = match["path"] if number is None else attention_of(int(number), layers)
    if place is None:
        return None
    if match["linear"]:
        return f"low_rank.{place}.{LINEARS[match['linear']]}.{match['side']}.weight"
    if not place.endswith(".attn2"):
        return None
    return f"layers.{place.removesuffix('.attn2')}.to_{match['kv'] or match['id_kv']}.weight"


def check_attention(
    path: Path, names: Mapping[str, str], header: Shapes, layers: Sequence[CrossAttentionLayer]
) -> None:
    """Raise where the K/V pairs, or the LoRA if there is one, are not those of ``layers``.

    ``MissingTensorError``, ``UnexpectedTensorError``, ``WrongShapeError``.
    """
    shapes = {name: header[own] for name, own in names.items()}
    wanted: dict[str, tuple[int, ...]] = {
        f"layers.{layer.path}.to_{part}.weight": (layer.width, layer.context_width)
        for layer in layers
        for part in "kv"
    }
    found = {name for name in shapes if name.startswith("layers.")}
    _check_pairs(path, wanted.keys() - found, layers)
    low_rank = {name for name in shapes if name.startswith("low_rank.")}
    if low_rank:
        wanted |= _low_rank_shapes(path, shapes, layers)
    for extra in sorted(shapes.keys() - wanted.keys()):
        raise UnexpectedTensorError(path, f"has {names[extra]}, of no layer of the UNet.")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise WrongShapeError(
                path, f"{names[name]} has shape {list(shapes[name])}; expected {list(shape)}, as "
                "wide as the UNet's own."
            )  # fmt: skip


def check_generation(path: Path, parts: Mapping[str, str], header: Shapes) -> None:
    """Raise ``OtherFamilyError`` for the layers of Stable Diffusion 1.5 or 2."""
    keys = [header[own] for name, own in parts.items() if re.search(r"to_k(_ip)?\.weight$", name)]
    contexts = {shape[1] for shape in keys if len(shape) == 2}
    known = contexts & _SD15_CONTEXTS.keys()
    if len(keys) == _SD15_LAYERS or (len(contexts) == 1 and known):
        model = _SD15_CONTEXTS[known.pop()] if known else "Stable Diffusion 1.5 or 2"
        raise OtherFamilyError(
            path, f"is an adapter for {model}: {len(keys)} cross-attention layers, text "
            f"{sorted(contexts)} wide. Expected SDXL's: {len(SDXL_LAYERS)} layers, text "
            f"{CONTEXT_WIDTH} wide. Use the file of the same family for SDXL."
        )  # fmt: skip


def _check_pairs(path: Path, missing: set[str], layers: Sequence[CrossAttentionLayer]) -> None:
    if not missing:
        return
    lacking = sorted({number_of(_layer(name), layers) for name in missing})
    listed = ", ".join(f"{n} ({layers[n // 2].path})" for n in lacking[:4])
    more = f" and {len(lacking) - 4} more" * (len(lacking) > 4)
    advice = "Download it again."
    if len(lacking) == len(layers):
        advice = (
            "A training checkpoint's K/V lie under unet.<layer>.processor.to_k_ip: a conversion "
            "that drops unet.* loses them. Use the checkpoint itself."
        )
    raise MissingTensorError(
        path, f"lacks K/V of {len(lacking)} of the UNet's {len(layers)} cross-attention layers: "
        f"{listed}{more}. {advice}"
    )  # fmt: skip


def _layer(name: str) -> str:
    return name.removeprefix("layers.").removesuffix(".weight").rpartition(".")[0]


def _low_rank_shapes(
    path: Path, found: Shapes, layers: Sequence[CrossAttentionLayer]
) -> dict[str, tuple[int, ...]]:
    """What a LoRA of every attention must have, of the rank that each layer's ``down`` has."""
    wanted: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        for attention in ("attn1", "attn2"):
            for linear in LINEARS.values():
                reads_text = attention == "attn2" and linear in ("to_k", "to_v")
                inputs = layer.context_width if reads_text else layer.width
                name = f"low_rank.{layer.path}.{attention}.{linear}"
                down = found.get(f"{name}.down.weight", ())
                rank = down[0] if down else 1
                wanted[f"{name}.down.weight"] = (rank, inputs)
                wanted[f"{name}.up.weight"] = (layer.width, rank)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise MissingTensorError(
            path, f"has a LoRA that lacks {len(missing)} of its {len(wanted)} tensors, e.g. "
            f"{missing[:2]}. Download it again."
        )  # fmt: skip
    if any(0 in found[name] for name in wanted):
        raise WrongShapeError(path, "has a LoRA of rank 0.")
    return wanted
