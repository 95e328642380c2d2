"""``python -m trainer evaluate``: likeness and prompt scores (Eq. 9-11) of one or more methods."""

from .cli import main

__all__ = ["main"]
