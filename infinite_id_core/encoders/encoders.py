"""E_face and E_clip: from aligned faces to an identity (Eq. 4, before the mappers).

E_clip is anything with ComfyUI's ``CLIP_VISION`` interface: ComfyUI's own objects, or
``OpenClipVision`` here, which gives the same hidden states on the same weights.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from ..errors import (
    EncoderError,
    MissingTensorError,
    OptionError,
    UnexpectedTensorError,
    WrongDtypeError,
    WrongShapeError,
    shown,
)
from ..faces.align import AlignedFace
from ..files.safetensors_file import Header, SafetensorsFile, open_safetensors, read_header
from ..method.identity import (
    CLIP_LAYER,
    CLIP_TOKENS,
    EMBEDDING,
    ClipLayer,
    Embedding,
    Identity,
    IdentityConfig,
    average,
)
from ..method.identity import check_match as _check_match
from ..packages import require
from .clip_names import Source, image_side, same_names, unknown_to_image_side

Combine = Literal["stack", "average"]
COMBINE: tuple[Combine, ...] = get_args(Combine)

# CLIP's preprocessing, the same in open_clip, transformers and ComfyUI.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SIZE = 224  # pixels

_BATCH = 16  # crops encoded at a time: bounds memory for a hundred faces
_NAMES = {1664: "ViT-bigG-14", 1280: "ViT-H-14", 1024: "ViT-L-14"}
_FALLBACK_MODELS = ("ViT-H-14", "ViT-L-14", "ViT-bigG-14")
_OTHER_PREPROCESSING = "CLIPA"  # trained on pixels normalised another way
_FLOATS = ("F32", "F16", "BF16")


class ClipVision(Protocol):
    """ComfyUI's CLIP_VISION, as far as this project uses it."""

    def encode_image(self, image: Tensor, crop: bool = True) -> Any:
        """``[B, H, W, 3]`` in [0, 1] -> an object with ``last_hidden_state`` and
        ``penultimate_hidden_states``, each ``[B, tokens, D]``."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How faces become an identity. Raises ``OptionError``."""

    combine: Combine = "stack"
    """Several references side by side, or their weighted mean as one (A.3)."""
    weights: tuple[float, ...] = ()
    """One positive number a reference; empty for equal weights."""
    clip_layer: ClipLayer = "last"
    embedding: Embedding = "normed"

    def __post_init__(self) -> None:
        choices = {"combine": COMBINE, "clip_layer": CLIP_LAYER, "embedding": EMBEDDING}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(
                    f"{name} must be one of {', '.join(allowed)}; got {shown(value)}."
                )


# --- E_face ----------------------------------------------------------------------------------


def face_embedding(face: AlignedFace, embedding: Embedding = "normed") -> Tensor:
    """E_face of one face: ``[512]`` float32, of unit length where ``normed``."""
    raw = face.embedding.float()
    return normalize(raw, dim=0) if embedding == "normed" else raw


# --- E_clip ----------------------------------------------------------------------------------


def hidden_states(clip_vision: ClipVision, crops: Sequence[Tensor], layer: ClipLayer) -> Tensor:
    """E_clip of crops ``[S, S, 3]``: ``[n, 257, D]`` float32 on the CPU.

    ``layer``: after the last block, or one before; no final norm in either. Raises
    ``EncoderError`` for an encoder of another kind, or where it gives NaN.
    """
    parts = []
    for start in range(0, len(crops), _BATCH):
        images = torch.stack([crop[..., :3].float() for crop in crops[start : start + _BATCH]])
        parts.append(_states(clip_vision.encode_image(images), layer, images.shape[0]))
    return torch.cat(parts)


def _states(output: Any, layer: ClipLayer, count: int) -> Tensor:
    name = "last_hidden_state" if layer == "last" else "penultimate_hidden_states"
    states = getattr(output, name, None)
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[0] != count:
        found = "nothing" if states is None else f"{getattr(states, 'shape', type(states))}"
        raise EncoderError(
            f"Expected {name} [{count}, tokens, width] from CLIP_VISION, got {found}."
        )
    if states.shape[1] != CLIP_TOKENS:
        raise EncoderError(
            f"This needs an image encoder that gives {CLIP_TOKENS} tokens: a ViT with patch 14 at "
            f"224 pixels, such as ViT-H-14 (width 1280) or ViT-bigG-14 (width 1664). The connected "
            f"one gives {states.shape[1]} tokens of width {states.shape[2]}. Load the CLIP vision "
            "file that the adapter names."
        )
    states = states.detach().to(device="cpu", dtype=torch.float32)
    if not bool(states.isfinite().all()):
        raise EncoderError(
            "The image encoder gives NaN or infinity: its file is damaged, or its number format is "
            "too small for it (start ComfyUI with --fp32-text-enc)."
        )
    return states


def encoder_name(clip_vision: ClipVision, width: int) -> str:
    """The encoder's name for the record: its own, or the one its width stands for.

    open_clip's ``-quickgelu`` variants are the same networks under another activation's name.
    """
    own = getattr(clip_vision, "clip_model", None)
    if isinstance(own, str) and own:
        return own.removesuffix("-quickgelu")
    return _NAMES.get(width, f"vit-{width}")


# --- an identity -----------------------------------------------------------------------------


def embed(
    faces: Sequence[AlignedFace], clip_vision: ClipVision, options: EncodeOptions | None = None
) -> Identity:
    """E_face and E_clip of all ``faces`` as one identity.

    Raises ``OptionError`` (no face, wrong number of weights), ``IdentityMismatchError`` (faces
    read by different recognisers), ``EncoderError``.
    """
    options = options or EncodeOptions()
    if not faces:
        raise OptionError("At least one face is needed, got none. Connect Align Face.")
    for other in faces[1:]:
        _check_match(
            "face 0", {"recogniser": faces[0].recogniser},
            "another face", {"recogniser": other.recogniser},
        )  # fmt: skip
    weights = options.weights or (1.0,) * len(faces)
    if len(weights) != len(faces):
        raise OptionError(
            f"Expected {len(faces)} weights, one for each face, got {len(weights)}: "
            f"{shown(list(weights))}."
        )
    clip = hidden_states(clip_vision, [face.crop for face in faces], options.clip_layer)
    identity = Identity(
        face=torch.stack([face_embedding(face, options.embedding) for face in faces]),
        clip=clip,
        weight=torch.tensor(weights, dtype=torch.float32),
        config=IdentityConfig(
            recogniser=faces[0].recogniser,
            embedding=options.embedding,
            clip_model=encoder_name(clip_vision, clip.shape[2]),
            clip_layer=options.clip_layer,
        ),
    )
    return average(identity) if options.combine == "average" else identity


def parse_weights(text: str) -> tuple[float, ...]:
    """``"1, 0.5"`` -> (1.0, 0.5); empty text -> (). Raises ``OptionError``."""
    parts = text.replace(";", ",").split(",") if text.strip() else []
    try:
        return tuple(float(part) for part in parts)
    except ValueError as error:
        raise OptionError(
            f"Expected numbers separated by commas, such as '1, 0.5', got {shown(text)}."
        ) from error


# --- open_clip -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """What ``encode_image`` gives, under ComfyUI's names; read as attributes or as items."""

    last_hidden_state: Tensor
    """After the last block, before the final norm: ``[B, tokens, D]``."""
    penultimate_hidden_states: Tensor
    """One block earlier."""
    image_embeds: Tensor
    """Projected class token: ``[B, E]``."""
    mm_projected: None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


class OpenClipVision:
    """open_clip's visual tower behind ComfyUI's CLIP_VISION interface.

    ``place`` is called before each run, brings the weights where they should be and returns that
    device; a host under memory management replaces it. Arithmetic is float32 whatever the
    weights' type, as in ComfyUI; blocks are widened one at a time.
    """

    def __init__(self, visual: nn.Module, clip_model: str, image_size: int = IMAGE_SIZE) -> None:
        self.model = visual.eval().requires_grad_(False)
        self.clip_model = clip_model
        self.image_size = image_size
        self.image_mean, self.image_std = CLIP_MEAN, CLIP_STD
        self.read_texts: Callable[[Sequence[str]], Tensor] | None = None
        """The same model's text side, texts to ``[n, E]`` beside ``image_embeds`` (CLIP-T)."""
        self.place: Callable[[], torch.device] = lambda: next(visual.parameters()).device
        self.output_device = torch.device("cpu")

    @torch.no_grad()
    def encode_image(self, image: Tensor, crop: bool = True) -> EncodedImages:
        """``[B, H, W, 3 or 4]`` in [0, 1] -> hidden states and embeds, float32."""
        device = self.place()
        pixels = preprocess(image.to(device), self.image_size, crop=crop)
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


def preprocess(
    image: Tensor,
    size: int = IMAGE_SIZE,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    crop: bool = True,
) -> Tensor:
    """CLIP's preprocessing with the numerics of ComfyUI: ``[B, H, W, 3 or 4]`` -> ``[B, 3, s, s]``.

    The shorter side (``crop``, then the centre is cut) or both sides become ``size`` by antialiased
    bicubic sampling; values are rounded to 1/255 as an 8-bit picture's are, then normalised.
    """
    planes = image[..., :3].float().permute(0, 3, 1, 2)  # BHWC -> BCHW
    height, width = planes.shape[2:]
    if (height, width) != (size, size):
        target = (size, size)
        if crop:
            scale = size / min(height, width)
            target = (round(scale * height), round(scale * width))
        planes = interpolate(planes, size=target, mode="bicubic", antialias=True)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        planes = planes[:, :, top : top + size, left : left + size]
    planes = (planes * 255.0).clamp(0, 255).round() / 255.0
    shape = (1, 3, 1, 1)
    return (planes - planes.new_tensor(mean).view(shape)) / planes.new_tensor(std).view(shape)


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
    vision = _filled(visual, _read_tower(Path(path), visual), model)
    vision.read_texts = functools.partial(_texts_of_file, config, model, Path(path))
    return vision


def check_open_clip(model: str, path: str | Path, tokens: int | None = CLIP_TOKENS) -> None:
    """Raise what ``load_open_clip`` would of names and shapes, without reading the weights."""
    visual = _empty_tower(_model_config(model), model, tokens)
    path = Path(path)
    header = read_header(path)
    check_floats(path, header, _tower_sources(path, header, visual)[1])


def _model_config(model: str) -> dict[str, Any]:
    open_clip = require("open_clip", "to read images with open_clip", "open_clip_torch")
    if model not in open_clip.list_models() or _OTHER_PREPROCESSING in model:
        raise EncoderError(
            f"open_clip has no model {shown(model)} with CLIP's preprocessing. Those that fit: "
            f"{', '.join(open_clip_models())}."
        )
    return cast(dict[str, Any], open_clip.get_model_config(model))


def build_open_clip(
    config: Mapping[str, Any], weights: Mapping[str, Tensor], clip_model: str
) -> OpenClipVision:
    """The visual tower of a model given as open_clip config and state dict (``visual.*``).

    Where the state dict has a text side, the encoder reads texts with it.
    """
    require("open_clip", "to read images with open_clip", "open_clip_torch")
    visual = _empty_tower(config, clip_model)
    tower = {k.removeprefix("visual."): v for k, v in weights.items() if k.startswith("visual.")}
    vision = _filled(visual, tower, clip_model)
    text = {k: v for k, v in weights.items() if not k.startswith("visual.")}
    if any(name.endswith("token_embedding.weight") for name in text):
        vision.read_texts = functools.partial(_texts_of_state, config, clip_model, text)
    return vision


# Late: clip_text.py uses this file's checks.
def _texts_of_file(
    config: Mapping[str, Any], model: str, path: Path, texts: Sequence[str]
) -> Tensor:
    from .clip_text import load_text_tower

    return load_text_tower(config, model, path).encode(texts)


def _texts_of_state(
    config: Mapping[str, Any], model: str, state: Mapping[str, Tensor], texts: Sequence[str]
) -> Tensor:
    from .clip_text import build_text_tower

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


def _filled(visual: nn.Module, tower: Mapping[str, Tensor], model: str) -> OpenClipVision:
    visual.load_state_dict(dict(tower), assign=True)
    blocks = visual.get_submodule("transformer.resblocks")
    inside = {id(p) for p in blocks.parameters()}
    for parameter in visual.parameters():
        if id(parameter) not in inside:  # small: float32 from the start
            parameter.data = parameter.data.float()
    size: Any = visual.image_size
    return OpenClipVision(visual, model, size[0])


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
    sources = image_side(shapes, names)
    if sources is not None:
        extra = unknown_to_image_side(sources, names)
    else:
        prefix = "visual." if any(name.startswith("visual.") for name in names) else ""
        sources = same_names(shapes, prefix)
        known = {name for source in sources.values() for name in source.names}
        extra = sorted(n for n in names - known if n.startswith("visual."))
    wanted: dict[str, Sequence[int]] = {}
    for name, source in sources.items():
        wanted.update(source.shapes(shapes[name]))
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


def check_floats(path: Path, header: Header, wanted: Mapping[str, Sequence[int]]) -> None:
    """Raise ``WrongShapeError`` or ``WrongDtypeError`` where the header says another thing."""
    for name, shape in wanted.items():
        entry = header.tensors[name]
        if entry.shape != tuple(shape):
            raise WrongShapeError(
                path, f"{name} has shape {list(entry.shape)}; expected {list(shape)}. Is it "
                "the weights of another model?"
            )  # fmt: skip
        if entry.dtype not in _FLOATS:
            raise WrongDtypeError(path, f"{name} is {entry.dtype}; expected one of {_FLOATS}.")


def read_floats(file: SafetensorsFile, wanted: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The ``wanted`` tensors of an open file that has them all, by name and shape, checked.

    Raises ``WrongShapeError``, ``WrongDtypeError``, ``NotFiniteError``, ``TruncatedFileError``.
    """
    check_floats(file.path, file.header, wanted)
    return {name: file.tensor(name) for name in wanted}
