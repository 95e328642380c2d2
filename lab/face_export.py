"""The trained networks as ONNX files in the shapes of SCRFD and ArcFace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from microworld.config import FACE_WIDTH, RECOGNISER_SIZE

from .face_networks import ANCHORS, LEVELS, STRIDE, ConvNorm, Detector, Recogniser, Separable
from .onnx_graph import Graph

SCORE_MARGIN = 0.5  # taken off the trained logits: a false face costs more than a faint one


def export_detector(model: Detector, path: Path) -> None:
    """Write the SCRFD-shaped file: three levels share one set of weights."""
    graph = Graph("microworld detector")
    image = graph.input("input.1", [1, 3, "height", "width"])
    outputs: dict[str, list[str]] = {"score": [], "bbox": [], "kps": []}
    level_image = image
    for level in range(LEVELS):
        if level:
            level_image = graph.add("AveragePool", level_image, kernel_shape=[2, 2], strides=[2, 2])
        body = _sequence(graph, model.body, level_image)
        units = [anchor["unit"] / STRIDE for anchor in ANCHORS]
        bias = model.score.bias - SCORE_MARGIN
        score = graph.add("Sigmoid", graph.conv(body, model.score.weight, bias))
        outputs["score"].append(_rows(graph, score, 1))
        # SCRFD's loader multiplies by the stride; the anchors' units go into the weights.
        outputs["bbox"].append(_rows(graph, _scaled(graph, body, model.box, units), 4))
        outputs["kps"].append(_rows(graph, _scaled(graph, body, model.landmarks, units), 10))
    for width, (kind, names) in zip((1, 4, 10), outputs.items(), strict=True):
        for level, name in enumerate(names):
            graph.output(f"{kind}_{STRIDE * 2**level}", name, [f"cells_{level}", width])
    graph.save(path)


def export_recogniser(model: Recogniser, path: Path) -> None:
    """Write the ArcFace-shaped file."""
    graph = Graph("microworld recogniser")
    image = graph.input("input.1", ["batch", 3, RECOGNISER_SIZE, RECOGNISER_SIZE])
    graph.output("embedding", vector(graph, model.body, model.embed, image), ["batch", FACE_WIDTH])
    graph.save(path)


def vector(graph: Graph, body: nn.Sequential, embed: nn.Linear, image: str) -> str:
    """Picture -> [b, width]: a body whose last kernel is as large as its map, a linear layer."""
    inner = _sequence(graph, body[:-1], image)
    weight, bias = _folded(body[-1])
    last = graph.conv(inner, weight, bias, groups=weight.shape[0])  # no padding: the map -> 1x1
    values = graph.conv(last, embed.weight[:, :, None, None], embed.bias)
    return graph.add("Flatten", values, axis=1)


def _scaled(graph: Graph, body: str, head: nn.Conv2d, units: list[float]) -> str:
    rows = head.weight.shape[0] // len(units)
    factor = torch.tensor(units).repeat_interleave(rows)
    return graph.conv(body, head.weight * factor[:, None, None, None], head.bias * factor)


def _rows(graph: Graph, map_: str, width: int) -> str:
    """[1, 2 * width, h, w] -> [h * w * 2, width], anchors innermost."""
    last = graph.add("Transpose", map_, perm=[0, 2, 3, 1])
    return graph.add("Reshape", last, graph.integers([-1, width]))


def _sequence(graph: Graph, blocks: nn.Sequential, image: str) -> str:
    x = image
    for block in blocks:
        if isinstance(block, Separable):
            inner = _conv_norm(graph, block.mix, graph.add("Relu", _conv(graph, block.spatial, x)))
            x = graph.add("Relu", graph.add("Add", x, inner))
        else:
            assert isinstance(block, ConvNorm)
            x = _conv_norm(graph, block, x)
    return x


def _conv_norm(graph: Graph, block: ConvNorm, x: str) -> str:
    x = _conv(graph, block[0], x, *_folded(block))
    return graph.add("Relu", x) if len(block) == 3 else x


def _conv(
    graph: Graph, conv: nn.Conv2d, x: str, weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> str:  # fmt: skip
    return graph.conv(
        x, conv.weight if weight is None else weight, conv.bias if bias is None else bias,
        stride=conv.stride[0], padding=conv.padding[0], dilation=conv.dilation[0],
        groups=conv.groups,
    )  # fmt: skip


def _folded(block: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a convolution with its batch norm inside."""
    conv, norm = block[0], block[1]
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * factor[:, None, None, None], norm.bias - norm.running_mean * factor
