"""The same random draws for both streams of a doubled batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .streams import twice


class MirroredNoise(TorchFunctionMode):
    """Random draws for all rows of the doubled latent repeat their first half.

    Samplers that add noise draw for all rows at once; both streams must get the same draw, and
    the one an unpatched run would get. Rows and rank tell a sampler's draw, not the exact shape:
    some samplers enlarge the latent on their way. Active in the sampler's own arithmetic only:
    the model's calls and the callback are ``paused``.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self._thread: int | None = None

    @property
    def active(self) -> bool:
        """Whether this thread's draws are mirrored. Torch keeps its modes by thread."""
        return self._thread == threading.get_ident()

    def __enter__(self) -> MirroredNoise:
        self._thread = threading.get_ident()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread = None
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not listening, for what is not the sampler's own; nothing to do in another thread."""
        if not self.active:
            yield
            return
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn_like, torch.rand_like) and self._fits(args[0].shape):
            return twice(func(args[0][: self.rows], *args[1:], **kwargs))
        if func in (torch.randn, torch.rand) and self._fits(size := self._size(args, kwargs)):
            rest = {k: v for k, v in kwargs.items() if k not in ("size", "out")}
            return twice(func((self.rows, *size[1:]), **rest))
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) and self._fits(args[0].shape):
            func(args[0][: self.rows], *args[1:], **kwargs)
            args[0][self.rows :] = args[0][: self.rows]
            return args[0]
        return func(*args, **kwargs)

    @property
    def rows(self) -> int:
        """Rows of one stream."""
        return self.shape[0] // 2

    def _fits(self, size: Sequence[int]) -> bool:
        return len(size) == len(self.shape) and size[0] == self.shape[0]

    @staticmethod
    def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
        return tuple(size)
