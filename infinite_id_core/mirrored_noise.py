"""The same random draws for both streams of a doubled batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .streams import twice


class MirroredNoise(TorchFunctionMode):
    """Random draws of the doubled latent's shape repeat their first half.

    Samplers that add noise draw for all rows at once; both streams must get the same draw, and
    the one an unpatched run would get. Active only in the sampler's own arithmetic.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.active = False

    def __enter__(self) -> MirroredNoise:
        self.active = True
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self.active = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Not listening, for the model's own calls."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn_like, torch.rand_like) and tuple(args[0].shape) == self.shape:
            return twice(func(args[0][: self.rows], *args[1:], **kwargs))
        if func in (torch.randn, torch.rand) and self._size(args, kwargs) == self.shape:
            rest = {k: v for k, v in kwargs.items() if k not in ("size", "out")}
            return twice(func((self.rows, *self.shape[1:]), **rest))
        if (
            func in (torch.Tensor.normal_, torch.Tensor.uniform_)
            and tuple(args[0].shape) == self.shape
        ):
            func(args[0][: self.rows], *args[1:], **kwargs)
            args[0][self.rows :] = args[0][: self.rows]
            return args[0]
        return func(*args, **kwargs)

    @property
    def rows(self) -> int:
        """Rows of one stream."""
        return self.shape[0] // 2

    @staticmethod
    def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
        return tuple(size)
