"""open_clip's image tower, with the same model's text tower where the weights have one."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import EncoderError, MissingTensorError, UnexpectedTensorError, shown
from ..files.safetensors_file import Header, open_safetensors, read_header
from ..method.face_clip import CLIP_TOKENS
from ..packages import require
from .clip_files import check_floats, read_floats, stored_shapes
from .clip_names import Source, image_side, same_names, unknown_to_image_side
from .clip_text import build_text_tower, load_text_tower
from .clip_vision import CLIP_MEAN, CLIP_STD, IMAGE_SIZE, EncodedImages, preprocess

TextReader = Callable[[Sequence[str]], Tensor]
"""Texts -> ``[n, E]`` float32, beside the same model's ``image_embeds``."""

_FALLBACK_MODELS = ("ViT-H-14", "ViT-L-14", "ViT-bigG-14")
_OTHER_PREPROCESSING = "CLIPA"  # trained on pixels normalised another way


class OpenClipVision:
    """open_clip's visual tower behind ComfyUI's CLIP_VISION interface.

    Arithmetic is float32 whatever the weights' type, as in ComfyUI; blocks are widened one at a
    time. A host under memory management has a subclass of its own (``ManagedOpenClip``).
    """

    output_device = torch.device("cpu")

    def __init__(
        self,
        visual: nn.Module,
        clip_model: str,
        image_size: int = IMAGE_SIZE,
        read_texts: TextReader | None = None,
    ) -> None:
        """``read_texts``: the same model's text side, where there is one (CLIP-T)."""
        self.model = visual.eval().requires_grad_(False)
        self.clip_model = clip_model
        self.image_size = image_size
        self.image_mean, self.image_std = CLIP_MEAN, CLIP_STD
        self.read_texts = read_texts

    def place(self) -> torch.device:
        """The device the weights are on; called before each run, which a subclass may use to
        bring them where they should be."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode_image(self, image: Tensor, crop: bool = True) -> EncodedImages:
        """``[B, H, W, 3 or 4]`` in [0, 1] -> hidden states and embeds, float32."""
        device = self.place()
        pixels = preprocess(
            image.to(device), self.image_size, self.image_mean, self.image_std, crop
        )
        with _float32_blocks(self.model):
            out = self.model.forward_intermediates(  # type: ignore[operator]
                pixels, indices=2, output_fmt="NLC", output_extra_tokens=True
            )
        states = [
            torch.cat(pair, dim=1).to(self.output_device)
            for pair in zip(
                out["image_intermediates_prefix"], out["image_intermediates"], strict=True
            )
        ]
        return EncodedImages(
            penultimate_hidden_states=states[0],
            last_hidden_state=states[1],
            image_embeds=out["image_features"].to(self.output_device),
        )


@contextmanager
def _float32_blocks(visual: nn.Module) -> Iterator[None]:
    """Each transformer block is float32 while it runs, and its own type again afterwards."""
    blocks: Any = visual.get_submodule("transformer.resblocks")
    handles = []
    for block in blocks:
        dtype = next(block.parameters()).dtype
        if dtype == torch.float32:
            continue
        narrow = functools.partial(_cast_after, dtype=dtype)
        handles += [
            block.register_forward_pre_hook(_cast_before),
            block.register_forward_hook(narrow, always_call=True),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _cast_before(block: nn.Module, _inputs: Any) -> None:
    block.float()


def _cast_after(block: nn.Module, _inputs: Any, _output: Any, dtype: torch.dtype) -> None:
    block.to(dtype)


@functools.cache
def open_clip_models() -> tuple[str, ...]:
    """open_clip's models with 257 tokens, read off its own lists without importing it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        return _FALLBACK_MODELS
    folder = Path(spec.submodule_search_locations[0]) / "model_configs"
    found = [path.stem for path in sorted(folder.glob("*.json")) if _fits(path)]
    first = [name for name in _FALLBACK_MODELS if name in found]
    return (*first, *(name for name in found if name not in first)) or _FALLBACK_MODELS


def _fits(path: Path) -> bool:
    """Whether a model config of open_clip is its own ViT with patch 14 at 224 px."""
    if _OTHER_PREPROCESSING in path.stem:
        return False
    try:
        vision = json.loads(path.read_text(encoding="utf-8")).get("vision_cfg", {})
    except (OSError, ValueError, AttributeError):
        return False
    return (
        "timm_model_name" not in vision
        and isinstance(vision.get("layers"), int)
        and vision.get("patch_size") == 14
        and vision.get("image_size", IMAGE_SIZE) == IMAGE_SIZE
    )


def load_open_clip(
    model: str, path: str | Path, tokens: int | None = CLIP_TOKENS
) -> OpenClipVision:
    """The visual tower of an open_clip model, from a safetensors file in open_clip's naming or in
    transformers', with the same states.

    ``tokens`` None takes a model with any number of tokens: enough for scores, not for an
    identity. Nothing is downloaded. Raises ``MissingPackageError``, ``EncoderError`` for a model
    that does not fit, and subclasses of ``FileError`` naming what is wrong with the file.
    """
    config = _model_config(model)
    visual = _empty_tower(config, model, tokens)
    read_texts = functools.partial(_texts_of_file, config, model, Path(path))
    return _filled(visual, _read_tower(Path(path), visual), model, read_texts)


def check_open_clip(model: str, path: str | Path, tokens: int | None = CLIP_TOKENS) -> None:
    """Raise what ``load_open_clip`` would of names and shapes, without reading the weights."""
    visual = _empty_tower(_model_config(model), model, tokens)
    path = Path(path)
    header = read_header(path)
    check_floats(path, header, _tower_sources(path, header, visual)[1])


def build_open_clip(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], clip_model: str
) -> OpenClipVision:
    """The visual tower of a model given as open_clip config and state dict (``visual.*``).

    Where the state dict has a text side, the encoder reads texts with it.
    """
    require("open_clip", "to read images with open_clip", "open_clip_torch")
    visual = _empty_tower(config, clip_model)
    tower = {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")}
    text = {k: v for k, v in weights.items() if not k.startswith("visual.")}
    read_texts: TextReader | None = None
    if any(name.endswith("token_embedding.weight") for name in text):
        read_texts = functools.partial(_texts_of_state, config, clip_model, text)
    return _filled(visual, tower, clip_model, read_texts)


def _model_config(model: str) -> dict[str, Any]:
    open_clip = require("open_clip", "to read images with open_clip", "open_clip_torch")
    if model not in open_clip.list_models() or _OTHER_PREPROCESSING in model:
        raise EncoderError(
            f"open_clip has no model {shown(model)} with CLIP's preprocessing. Those that fit: "
            f"{', '.join(open_clip_models())}."
        )
    return cast(dict[str, Any], open_clip.get_model_config(model))


def _texts_of_file(
    config: Mapping[str, Any], model: str, path: Path, texts: Sequence[str]
) -> Tensor:
    return load_text_tower(config, model, path).encode(texts)


def _texts_of_state(
    config: Mapping[str, Any], model: str, state: Mapping[str, Tensor], texts: Sequence[str]
) -> Tensor:
    return build_text_tower(config, model, state).encode(texts)


def _empty_tower(
    config: Mapping[str, Any], model: str, wanted: int | None = CLIP_TOKENS
) -> nn.Module:
    """The tower without memory for its weights. Only its part of the model is ever built."""
    from open_clip.model import _build_vision_tower
    from open_clip.transformer import VisionTransformer

    config = copy.deepcopy(dict(config))
    with torch.device("meta"):
        visual = _build_vision_tower(
            config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu", False))
        )
    if not isinstance(visual, VisionTransformer):
        raise EncoderError(
            f"{model} is not one of open_clip's own vision transformers ({type(visual).__name__}). "
            f"Those that fit: {', '.join(open_clip_models())}."
        )
    if not hasattr(visual, "forward_intermediates"):
        raise EncoderError("open_clip is too old. Install open_clip_torch 2.32 or newer.")
    tokens = visual.grid_size[0] * visual.grid_size[1] + 1
    if wanted is not None and tokens != wanted:
        raise EncoderError(
            f"{model} gives {tokens} tokens; expected {wanted} (patch 14 at 224 pixels). "
            f"Those that fit: {', '.join(open_clip_models())}."
        )
    return cast(nn.Module, visual)


def _filled(
    visual: nn.Module, tower: Mapping[str, Tensor], model: str, read_texts: TextReader | None
) -> OpenClipVision:
    visual.load_state_dict(dict(tower), assign=True)
    blocks = visual.get_submodule("transformer.resblocks")
    inside = {id(p) for p in blocks.parameters()}
    for parameter in visual.parameters():
        if id(parameter) not in inside:  # small: float32 from the start
            parameter.data = parameter.data.float()
    size: Any = visual.image_size
    return OpenClipVision(visual, model, size[0], read_texts)


def _read_tower(path: Path, visual: nn.Module) -> dict[str, Tensor]:
    """The checked image tensors of a file in either naming; the text side is not read."""
    with open_safetensors(path) as file:
        sources, wanted = _tower_sources(path, file.header, visual)
        tensors = read_floats(file, wanted)
    return {name: source.read(tensors) for name, source in sources.items()}


def _tower_sources(
    path: Path, header: Header, visual: nn.Module
) -> tuple[dict[str, Source], dict[str, Sequence[int]]]:
    """Where each tensor of the image side lies, and the file's names for them with their shapes."""
    names, shapes = set(header.tensors), {n: p.shape for n, p in visual.state_dict().items()}
    sources, extra = _image_sources(names, shapes)
    wanted = stored_shapes(sources, shapes)
    missing = sorted(wanted.keys() - names)
    if missing:
        raise MissingTensorError(
            path, f"lacks {len(missing)} tensors of this model's image side, e.g. {missing[:3]}. "
            "Is it the weights of another model?"
        )  # fmt: skip
    if extra:
        raise UnexpectedTensorError(
            path, f"has {len(extra)} image tensors this model does not know, e.g. {extra[:3]}. "
            "Is it the weights of another model?"
        )  # fmt: skip
    return sources, wanted


def _image_sources(names: set[str], shapes: Iterable[str]) -> tuple[dict[str, Source], list[str]]:
    """Where a file with these ``names`` has an image side's tensors, and what else it has of it."""
    sources = image_side(shapes, names)
    if sources is not None:
        return sources, unknown_to_image_side(sources, names)
    prefix = "visual." if any(name.startswith("visual.") for name in names) else ""
    sources = same_names(shapes, prefix)
    known = {name for source in sources.values() for name in source.names}
    return sources, sorted(n for n in names - known if n.startswith("visual."))
