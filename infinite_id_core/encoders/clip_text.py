"""E_text of Eq. 11: the text side of an open_clip model, for CLIP-T only."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import EncoderError, MissingTensorError
from ..files.safetensors_file import open_safetensors
from ..packages import require
from .clip_files import read_floats, stored_shapes
from .clip_names import same_names, text_side

_BATCH = 64  # texts
_PREFIXES = ("", "text.")  # open_clip's CLIP keeps its text side at the top, others below `text`


@dataclass(frozen=True, kw_only=True, eq=False)
class TextTower:
    """open_clip's text transformer with CLIP's own tokenizer, in float32 on the CPU."""

    module: nn.Module
    tokens: int
    """Length of a tokenized text."""

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Texts -> ``[n, E]`` float32, beside the same model's ``image_embeds``; longer texts are
        cut."""
        open_clip = require("open_clip", "to read prompts", "open_clip_torch")
        tokens = open_clip.tokenizer.SimpleTokenizer()(list(texts), context_length=self.tokens)
        parts = [cast(Tensor, self.module(part)) for part in tokens.split(_BATCH)]
        return torch.cat(parts)


def load_text_tower(config: Mapping[str, Any], model: str, path: Path) -> TextTower:
    """From a safetensors file in open_clip's or transformers' naming; only its text side is read.

    Raises ``EncoderError`` for a model with another kind of text side, ``MissingTensorError`` for
    a file without one, and other subclasses of ``FileError``.
    """
    tower = _empty(config, model)
    with open_safetensors(path) as file:
        header = file.header
        shapes = {name: p.shape for name, p in tower.module.state_dict().items()}
        sources = text_side(shapes, header.tensors)
        if sources is None:
            sources = same_names(shapes, _prefix(header.tensors))
        wanted = stored_shapes(sources, shapes)
        missing = sorted(wanted.keys() - header.tensors.keys())
        if missing:
            raise MissingTensorError(
                path, f"lacks {len(missing)} tensors of this model's text side, e.g. "
                f"{missing[:3]}. CLIP-T needs a file that holds both sides."
            )  # fmt: skip
        tensors = read_floats(file, wanted)
    return _filled(tower, {name: source.read(tensors) for name, source in sources.items()})


def build_text_tower(
    config: Mapping[str, Any], model: str, state: Mapping[str, Tensor]
) -> TextTower:
    """From open_clip's config and a state dict that has been read and checked already."""
    tower = _empty(config, model)
    prefix = _prefix(state)
    return _filled(tower, {name: state[prefix + name] for name in tower.module.state_dict()})


def _prefix(names: Mapping[str, Any]) -> str:
    return next((p for p in _PREFIXES if f"{p}token_embedding.weight" in names), "")


def _empty(config: Mapping[str, Any], model: str) -> TextTower:
    """The tower without memory for its weights."""
    require("open_clip", "to read prompts", "open_clip_torch")
    from open_clip.model import _build_text_tower

    config = copy.deepcopy(dict(config))
    text = config["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise EncoderError(
            f"{model} reads texts with a tokenizer of its own, which would have to be downloaded. "
            "For CLIP-T use a model with CLIP's tokenizer (ViT-H-14, ViT-L-14, ViT-B-32, ...)."
        )
    with torch.device("meta"):
        module = _build_text_tower(config["embed_dim"], text, bool(config.get("quick_gelu")))
    return TextTower(module=module, tokens=int(text.get("context_length", 77)))


def _filled(tower: TextTower, tensors: Mapping[str, Tensor]) -> TextTower:
    module: Any = tower.module
    state = {name: tensor.float() for name, tensor in tensors.items()}
    module.load_state_dict(state, assign=True)
    if module.attn_mask is not None:  # a buffer outside the state dict, made without memory
        module.attn_mask = module.build_causal_mask()
    module.eval().requires_grad_(False)
    return tower
