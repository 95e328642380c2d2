"""What a method is: an adapter and how it is driven, written ``NAME:key=value,key=value``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from infinite_id_core.errors import OptionError
from infinite_id_core.hosts.diffusers_sample import (
    NEGATIVE_IDENTITY,
    NegativeIdentity,
    NegativePass,
    SamplingOptions,
)
from infinite_id_core.method.attention import (
    MAX_STRENGTH,
    MIXING,
    STYLE,
    TEXT_STREAM,
    Mixing,
    StreamOptions,
    Style,
    TextStream,
)
from infinite_id_core.sdxl.schedule import SCHEDULER, Scheduler

from ..errors import MethodError

NO_ADAPTER = "none"

_SWITCH = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of making pictures. Raises ``MethodError``."""

    name: str
    adapter: str = NO_ADAPTER
    """A file, ``microworld``, or ``none``: plain SDXL."""
    strength: float = 1.0
    references: int = 1
    """How many of a person's photos are stacked."""
    mixing: str = "mixed"
    style: str = "adain_mean"
    style_strength: float = 1.0
    merge_text: bool = True
    text_stream: str = "own"
    steps: int = 30
    guidance: float = 5.0
    scheduler: str = "normal"
    negative: str = ""
    negative_identity: str = "null"
    """In the negative pass: the null identity of training, or ``none``."""
    negative_mixing: bool = True
    """Whether the negative pass mixes its self-attention (Eq. 5)."""

    def __post_init__(self) -> None:
        if not self.name or self.name.startswith(".") or set(self.name) & set('/\\:*?"<>|\n'):
            raise MethodError(
                f"A method's name becomes a folder's; {self.name!r} cannot. Use letters, digits, "
                "spaces, - and _."
            )
        if not 0.0 <= self.strength <= MAX_STRENGTH or not 1 <= self.references <= 100:
            raise MethodError(
                f"{self.name}: strength must lie in [0, {MAX_STRENGTH}] and references in "
                f"[1, 100]; got {self.strength} and {self.references}."
            )
        try:
            self.options()
            self.sampling()
            self.negative_pass()
        except OptionError as error:
            raise MethodError(f"{self.name}: {error}") from error

    def options(self) -> StreamOptions:
        """For the two streams."""
        return StreamOptions(
            mixing=cast(Mixing, self.mixing),
            style=cast(Style, self.style),
            style_strength=self.style_strength,
            merge_text=self.merge_text,
            text_stream=cast(TextStream, self.text_stream),
        )

    def sampling(self) -> SamplingOptions:
        """For the sampler."""
        return SamplingOptions(
            steps=self.steps, guidance=self.guidance, scheduler=cast(Scheduler, self.scheduler)
        )

    def negative_pass(self) -> NegativePass:
        """For the negative prompt's pass."""
        return NegativePass(
            identity=cast(NegativeIdentity, self.negative_identity), mixing=self.negative_mixing
        )

    def settings(self) -> dict[str, Any]:
        """All but the name: what a picture depends on."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


def parse_method(text: str, defaults: Method) -> Method:
    """``"mutual:mixing=mutual,strength=0.8"``; keys that are not named keep the default.

    Raises ``MethodError``.
    """
    name, _, rest = text.partition(":")
    changes: dict[str, Any] = {}
    for part in rest.split(",") if rest.strip() else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in _KINDS:
            raise MethodError(
                f"{text!r}: expected NAME or NAME:key=value,key=value; {part.strip()!r} is none. "
                f"Keys: {', '.join(_KINDS)}."
            )
        changes[key] = _value(text, key, value)
    return replace(defaults, name=name.strip(), **changes)


def _value(text: str, key: str, value: str) -> Any:
    kind = _KINDS[key]
    try:
        return _SWITCH[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        known = ", ".join(_CHOICES.get(key, ())) or kind.__name__
        raise MethodError(f"{text!r}: {key} is {value!r}; expected {known}.") from error


_KINDS: Mapping[str, type] = {
    "adapter": str, "strength": float, "references": int, "mixing": str, "style": str,
    "style_strength": float, "merge_text": bool, "text_stream": str, "steps": int,
    "guidance": float, "scheduler": str, "negative": str,
    "negative_identity": str, "negative_mixing": bool,
}  # fmt: skip
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "mixing": MIXING, "style": STYLE, "text_stream": TEXT_STREAM, "scheduler": SCHEDULER,
    "merge_text": ("on", "off"), "negative_identity": NEGATIVE_IDENTITY,
    "negative_mixing": ("on", "off"),
}  # fmt: skip
