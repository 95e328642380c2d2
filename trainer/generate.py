"""``python -m trainer generate``: pictures of a person without ComfyUI.

The two streams on diffusers' UNet, with the same arithmetic and the same noise for a seed as the
nodes in ComfyUI (sampler ``euler`` or ``ddim``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infinite_id_core.encoders.encode import EncodeOptions, encode_faces
from infinite_id_core.errors import OptionError
from infinite_id_core.faces.find import FaceOptions, find_faces
from infinite_id_core.faces.pack import load_face_models
from infinite_id_core.files.adapters import read_adapter
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.identities import read_identity
from infinite_id_core.files.system import writing
from infinite_id_core.hosts.diffusers_sample import (
    AppliedIdentity,
    Prompt,
    SamplingOptions,
    sample,
)
from infinite_id_core.method.adapter import Adapter
from infinite_id_core.method.attention import MIXING, STYLE, TEXT_STREAM, StreamOptions
from infinite_id_core.method.face_clip import CLIP
from infinite_id_core.method.identity import Identity
from infinite_id_core.sdxl.schedule import SCHEDULER

from .config import Encoder
from .errors import ReferencePhotoError
from .models.text import load_text_encoders
from .models.unet import MICROWORLD, load_unet
from .models.unet_names import HEAD_WIDTH
from .models.vae import STRIDE, load_vae
from .prepare.photo import PhotoError, read_pixels
from .prompts import PromptFile, read_prompts, write_prompts
from .train.features import load_image_encoder
from .train.memory import memory_errors

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where everything comes from; each may be ``microworld``."""

    unet: str
    vae: str = ""
    text_encoders: str = ""
    adapter: str = ""
    """Empty: plain SDXL."""
    head_width: int = HEAD_WIDTH


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What to draw. Raises ``OptionError``."""

    width: int = 1024
    height: int = 1024
    seed: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if self.width % STRIDE or self.height % STRIDE or min(self.width, self.height) < 64:
            raise OptionError(
                f"Width and height must be multiples of {STRIDE} from 64 on, got {self.width} x "
                f"{self.height}."
            )
        if not 1 <= self.count <= 64:
            raise OptionError(f"count must lie in [1, 64], got {self.count}.")

    def noise(self) -> Tensor:
        """``[count, 4, h, w]``, as ComfyUI draws it for the same seed."""
        size = (self.count, 4, self.height // STRIDE, self.width // STRIDE)
        return torch.randn(size, generator=torch.manual_seed(self.seed))


def generate(
    sources: Sources,
    prompt: Prompt,
    negative: Prompt,
    picture: Picture,
    *,
    identity: Identity | None = None,
    strength: float = 1.0,
    options: StreamOptions | None = None,
    sampling: SamplingOptions | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    quiet: bool = False,
) -> Tensor:
    """Pictures ``[count, 3, H, W]`` in [0, 1]. Raises what its parts raise."""
    loaded = load_unet(sources.unet, dtype=dtype, head_width=sources.head_width)
    loaded.unet.to(device)
    applied = []
    if identity is not None:
        adapter = load_adapter(sources.adapter).to(device)
        applied.append(AppliedIdentity(adapter=adapter, identity=identity, strength=strength))
    sampling = sampling or SamplingOptions()
    with tqdm(total=sampling.steps, desc="generate", disable=quiet, dynamic_ncols=True) as bar:
        latents = sample(
            loaded.unet,
            applied,
            prompt,
            negative,
            picture.noise().to(device),
            options=options,
            sampling=sampling,
            schedule=loaded.schedule,
            progress=lambda step, steps, _: _advance(bar, step, steps),
        )
    vae = load_vae(sources.vae or sources.unet)
    vae.module.to(device)
    return vae.decode(latents).cpu()


def _advance(bar: Any, step: int, steps: int) -> None:
    bar.total = steps
    bar.update(step - bar.n)


def load_adapter(source: str) -> Adapter:
    """An adapter in float32, without gradients. Raises a subclass of ``FileError``."""
    if source != MICROWORLD:
        return read_adapter(source).float().requires_grad_(False)
    from microworld import files

    return read_adapter(files.ADAPTER).float().requires_grad_(False)


def read_photo(photo: Path, adapter: Adapter, face_models: str, clip_weights: str) -> Identity:
    """The identity of the largest face of a photo, with the encoders the adapter names.

    Raises ``NoFaceError``, ``ReferencePhotoError``, and what loading the encoders raises.
    """
    try:
        pixels = read_pixels(photo).astype(np.float32) / 255.0
    except PhotoError as error:
        raise ReferencePhotoError(
            photo, f"the photo cannot be read: {error.reason} ({error.detail})."
        ) from error
    folder = Path(face_models) if face_models else _embedded_faces()
    app = load_face_models(folder.name, [folder.parent.parent])
    found = find_faces(app, torch.from_numpy(pixels), FaceOptions())
    options = EncodeOptions.of_needs(adapter.needs)
    encoder = Encoder(clip_model=adapter.needs[CLIP].model, clip_weights=clip_weights)
    return encode_faces(found.chosen, load_image_encoder(encoder), options)


def _embedded_faces() -> Path:
    from microworld import files

    return files.FACE_MODELS


def save_png(picture: Tensor, path: Path) -> None:
    """Write ``[3, H, W]`` in [0, 1] atomically. Raises ``DiskFullError``, ``NotWrittenError``."""
    pixels = (picture.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    with writing(path), replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")


# --- command line ----------------------------------------------------------------------------


@memory_errors("making pictures", "give a smaller --width and --height, or --device cpu")
def main(argv: Sequence[str]) -> int:
    """Make pictures, or encode prompts into a file. Returns the exit status."""
    values = _parser().parse_args(argv)
    device = values.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sources = Sources(
        unet=values.unet,
        vae=values.vae,
        text_encoders=values.text_encoders or values.unet,
        adapter=values.adapter,
        head_width=values.head_width,
    )
    prompts = _prompts(values, sources)
    if values.save_prompts:
        write_prompts(values.save_prompts, prompts)
        print(values.save_prompts)
        return 0
    identity = _identity(values)
    picture = Picture(
        width=values.width, height=values.height, seed=values.seed, count=values.count
    )
    for number, (text, prompt) in enumerate(zip(prompts.texts, prompts.positive, strict=True)):
        print(text, file=sys.stderr)
        made = generate(
            sources,
            prompt,
            prompts.negative,
            picture,
            identity=identity,
            strength=values.strength,
            options=StreamOptions(
                mixing=values.mixing,
                style=values.style,
                style_strength=values.style_strength,
                text_stream=values.text_stream,
            ),
            sampling=SamplingOptions(
                steps=values.steps, guidance=values.guidance, scheduler=values.scheduler
            ),
            device=device,
            dtype=_DTYPES[values.precision or ("fp16" if device == "cuda" else "fp32")],
        )
        for index, one in enumerate(made):
            path = _numbered(values.output, number * picture.count + index)
            save_png(one, path)
            print(path)
    return 0


def _prompts(values: argparse.Namespace, sources: Sources) -> PromptFile:
    if values.prompts:
        return read_prompts(values.prompts)
    if not values.prompt:
        raise OptionError("Give --prompt, or --prompts with a file of encoded ones.")
    encoders = load_text_encoders(sources.text_encoders)
    positive = tuple(encoders.encode([text]) for text in values.prompt)
    return PromptFile(
        texts=tuple(values.prompt),
        negative_text=values.negative,
        positive=positive,
        negative=encoders.encode([values.negative]),
    )


def _identity(values: argparse.Namespace) -> Identity | None:
    if values.identity and values.photo:
        raise OptionError("Give --identity or --photo, not both.")
    if not (values.identity or values.photo):
        return None
    if not values.adapter:
        raise OptionError("A person needs --adapter, the file that training made.")
    if values.identity:
        return read_identity(values.identity)
    adapter = load_adapter(values.adapter)
    return read_photo(values.photo, adapter, values.face_models, values.clip_weights)


def _numbered(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.stem}_{number}{path.suffix}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer generate", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--unet", default=MICROWORLD, help="SDXL checkpoint, diffusers folder, or microworld")
    add("--vae", default="", help="autoencoder; default: the one inside --unet")
    add("--text-encoders", default="", help="default: those inside --unet")
    add("--adapter", default="", help="adapter file; without one the picture is plain SDXL's")
    add("--identity", default="", help="identity file (node Save Identity)")
    add("--photo", type=Path, help="a photo of the person, in place of --identity")
    add("--face-models", default="", help="for --photo: .../models/<pack>; default: embedded")
    add("--clip-weights", default="", help="for --photo: the image encoder the adapter names")
    add("--prompt", action="append", help="may be given several times")
    add("--negative", default="", help="negative prompt")
    add("--prompts", default="", help="file of encoded prompts, in place of --prompt")
    add("--save-prompts", default="", help="encode the prompts into this file and end")
    add("--output", type=Path, default=Path("picture.png"))
    add("--width", type=int, default=1024)
    add("--height", type=int, default=1024)
    add("--seed", type=int, default=0)
    add("--count", type=int, default=1, help="pictures per prompt")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=5.0)
    add("--scheduler", choices=SCHEDULER, default="normal")
    add("--strength", type=float, default=1.0)
    add("--mixing", choices=MIXING, default="mixed")
    add("--style", choices=STYLE, default="adain_mean")
    add("--style-strength", type=float, default=1.0)
    add("--text-stream", choices=TEXT_STREAM, default="own")
    add("--device", default="", help="default: cuda if there is one, else cpu")
    add("--precision", choices=tuple(_DTYPES), default="", help="default: fp16 on cuda, else fp32")
    add("--head-width", type=int, default=HEAD_WIDTH, help="of the UNet's attention heads")
    return parser
