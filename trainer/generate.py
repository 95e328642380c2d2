"""``python -m trainer generate``: pictures of a person without ComfyUI.

The two streams on diffusers' UNet, with the same arithmetic and the same noise for a seed as the
nodes in ComfyUI (sampler ``euler`` or ``ddim``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infinite_id_core.errors import OptionError
from infinite_id_core.files.atomic import replacing
from infinite_id_core.files.identities import read_identity
from infinite_id_core.files.system import writing
from infinite_id_core.hosts.diffusers_sample import AppliedIdentity, SamplingOptions
from infinite_id_core.method.attention import MIXING, STYLE, TEXT_STREAM, StreamOptions
from infinite_id_core.sdxl.schedule import SCHEDULER

from .models.source import MICROWORLD
from .models.unet_names import HEAD_WIDTH
from .painter import (
    DTYPES,
    IdentityReader,
    Painter,
    Picture,
    Sources,
    encode_texts,
    load_adapter,
    load_painter,
)
from .photos import read_reference
from .prompts import PromptFile, read_prompts, write_prompts
from .train.memory import memory_errors


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
        text_encoders=values.text_encoders,
        head_width=values.head_width,
    )
    prompts = _prompts(values, sources)
    if values.save_prompts:
        write_prompts(values.save_prompts, prompts)
        print(values.save_prompts)
        return 0
    applied = _applied(values, device)
    dtype = DTYPES[values.precision or ("fp16" if device == "cuda" else "fp32")]
    _paint(values, load_painter(sources, device, dtype), prompts, applied)
    return 0


def _paint(
    values: argparse.Namespace,
    painter: Painter,
    prompts: PromptFile,
    applied: Sequence[AppliedIdentity],
) -> None:
    picture = Picture(
        width=values.width, height=values.height, seed=values.seed, count=values.count
    )
    options = StreamOptions(
        mixing=values.mixing,
        style=values.style,
        style_strength=values.style_strength,
        text_stream=values.text_stream,
    )
    sampling = SamplingOptions(
        steps=values.steps, guidance=values.guidance, scheduler=values.scheduler
    )
    for number, (text, prompt) in enumerate(zip(prompts.texts, prompts.positive, strict=True)):
        print(text, file=sys.stderr)
        with tqdm(desc="generate", dynamic_ncols=True) as bar:

            def advance(step: int, steps: int, _: Tensor, bar: Any = bar) -> None:
                bar.total = steps
                bar.update(step - bar.n)

            made = painter.paint(
                prompt,
                prompts.negative,
                picture.noise(),
                applied,
                options=options,
                sampling=sampling,
                progress=advance,
            )
        for index, one in enumerate(made):
            path = _numbered(values.output, number * picture.count + index)
            save_png(one, path)
            print(path)


def _prompts(values: argparse.Namespace, sources: Sources) -> PromptFile:
    if values.prompts:
        return read_prompts(values.prompts)
    if not values.prompt:
        raise OptionError("Give --prompt, or --prompts with a file of encoded ones.")
    encoded = encode_texts(sources, [*values.prompt, values.negative])
    return PromptFile(
        texts=tuple(values.prompt),
        negative_text=values.negative,
        positive=tuple(encoded[text] for text in values.prompt),
        negative=encoded[values.negative],
    )


def _applied(values: argparse.Namespace, device: str) -> list[AppliedIdentity]:
    """The person of --identity or --photo, if there is one."""
    if values.identity and values.photo:
        raise OptionError("Give --identity or --photo, not both.")
    if not (values.identity or values.photo):
        return []
    if not values.adapter:
        raise OptionError("A person needs --adapter, the file that training made.")
    adapter = load_adapter(values.adapter)
    if values.identity:
        identity = read_identity(values.identity)
    else:
        reader = IdentityReader(values.face_models or MICROWORLD, values.clip_weights)
        identity = reader.read(adapter, {str(values.photo): read_reference(values.photo)})
    return [
        AppliedIdentity(adapter=adapter.to(device), identity=identity, strength=values.strength)
    ]


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
    add("--precision", choices=tuple(DTYPES), default="", help="default: fp16 on cuda, else fp32")
    add("--head-width", type=int, default=HEAD_WIDTH, help="of the UNet's attention heads")
    return parser
