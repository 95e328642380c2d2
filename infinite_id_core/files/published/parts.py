"""Step 1: whose tensors are which, in every container and under every prefix there is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checked import Shapes
from ..safetensors_file import Header

# The first group of each list that a file has is taken.
_PROJECTORS = ("image_proj", "image_proj_model", "id_adapter")
_ATTENTION = ("ip_adapter", "adapter_modules", "id_adapter_attn_layers", "unet")
_WRAPPERS = ("module.", "_orig_mod.")
_PROCESSOR = ".processor."


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The tensors of a published adapter by what they are. Values are the file's own names."""

    prefix: str
    """Of the projector's tensors in the file, e.g. ``image_proj.``."""
    projector: dict[str, str]
    """By the name within the projector, e.g. ``proj.weight``."""
    attention: dict[str, str]
    """By the name within their group, e.g. ``1.to_k_ip.weight``."""
    others: dict[str, int]
    """Groups that no published projector reads, and how many tensors each has."""

    def shapes(self, header: Header) -> Shapes:
        """Shapes of the projector's tensors, by the names within it."""
        return {name: header.tensors[own].shape for name, own in self.projector.items()}


def parts_of(names: Iterable[str]) -> Parts:
    """Sort the names of a file. A projector or K/V that it does not have come out empty.

    A training checkpoint holds its K/V twice, of which a safetensors file keeps only those under
    ``unet.``, with the frozen UNet around them; that is left behind.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in names:
        group, _, rest = without_wrapper(name).partition(".")
        groups.setdefault(group, {})[rest] = name
    if "unet" in groups:
        own = {rest: name for rest, name in groups["unet"].items() if _PROCESSOR in rest}
        groups["unet"] = own
    projector = next((g for g in _PROJECTORS if groups.get(g)), "")
    attention = next((g for g in _ATTENTION if groups.get(g)), "")
    taken = (projector, attention, "unet")
    first = next(iter(groups.get(projector, {}).items()), ("", ""))
    return Parts(
        prefix=first[1].removesuffix(first[0]),
        projector=groups.get(projector, {}),
        attention=groups.get(attention, {}),
        others={group: len(inside) for group, inside in groups.items() if group not in taken},
    )


def without_wrapper(name: str) -> str:
    """A name without what training puts before all names."""
    while (wrapper := next((w for w in _WRAPPERS if name.startswith(w)), "")) != "":
        name = name[len(wrapper) :]
    return name
