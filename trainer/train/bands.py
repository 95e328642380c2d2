"""Equal ranges of timesteps, in which losses are told apart: their sizes differ a hundredfold."""

from __future__ import annotations

from infinite_id_core.sdxl.schedule import TIMESTEPS


def band_range(band: int, bands: int) -> range:
    """The timesteps ``t`` with ``t * bands // TIMESTEPS == band``."""
    first, last = (-(-number * TIMESTEPS // bands) for number in (band, band + 1))
    return range(first, last)


def band_name(band: int, bands: int) -> str:
    """``timesteps_000_to_249``."""
    found = band_range(band, bands)
    return f"timesteps_{found[0]:03d}_to_{found[-1]:03d}"
