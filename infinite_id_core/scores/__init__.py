"""Likeness and prompt scores (Eq. 9-11)."""
