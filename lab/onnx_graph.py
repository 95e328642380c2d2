"""A small writer of ONNX graphs, weights in float16.

Written by hand rather than exported: the names, the free dimensions and the sharing of weights
between the detector's levels are what insightface's loader looks at.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

_OPSET = 13
_IR_VERSION = 8  # read by every onnxruntime since 1.10


class Graph:
    """Collects nodes; every method returns the name of the value it made."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._stored: dict[bytes, str] = {}

    def input(self, name: str, shape: Sequence[int | str]) -> str:
        """A float32 input; strings are free dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str]) -> None:
        """Give `value` to the caller as `name`."""
        self._nodes.append(helper.make_node("Identity", [value], [name]))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """One node of one output."""
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def conv(
        self, x: str, weight: torch.Tensor, bias: torch.Tensor, *, stride: int = 1,
        padding: int = 0, dilation: int = 1, groups: int = 1,
    ) -> str:  # fmt: skip
        """A convolution with a kernel [out, in / groups, k, k]."""
        return self.add(
            "Conv", x, self._weight(weight), self._weight(bias),
            strides=[stride] * 2, pads=[padding] * 4, dilations=[dilation] * 2, group=groups,
        )  # fmt: skip

    def integers(self, values: Sequence[int]) -> str:
        """A constant of int64."""
        return self._store(np.array(values, dtype=np.int64))

    def _weight(self, tensor: torch.Tensor) -> str:
        stored = self._store(tensor.detach().numpy().astype(np.float16))
        widened = f"{stored}_f32"
        if all(node.output[0] != widened for node in self._nodes):
            self._nodes.append(helper.make_node("Cast", [stored], [widened], to=TensorProto.FLOAT))
        return widened

    def _store(self, array: np.ndarray) -> str:
        key = str(array.shape).encode() + array.tobytes()
        if key not in self._stored:
            name = f"w{len(self._stored)}"
            self._weights.append(numpy_helper.from_array(array, name))
            self._stored[key] = name
        return self._stored[key]

    def save(self, path: Path) -> None:
        """Check the graph and write it."""
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, self._weights
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION,
            producer_name="microworld",
        )  # fmt: skip
        onnx.checker.check_model(model, full_check=True)
        onnx.save_model(model, str(path))
