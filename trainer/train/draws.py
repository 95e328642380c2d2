"""Random numbers by counter: each is a function of (seed, number, purpose) and of nothing else.

So training does not depend on how many processes or data workers share the samples, and resuming
needs one integer.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a generator is for: two purposes of one sample never share their numbers."""

    BUCKET = 1
    CHOICE = 2
    DROP = 3
    TIMESTEP = 4
    NOISE = 5
    CROP = 6
    PREVIEW = 7
    VALIDATION_PAIR = 8
    VALIDATION_TIMESTEP = 9
    VALIDATION_NOISE = 10


def generator(seed: int, number: int, purpose: Purpose) -> np.random.Generator:
    """The generator of one purpose of one sample, step or photo (Philox: counter-based)."""
    mask = 2**64 - 1
    return np.random.Generator(
        np.random.Philox(key=[seed & mask, number & mask], counter=[0, 0, 0, int(purpose)])
    )
