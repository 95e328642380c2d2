"""EVA02-CLIP-L-14-336, the image encoder that PuLID reads, by timm's tower.

Its file is ``EVA02_CLIP_L_336_psz14_s6B.pt`` in EVA-CLIP's naming, or the same weights in
open_clip's (``visual.trunk.*``) or timm's; timm maps the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..errors import MissingTensorError, UnexpectedTensorError, WrongFormatError
from ..files.checked import Shapes
from ..files.tensor_file import TensorFile, open_tensors
from ..method.published import EVA_BLOCKS, EVA_CLIP, EVA_TOKENS
from ..packages import require
from .clip_vision import CLIP_MEAN, CLIP_STD, preprocess

TIMM_MODEL = "eva02_large_patch14_clip_336"
HEAD_WIDTH = 768
_PREFIXES = ("visual.trunk.", "visual.", "")
_WIDTH, _DEPTH, _PATCH = 1024, 24, 14


class EvaVision:
    """The tower, and what PuLID takes of it. Arithmetic is float32.

    A host under memory management has a subclass of its own (``ManagedEva``).
    """

    clip_model = EVA_CLIP

    def __init__(self, tower: nn.Module, blocks: Sequence[int] = EVA_BLOCKS) -> None:
        """``tower``: timm's ``Eva``; ``blocks``: before which the states are taken, from 0."""
        model: Any = tower.eval().requires_grad_(False)
        self.model: Any = model
        self.blocks = tuple(blocks)
        self.image_size = int(model.patch_embed.img_size[0])
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    def place(self) -> torch.device:
        """The device the weights are on; called before each run."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def read(self, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pictures ``[H, W, 3]`` in [0, 1], of one size: the head's output of unit length
        ``[n, E]``, and the states entering ``blocks`` ``[n, levels, tokens, W]``; float32, CPU.

        The same pictures are read once, though the two are asked for one after the other.
        """
        images = torch.stack(list(pictures))
        if self._last is None or not torch.equal(self._last[0], images):
            self._last = images, self._read(images)
        return self._last[1]

    @torch.no_grad()
    def _read(self, images: Tensor) -> tuple[Tensor, Tensor]:
        device = self.place()
        pixels = preprocess(images.to(device), self.image_size, CLIP_MEAN, CLIP_STD)
        states: list[Tensor] = []
        handles = [
            self.model.blocks[number].register_forward_pre_hook(
                lambda _, inputs: states.append(inputs[0])
            )
            for number in self.blocks
        ]
        try:
            head = self.model(pixels)
        finally:
            for handle in handles:
                handle.remove()
        return normalize(head, dim=-1).cpu(), torch.stack(states, dim=1).cpu()


def prefix_of(shapes: Shapes) -> str | None:
    """What stands before the tower's names in a file, None where there is no such tower."""
    for prefix in _PREFIXES:
        blocks = re.compile(re.escape(prefix) + r"blocks\.(\d+)\.")
        numbers = {int(match[1]) for match in map(blocks.match, shapes) if match}
        if (
            tuple(shapes.get(f"{prefix}pos_embed", ())) == (1, EVA_TOKENS, _WIDTH)
            and tuple(shapes.get(f"{prefix}patch_embed.proj.weight", ()))
            == (_WIDTH, 3, _PATCH, _PATCH)
            and numbers == set(range(_DEPTH))
            and any(".rope" in n or ".mlp.w1." in n or ".fc1_g." in n or "inner_attn_ln" in n
                    or ".attn.norm." in n for n in shapes)
        ):  # fmt: skip
            return prefix
    return None


def load_eva(path: str | Path) -> EvaVision:
    """PuLID's image encoder out of a file, safetensors or pickle; nothing in a pickle runs.

    Raises ``MissingPackageError``, ``WrongFormatError`` for another model, subclasses of
    ``FileError``.
    """
    timm = require("timm", "to read images for PuLID", "timm")
    path = Path(path)
    with open_tensors(path) as file:
        prefix = prefix_of({name: tuple(e.shape) for name, e in file.header.tensors.items()})
        if prefix is None:
            raise WrongFormatError(
                path, f"is no {EVA_CLIP}, the image encoder that PuLID reads: expected a tower of "
                f"{_DEPTH} blocks, {_WIDTH} wide, on {EVA_TOKENS} tokens. Its file is "
                "EVA02_CLIP_L_336_psz14_s6B.pt."
            )  # fmt: skip
        tower = timm.create_model(TIMM_MODEL, num_classes=HEAD_WIDTH)
        return EvaVision(filled(tower, path, _tensors(file, prefix)))


def _tensors(file: TensorFile, prefix: str) -> dict[str, Tensor]:
    names = (name for name in file.header.tensors if name.startswith(prefix))
    return {name: file.tensor(name, torch.float32) for name in names if "rope" not in name}


def filled(tower: nn.Module, path: Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """``tower`` with a file's tensors, whose names timm maps. Raises ``MissingTensorError``,
    ``UnexpectedTensorError``, ``WrongFormatError`` for other shapes."""
    eva = require("timm.models.eva", "to read images for PuLID", "timm")
    found: dict[str, Tensor] = eva.checkpoint_filter_fn(dict(tensors), tower)
    wanted = tower.state_dict()
    missing, more = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing:
        raise MissingTensorError(
            path, f"lacks {len(missing)} of {len(wanted)} tensors of {EVA_CLIP}: {missing[:3]}."
        )
    if more:
        raise UnexpectedTensorError(path, f"has tensors that {EVA_CLIP} has not: {more[:3]}.")
    other = next((name for name in wanted if wanted[name].shape != found[name].shape), None)
    if other is not None:
        raise WrongFormatError(
            path, f"{other} is {list(found[other].shape)}; {EVA_CLIP} has "
            f"{list(wanted[other].shape)}."
        )  # fmt: skip
    tower.load_state_dict(found, assign=True)
    return tower
