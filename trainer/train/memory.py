"""Memory that is full, by name, and what to set then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import MemoryFullError

LESS_MEMORY = (
    "set optimiser.checkpointing, a smaller optimiser.batch with more accumulation, "
    "model.unet_dtype = 'fp8', or optimiser.kind = 'adafactor' or 'adamw8bit'"
)
"""What makes a training smaller; the dry run says the same."""
LESS_IN_CACHES = "set fewer data.crops_per_photo, or a smaller data.resolution"
"""What makes the encoders' work smaller."""

# What libraries below torch call it, where torch has no type for it.
_TEXTS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


@contextmanager
def memory_errors(doing: str, advice: str) -> Iterator[None]:
    """Turn every library's "out of memory" into ``MemoryFullError``.

    ``doing`` completes "While ..."; ``advice`` completes "To need less, ...".
    """
    try:
        yield
    except MemoryError as error:
        raise MemoryFullError(
            f"While {doing}, this computer's memory was full. Close other programs, or set fewer "
            f"data.workers. To need less, {advice}."
        ) from error
    except RuntimeError as error:
        if not _is_full(error):
            raise
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MemoryFullError(
            f"While {doing}, the memory was full ({found}). To need less, {advice}."
        ) from error


def _is_full(error: RuntimeError) -> bool:
    full = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
    return isinstance(error, full) or any(text in str(error) for text in _TEXTS)
