"""What an adapter adds to single layers: a K/V pair, and changes of low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


class KeyValue(nn.Module):
    """K'_id and V'_id projections of one cross-attention layer, without bias as SDXL's own."""

    def __init__(self, context_width: int, width: int, operations: Any = nn) -> None:
        super().__init__()
        self.to_k = operations.Linear(context_width, width, bias=False)
        self.to_v = operations.Linear(context_width, width, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """c_id ``[B, M, C]`` -> K'_id, V'_id ``[B, M, width]``."""
        return self.to_k(tokens), self.to_v(tokens)


@dataclass(frozen=True)
class LowRankShape:
    """Widths of a ``LowRank``."""

    inputs: int
    rank: int
    outputs: int


class LowRank(nn.Module):
    """What a LoRA adds to the output of one linear layer: ``up(down(x))``, to be scaled by its
    strength."""

    def __init__(self, shape: LowRankShape, operations: Any = nn) -> None:
        super().__init__()
        self.down = operations.Linear(shape.inputs, shape.rank, bias=False)
        self.up = operations.Linear(shape.rank, shape.outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` -> ``[..., outputs]``."""
        return cast(Tensor, self.up(self.down(x)))


def nest(root: nn.Module, path: str, leaf: nn.Module) -> None:
    """Register ``leaf`` under a dotted path, so that state_dict keys spell the path out."""
    *parents, last = path.split(".")
    for name in parents:
        child = root._modules.get(name)
        if child is None:
            child = nn.Module()
            root.add_module(name, child)
        root = child
    root.add_module(last, leaf)
