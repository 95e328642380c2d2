"""One sampling run, the same for both hosts: who takes effect when, with which keys and values."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from .adapter import Adapter
from .attention import IdentityTerm, StreamOptions
from .placement import IdentityPlacement

Place = tuple[Adapter, int, bool, torch.device]
"""Whose tokens, made by which module and where: adapter, person, null identity, device."""


class IdentityRun:
    """The people of one run, and what is computed for them once.

    Tokens and K/V are projected once per adapter module, person, role and device: several GPUs
    have a module and a thread each, so that neither is shared between threads.
    """

    def __init__(
        self,
        people: Sequence[IdentityPlacement],
        options: StreamOptions,
        level_at: Callable[[float], float],
        dtype: torch.dtype | None = None,
    ) -> None:
        """``level_at``: from a share of the sampling, 0 to 1, to the noise level (sigma) there.
        ``dtype``: of the tokens; None as the projectors' weights."""
        self.people = tuple(people)
        self.options = options
        self.ranges = [(level_at(p.start_percent), level_at(p.end_percent)) for p in people]
        self.begun = False
        """Whether the streams have parted."""
        self._dtype = dtype
        self._tokens: dict[Place, Tensor] = {}
        self._key_values: dict[tuple[Place, str, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._masks: dict[Hashable, Tensor] = {}
        self._weights: dict[int, Tensor | None] = {}

    def close(self) -> None:
        """Free everything."""
        for cache in (self._tokens, self._key_values, self._masks, self._weights):
            cache.clear()

    # --- streams and time ---

    @property
    def two_streams(self) -> bool:
        """Whether the text stream is read by anybody.

        It is read in self-attention alone: in cross-attention K'_t and V'_t come from the prompt.
        """
        return bool(self.people) and self.options.mixing != "off"

    @property
    def own(self) -> bool:
        """Whether the text stream has a trajectory of its own."""
        return self.two_streams and self.options.text_stream == "own"

    def active(self, sigma: float) -> tuple[int, ...]:
        """The people who take effect at this noise level."""
        active = tuple(i for i, (start, end) in enumerate(self.ranges) if end <= sigma <= start)
        self.begun = self.begun or bool(active)
        return active

    def needs_text_rows(self, sigma: float) -> bool:
        """Whether the streams differ and somebody may take effect again."""
        return self.two_streams and self.begun and any(end <= sigma for _, end in self.ranges)

    # --- what a layer adds for a person ---

    def term(
        self,
        index: int,
        path: str,
        q: Tensor,
        *,
        null: bool,
        adapter: Adapter,
        mask: Tensor | None,
    ) -> IdentityTerm:
        """One person's part in a layer, for rows ``q [B, N, C]``; ``null``: as nobody.

        ``adapter``: the module to run; ``mask``: of ``masked``. Raises ``FeatureError``.
        """
        key, value = self.key_value(index, path, q, null=null, adapter=adapter)
        rows = (q.shape[0], -1, -1)
        person = self.people[index]
        return IdentityTerm(
            key=key.expand(rows),
            value=value.expand(rows),
            strength=person.strength,
            token_weight=None if null else self._token_weight(index, adapter),
            mask=mask,
            merging=adapter.projector.merging,
        )

    def _token_weight(self, index: int, adapter: Adapter) -> Tensor | None:
        """Weight of each token; None where all count alike."""
        if index not in self._weights:
            weight = adapter.token_weight(self.people[index].identity)
            alike = bool((weight == weight[0]).all())
            self._weights[index] = None if alike else weight
        return self._weights[index]

    def key_value(
        self, index: int, path: str, like: Tensor, *, null: bool, adapter: Adapter
    ) -> tuple[Tensor, Tensor]:
        """K'_id, V'_id ``[1, M, width]`` of one layer, projected once."""
        place = (adapter, index, null, like.device)
        key = (place, path, like.dtype)
        if key not in self._key_values:
            k, v = adapter.key_value(path)(self.tokens(place))
            self._key_values[key] = (k.to(like.dtype), v.to(like.dtype))
        return self._key_values[key]

    def tokens(self, place: Place) -> Tensor:
        """c_id ``[1, M, C]`` (Eq. 4). Raises ``FeatureError`` where it is not finite."""
        if place not in self._tokens:
            adapter, index, null, device = place
            read = adapter.null_tokens if null else adapter.tokens
            identity = self.people[index].identity
            self._tokens[place] = read(identity, device=device, dtype=self._dtype)
        return self._tokens[place]

    def masked(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """A person's mask at a layer's resolution, ``[1 or rows, N, 1]``, made once by ``key``."""
        if key not in self._masks:
            self._masks[key] = make()
        return self._masks[key]
