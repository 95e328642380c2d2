"""The text stream's latents between two samplers that share one run.

A run that stops before its end hands on one latent, the person's: the host's latent has no place
for the text stream's. Here it is kept beside, under what the person's latent holds, so that the
sampler that goes on finds it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

ROOM = 64 * 2**20
"""Bytes that are kept; the oldest rows go first. A row of 1024 px takes 256 KiB."""


class TextLatents:
    """Rows of the text stream by the content of the person's rows."""

    def __init__(self, room: int = ROOM) -> None:
        self._room = room
        self._rows: OrderedDict[str, Tensor] = OrderedDict()

    def keep(self, identity: Tensor, text: Tensor) -> None:
        """Both ``[b, C, H, W]``: what the host is given, and what goes with it."""
        for key, row in zip(_keys(identity), text, strict=True):
            self._rows.pop(key, None)
            self._rows[key] = row.detach().to("cpu", torch.float32, copy=True)
        while self._rows and sum(row.nbytes for row in self._rows.values()) > self._room:
            self._rows.popitem(last=False)

    def find(self, identity: Tensor) -> Tensor | None:
        """The text stream's ``[b, C, H, W]`` of these rows; None where one is not known."""
        rows = [self._rows.get(key) for key in _keys(identity)]
        known = [row for row in rows if row is not None]
        return torch.stack(known) if known and len(known) == len(rows) else None


def _keys(latent: Tensor) -> Iterator[str]:
    """A name for each row's content, the same after the host has cast it to half and back."""
    for row in latent.detach().to("cpu", torch.float16):
        content = row.contiguous().view(torch.uint8).numpy().tobytes()
        yield hashlib.sha256(repr(tuple(row.shape)).encode() + content).hexdigest()
