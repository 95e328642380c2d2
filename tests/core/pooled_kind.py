"""A second kind of adapter, as somebody would add one: this file is all there is to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

WIDTH, TOKENS = 16, 4


def pooled_kind(core: Any) -> Any:
    """Its parts, for one import of the core: ``reading`` and ``adapter(context_width, widths)``."""
    reading = core.method.features.Reading(model="made-L", output="pooled", shape=(WIDTH,))

    class Pooled(core.method.projectors.Projector):  # type: ignore[misc]
        """One linear layer makes four tokens of another encoder's pooled output."""

        needs = {"image": reading}
        tokens_per_reference = TOKENS

        def __init__(self, context_width: int, operations: Any) -> None:
            super().__init__()
            self.proj = operations.Linear(WIDTH, TOKENS * context_width)

        def forward(self, features: Any) -> torch.Tensor:
            return self.proj(features["image"]).unflatten(1, (TOKENS, -1))

    def adapter(context: int, widths: dict[str, int], operations: Any = torch.nn) -> Any:
        record = core.method.records.AdapterRecord(context_width=context)
        return core.method.adapter.Adapter(record, partial(Pooled, context), widths, operations)

    return type("Kind", (), {"reading": reading, "adapter": staticmethod(adapter)})
