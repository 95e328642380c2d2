"""One canonical name per cross-attention layer, whichever naming a UNet comes in."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from infinite_id_core.errors import NotSDXLError
from infinite_id_core.sdxl.layers import layers_from_diffusers, layers_from_ldm

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class UNet:
    """Depth of the transformer after each resnet, by level; 0 is none."""

    down: tuple[tuple[int, ...], ...]
    up: tuple[tuple[int, ...], ...]
    """Deepest level first, one resnet more than its down level."""
    middle: int
    channels: int = 320
    context: int = 2048
    pooled: bool = True

    def width(self, level: int) -> int:
        return self.channels * 2**level


SDXL = UNet(down=((0, 0), (2, 2), (10, 10)), up=((10,) * 3, (2,) * 3, (0,) * 3), middle=10)
UNETS = {
    "SDXL": SDXL,
    "SSD-1B": UNet(
        down=((0, 0), (2, 2), (4, 4)), up=((4, 4, 10), (2, 1, 1), (0, 0, 0)), middle=0
    ),
    "Vega": UNet(down=((0, 0), (1, 1), (2, 2)), up=((2, 2, 2), (1, 1, 1), (0, 0, 0)), middle=1),
    "KOALA": UNet(down=((0,), (2,), (5,)), up=((5, 5), (2, 2), (0, 0)), middle=5),
    "tiny": UNet(
        down=((0,), (1,)), up=((1, 1), (0, 0)), middle=1, channels=32, context=64
    ),
    "everywhere": UNet(down=((1, 2), (3, 4)), up=((5, 6, 7), (8, 9, 1)), middle=3),
}  # fmt: skip


def attention(shapes: Shapes, prefix: str, depth: int, width: int, context: int) -> None:
    """One spatial transformer."""
    shapes[f"{prefix}.proj_in.weight"] = (width, width)
    for i in range(depth):
        block = f"{prefix}.transformer_blocks.{i}"
        for name, source in (("attn1", width), ("attn2", context)):
            shapes[f"{block}.{name}.to_q.weight"] = (width, width)
            shapes[f"{block}.{name}.to_k.weight"] = (width, source)
            shapes[f"{block}.{name}.to_v.weight"] = (width, source)


def ldm(unet: UNet) -> Shapes:
    """Tensor names as in the original checkpoints (openaimodel.py)."""
    shapes: Shapes = {"input_blocks.0.0.weight": (unet.channels, 4, 3, 3)}
    if unet.pooled:
        shapes["label_emb.0.0.weight"] = (1280, 2816)
    number = 1
    for level, depths in enumerate(unet.down):
        width = unet.width(level)
        for depth in depths:
            shapes[f"input_blocks.{number}.0.in_layers.2.weight"] = (width, width, 3, 3)
            if depth:
                attention(shapes, f"input_blocks.{number}.1", depth, width, unet.context)
            number += 1
        if level < len(unet.down) - 1:
            shapes[f"input_blocks.{number}.0.op.weight"] = (width, width, 3, 3)
            number += 1
    shapes["middle_block.0.in_layers.2.weight"] = (width, width, 3, 3)
    if unet.middle:
        attention(shapes, "middle_block.1", unet.middle, width, unet.context)
    number = 0
    for step, depths in enumerate(unet.up):
        width = unet.width(len(unet.up) - 1 - step)
        for i, depth in enumerate(depths):
            shapes[f"output_blocks.{number}.0.in_layers.2.weight"] = (width, width, 3, 3)
            if depth:
                attention(shapes, f"output_blocks.{number}.1", depth, width, unet.context)
            if i == len(depths) - 1 and step < len(unet.up) - 1:
                place = 2 if depth else 1
                shapes[f"output_blocks.{number}.{place}.conv.weight"] = (width, width, 3, 3)
            number += 1
    return shapes


def diffusers(unet: UNet) -> Shapes:
    """Tensor names of diffusers' UNet2DConditionModel."""
    shapes: Shapes = {"conv_in.weight": (unet.channels, 4, 3, 3)}
    if unet.pooled:
        shapes["add_embedding.linear_1.weight"] = (1280, 2816)
    for side, levels in (("down", unet.down), ("up", unet.up)):
        for level, depths in enumerate(levels):
            width = unet.width(level if side == "down" else len(levels) - 1 - level)
            block = f"{side}_blocks.{level}"
            for i, depth in enumerate(depths):
                shapes[f"{block}.resnets.{i}.conv1.weight"] = (width, width, 3, 3)
                if depth:
                    attention(shapes, f"{block}.attentions.{i}", depth, width, unet.context)
            if level < len(levels) - 1:
                shapes[f"{block}.{side}samplers.0.conv.weight"] = (width, width, 3, 3)
    width = unet.width(len(unet.down) - 1)
    for i in range(2):
        shapes[f"mid_block.resnets.{i}.conv1.weight"] = (width, width, 3, 3)
    if unet.middle:
        attention(shapes, "mid_block.attentions.0", unet.middle, width, unet.context)
    return shapes


def table() -> list[tuple[str, tuple[str, int, int], int]]:
    """The 70 layers of SDXL as published IP-Adapter files number them: 1, 3, ... 139."""
    rows = []
    for module, block, number, depth, width in (
        ("down_blocks.1.attentions.0", "input", 4, 2, 640),
        ("down_blocks.1.attentions.1", "input", 5, 2, 640),
        ("down_blocks.2.attentions.0", "input", 7, 10, 1280),
        ("down_blocks.2.attentions.1", "input", 8, 10, 1280),
        ("up_blocks.0.attentions.0", "output", 0, 10, 1280),
        ("up_blocks.0.attentions.1", "output", 1, 10, 1280),
        ("up_blocks.0.attentions.2", "output", 2, 10, 1280),
        ("up_blocks.1.attentions.0", "output", 3, 2, 640),
        ("up_blocks.1.attentions.1", "output", 4, 2, 640),
        ("up_blocks.1.attentions.2", "output", 5, 2, 640),
        ("mid_block.attentions.0", "middle", 0, 10, 1280),
    ):
        rows += [
            (f"{module}.transformer_blocks.{i}", (block, number, i), width) for i in range(depth)
        ]
    return rows


@pytest.mark.parametrize("read", [layers_from_ldm, layers_from_diffusers])
def test_sdxl_has_the_published_seventy_layers(read):
    found = read((ldm if read is layers_from_ldm else diffusers)(SDXL))
    assert [(layer.path, layer.block, layer.width) for layer in found] == table()
    assert len(found) == 70 and {layer.context_width for layer in found} == {2048}
    # Their numbers in published files: layer i is n = 2 i + 1.
    numbers = {layer.path: 2 * i + 1 for i, layer in enumerate(found)}
    assert numbers["down_blocks.2.attentions.1.transformer_blocks.9"] == 47
    assert numbers["up_blocks.1.attentions.2.transformer_blocks.1"] == 119
    assert numbers["mid_block.attentions.0.transformer_blocks.0"] == 121


@pytest.mark.parametrize("name", UNETS)
def test_both_namings_give_the_same_layers(name):
    unet = UNETS[name]
    found = layers_from_ldm(ldm(unet))
    assert found == layers_from_diffusers(diffusers(unet))
    count = sum(sum(map(sum, side)) for side in (unet.down, unet.up)) + unet.middle
    assert len(found) == len({layer.block for layer in found}) == count
    assert {layer.context_width for layer in found} == {unet.context}


@pytest.mark.parametrize("name", UNETS)
def test_the_order_of_the_names_does_not_matter(name):
    for read, shapes in ((layers_from_ldm, ldm), (layers_from_diffusers, diffusers)):
        names = shapes(UNETS[name])
        assert read(dict(sorted(names.items(), reverse=True))) == read(names)


def test_uneven_depths_land_on_their_own_blocks():
    blocks = {layer.path: layer.block for layer in layers_from_ldm(ldm(UNETS["SSD-1B"]))}
    assert blocks["up_blocks.0.attentions.2.transformer_blocks.9"] == ("output", 2, 9)
    assert blocks["up_blocks.1.attentions.0.transformer_blocks.1"] == ("output", 3, 1)
    assert blocks["up_blocks.1.attentions.2.transformer_blocks.0"] == ("output", 5, 0)
    assert not any(path.startswith("mid_block") for path in blocks)


SD15 = UNet(
    down=((1, 1), (1, 1), (1, 1), (0, 0)),
    up=((0,) * 3, (1,) * 3, (1,) * 3, (1,) * 3),
    middle=1,
    context=768,
    pooled=False,
)


@pytest.mark.parametrize("read", [layers_from_ldm, layers_from_diffusers])
@pytest.mark.parametrize(
    "shapes",
    [
        ldm(SD15),
        diffusers(SD15),
        {},
        {"model.layers.0.self_attn.q_proj.weight": (8, 8)},
        {"joint_blocks.0.context_block.attn.qkv.weight": (8, 8), "label_emb.0.0.weight": (8, 8)},
        {"double_blocks.0.img_attn.qkv.weight": (8, 8)},
        {"add_embedding.linear_1.weight": (8, 8), "label_emb.0.0.weight": (8, 8)},
        {f"model.diffusion_model.{name}": shape for name, shape in ldm(SDXL).items()},
    ],
    ids=["SD1.5 ldm", "SD1.5 diffusers", "nothing", "language model", "SD3", "Flux",
         "no attention", "with a prefix"],
)  # fmt: skip
def test_what_is_not_sdxl_is_refused(read, shapes):
    with pytest.raises(NotSDXLError, match="SDXL"):
        read(shapes)


@pytest.mark.parametrize(
    ("read", "shapes"),
    [(layers_from_ldm, ldm(SDXL)), (layers_from_diffusers, diffusers(SDXL))],
)
@pytest.mark.parametrize("shape", [(), (640,), (640, 2048, 1), (640, 1024)])
def test_odd_shapes_are_refused(read, shapes, shape):
    name = next(n for n in shapes if n.endswith("attn2.to_k.weight"))
    with pytest.raises(NotSDXLError) as caught:
        read({**shapes, name: shape})
    assert (name if len(shape) != 2 else "1024, 2048") in str(caught.value)


def test_a_transformer_in_the_first_block_is_refused():
    shapes = ldm(SDXL)
    attention(shapes, "input_blocks.0.1", 1, 320, 2048)
    with pytest.raises(NotSDXLError, match="input_blocks.0.1"):
        layers_from_ldm(shapes)
