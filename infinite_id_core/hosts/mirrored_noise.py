"""The same random draws for both streams of a doubled batch."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..method.rows import twice

_LIKE = (torch.randn_like, torch.rand_like, torch.randint_like)
_OF_SIZE = (torch.randn, torch.rand, torch.randint, torch.normal)
_IN_PLACE = (
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.exponential_,
    Tensor.cauchy_,
    Tensor.log_normal_,
    Tensor.geometric_,
    Tensor.random_,
)


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
        self._looking_away = False

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
        """Not listening, for what is not the sampler's own; nothing to do in another thread.

        Off torch's stack of modes where it lies on top, so that the model runs as if it were not
        there; under another mode it stays, and looks away.
        """
        if not self.active or self._looking_away:
            yield
            return
        on_top = _get_current_function_mode() is self  # type: ignore[no-untyped-call]
        if on_top:
            self.__exit__(None, None, None)
        self._looking_away = not on_top
        try:
            yield
        finally:
            self._looking_away = False
            if on_top:
                self.__enter__()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._looking_away:
            return func(*args, **kwargs)
        if func in _LIKE and self._fits(args[0].shape):
            return twice(func(args[0][: self.rows], *args[1:], **kwargs))
        if func in _IN_PLACE and self._fits(args[0].shape):
            func(args[0][: self.rows], *args[1:], **kwargs)
            args[0][self.rows :] = args[0][: self.rows]
            return args[0]
        if func is torch.normal and args and isinstance(args[0], Tensor):
            return self._normal(*args, **kwargs)
        if func in _OF_SIZE:
            return self._of_size(func, args, kwargs)
        return func(*args, **kwargs)

    def _of_size(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A draw that is told its size, by name, as a sequence or number by number."""
        place = next((i for i, a in enumerate(args) if isinstance(a, (tuple, list))), None)
        by_number = func in (torch.randn, torch.rand) and place is None and "size" not in kwargs
        size = (
            tuple(args)
            if by_number
            else kwargs.get("size", args[place] if place is not None else ())
        )
        if not self._fits(size):
            return func(*args, **kwargs)
        half, out = (self.rows, *size[1:]), kwargs.get("out")
        rest = {k: v for k, v in kwargs.items() if k not in ("size", "out")}
        if place is None:
            drawn = func(*(() if by_number else args), size=half, **rest)
        else:
            drawn = func(*args[:place], half, *args[place + 1 :], **rest)
        return twice(drawn) if out is None else out.copy_(twice(drawn))

    def _normal(self, mean: Tensor, std: Any = 1.0, **kwargs: Any) -> Tensor:
        """Means (and deviations) of their own for each stream, over the same draw."""
        if not self._fits(mean.shape):
            return torch.normal(mean, std, **kwargs)
        unit = torch.zeros_like(mean[: self.rows])
        drawn: Tensor = mean + std * twice(torch.normal(unit, torch.ones_like(unit), **kwargs))
        return drawn

    @property
    def rows(self) -> int:
        """Rows of one stream."""
        return self.shape[0] // 2

    def _fits(self, size: Sequence[int]) -> bool:
        return len(size) == len(self.shape) and size[0] == self.shape[0]
