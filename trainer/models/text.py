"""SDXL's two text encoders: prompts to what the UNet reads. Training with text off needs none."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from infinite_id_core.encoders.clip_names import text_in_transformers_names
from infinite_id_core.errors import FileMissingError, ModelMismatchError
from infinite_id_core.hosts.diffusers_sample import Prompt
from infinite_id_core.packages import require

from ..files import sampled_sha256
from .source import source_of

TOKENS = 77
_END = 49407  # CLIP's end of text
_HEAD_WIDTH = 64  # of both SDXL encoders
_ENCODERS = ("clip_l", "clip_g")

# Where each kind of file keeps its encoders: prefix -> ours. The first is ComfyUI's own naming.
_PREFIXES = (
    {"clip_l.transformer.": "clip_l", "clip_g.transformer.": "clip_g"},
    {"conditioner.embedders.0.transformer.": "clip_l", "conditioner.embedders.1.model.": "clip_g"},
)


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """CLIP-L and CLIP-G as SDXL uses them: both penultimate layers, pooled text from CLIP-G."""

    clip_l: Any
    clip_g: Any
    fingerprint: str

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Prompt:
        """Context ``[n, 77, C]`` and pooled ``[n, P]``, float32; longer texts are cut.

        The texts are taken as they are: ComfyUI's ``(word:1.2)`` has no meaning here.
        """
        tokens = tokenize(texts).to(self.clip_g.device)
        # CLIP-L is padded with the end token, CLIP-G with zeros.
        past = torch.arange(TOKENS, device=tokens.device) > tokens.argmax(dim=1, keepdim=True)
        seen_l = self.clip_l(tokens.masked_fill(past, _END), output_hidden_states=True)
        seen_g = self.clip_g(tokens, output_hidden_states=True)
        context = torch.cat([seen_l.hidden_states[-2], seen_g.hidden_states[-2]], dim=-1)
        return Prompt(context=context, pooled=seen_g.text_embeds)

    def to(self, device: torch.device) -> TextEncoders:
        """Both encoders on ``device``."""
        self.clip_l.to(device)
        self.clip_g.to(device)
        return self


def tokenize(texts: Sequence[str]) -> Tensor:
    """CLIP's tokens ``[n, 77]``: start, words, end, zeros. open_clip ships the vocabulary."""
    return cast(Tensor, _tokenizer()(list(texts), context_length=TOKENS))


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    """Unpacking the vocabulary takes a quarter of a second: once."""
    open_clip = require("open_clip", "to read prompts", "open_clip_torch")
    return open_clip.tokenizer.SimpleTokenizer()


def load_text_encoders(source: str | Path) -> TextEncoders:
    """From a checkpoint, text encoders in ComfyUI's naming, a diffusers folder or ``microworld``.

    Raises ``ModelMismatchError`` for a file without both, subclasses of ``FileError``.
    """
    place, fingerprint = source_of(source, "text_encoders"), text_fingerprint(source)
    if place.is_folder:
        first, second = (_from_folder(place.path, n) for n in ("", "_2"))
        return TextEncoders(clip_l=first, clip_g=second, fingerprint=fingerprint)
    with place.opened() as file:
        read = partial(file.tensor, dtype=torch.float32)
        states = _states(place.path, file.shapes, read)
    head_width = place.head_width(_HEAD_WIDTH)
    built = {name: _build(states[name], name, head_width, source) for name in _ENCODERS}
    return TextEncoders(**built, fingerprint=fingerprint)


def check_text_encoders(source: str | Path) -> None:
    """Find both encoders, with names and shapes, without reading their weights.

    Raises as ``load_text_encoders``.
    """
    place = source_of(source, "text_encoders")
    if place.is_folder:
        text_fingerprint(source)
        return
    shapes = place.shapes()
    states = _states(place.path, shapes, lambda name: torch.empty(shapes[name], device="meta"))
    for name, state in states.items():
        _build(state, name, place.head_width(_HEAD_WIDTH), source)


def text_fingerprint(source: str | Path) -> str:
    """Changes when the weights do; without loading them. Raises as ``load_text_encoders``."""
    place = source_of(source, "text_encoders")
    if place.is_folder:
        folders = [place.path / f"text_encoder{end}" for end in ("", "_2")]
        files = [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
        if len(files) < 2:
            raise FileMissingError(source, "expected text_encoder and text_encoder_2 in it.")
        return sampled_sha256(*files)
    if not place.embedded:
        _kind(place.path, place.shapes())
    return sampled_sha256(place.path)


def _kind(path: Path, names: Collection[str]) -> dict[str, str]:
    for prefixes in _PREFIXES:
        if all(any(name.startswith(prefix) for name in names) for prefix in prefixes):
            return prefixes
    raise ModelMismatchError(
        f"{path}: SDXL's two text encoders were not found among its {len(names)} tensors. Give an "
        "SDXL checkpoint, a diffusers folder, or both encoders in one file in ComfyUI's naming."
    )


def _states(
    path: Path, names: Collection[str], read: Callable[[str], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Both encoders' tensors in our names, each as ``read`` gives it."""
    states: dict[str, dict[str, Tensor]] = {name: {} for name in _ENCODERS}
    prefixes = _kind(path, names)
    for name in names:
        for prefix, encoder in prefixes.items():
            if name.startswith(prefix):
                states[encoder][name.removeprefix(prefix)] = read(name)
    return {
        name: text_in_transformers_names(state) if "token_embedding.weight" in state else state
        for name, state in states.items()
    }


def _build(state: dict[str, Tensor], name: str, head_width: int, source: str | Path) -> Any:
    """An encoder from its tensors alone."""
    try:
        rows, width = state["text_model.embeddings.token_embedding.weight"].shape
        layers = 1 + max(int(m[1]) for key in state if (m := re.match(_LAYER, key)))
        hidden = state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ModelMismatchError(f"{source}: {name} is no CLIP text encoder ({error}).") from error
    # CLIP-L comes without a projection, and nothing reads it.
    state.setdefault("text_projection.weight", torch.eye(width))
    model = _empty(
        {
            "num_hidden_layers": layers,
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_attention_heads": width // head_width,
            "hidden_act": "quick_gelu" if name == "clip_l" else "gelu",
            "max_position_embeddings": TOKENS,
            "vocab_size": rows,
            "eos_token_id": _END,
            "projection_dim": state["text_projection.weight"].shape[0],
        }
    )
    wanted = model.state_dict().keys()
    missing = sorted(wanted - state.keys())
    if missing:
        raise ModelMismatchError(f"{source}: {name} lacks {missing[:3]}.")
    try:
        model.load_state_dict({key: state[key] for key in wanted}, assign=True)
    except RuntimeError as error:
        raise ModelMismatchError(f"{source}: {name} is no CLIP text encoder ({error}).") from error
    # Position numbers are a buffer outside the state dict, and were made without memory.
    positions = torch.arange(TOKENS).unsqueeze(0)
    model.text_model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return model.eval().requires_grad_(False)


_LAYER = r"text_model\.encoder\.layers\.(\d+)\."


def _empty(config: Mapping[str, Any]) -> Any:
    """transformers' encoder without memory for its weights."""
    import transformers

    build: Any = transformers.CLIPTextModelWithProjection
    options: Any = transformers.CLIPTextConfig
    with torch.device("meta"):
        return build(options(**config))


def _from_folder(folder: Path, end: str) -> Any:
    import transformers

    model: Any = transformers.CLIPTextModelWithProjection if end else transformers.CLIPTextModel
    place = folder / f"text_encoder{end}"
    loaded = model.from_pretrained(place, use_safetensors=True, local_files_only=True)
    return loaded.float().eval().requires_grad_(False)
